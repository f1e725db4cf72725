# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a module needs that waits in slices, between which its action shows the reason."""

from __future__ import annotations

import math
import time
from typing import Any

OPTIONS: dict[str, Any] = {"slice": {"type": "int"}, "resume": {"type": "dict", "default": {}}}


class Waiting(Exception):
    """The slice is over; the text says what is waited for, and ``resume`` is for the next one."""

    def __init__(self, text: str, resume: dict) -> None:
        super().__init__(text)
        self.resume = resume

    def result(self) -> dict:
        """Return what the module returns to its action."""
        return {"changed": False, "waiting": str(self), "resume": self.resume}


class Slice:
    """The time of one call: when the wait has begun, which may be calls ago, and when this call ends."""

    def __init__(self, params: dict) -> None:
        now = time.monotonic()
        self.resume: dict = params.get("resume") or {}
        self.began = now - float(self.resume.get("waited", 0))
        self._ends = now + (params.get("slice") or math.inf)

    def check(self, text: str, **resume: object) -> None:
        """Raise Waiting if the slice is over."""
        if time.monotonic() >= self._ends:
            raise Waiting(text, resume)
