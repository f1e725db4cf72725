# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting in slices: a module returns after each slice, and its action plugin shows the reason of the wait."""

from __future__ import annotations

import math
import time
from typing import Any

OPTIONS: dict[str, Any] = {"slice": {"type": "int"}, "resume": {"type": "dict", "default": {}}}


class Waiting(Exception):
    """The slice has ended; the text is the reason of the wait, and ``resume`` is for the next slice."""

    def __init__(self, text: str, resume: dict) -> None:
        super().__init__(text)
        self.resume = resume

    def result(self) -> dict:
        """Return the module's result for its action plugin."""
        return {"changed": False, "waiting": str(self), "resume": self.resume}


class Slice:
    """The time limit of one call, and the start of the wait, which may be several calls ago."""

    def __init__(self, params: dict) -> None:
        now = time.monotonic()
        self.resume: dict = params.get("resume") or {}
        self.began = now - float(self.resume.get("waited", 0))
        self._ends = now + (params.get("slice") or math.inf)

    def check(self, text: str, **resume: object) -> None:
        """Raise Waiting if the slice has ended."""
        if time.monotonic() >= self._ends:
            raise Waiting(text, resume)
