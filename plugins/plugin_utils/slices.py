# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from typing import Any, Callable

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable

# Seconds of one slice; after each, a new state is shown.
SLICE = 5
# Seconds after which an unchanged state is shown again.
SILENCE = 30.0


class ActionInSlices(ActionBase):  # type: ignore[misc]
    """Run the module of the same name, in slices while it waits, and show the reason of the wait."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        host = (task_vars or {}).get("inventory_hostname", "")

        def call(resume: dict) -> dict:
            module_args = {**self._task.args, "slice": SLICE, "resume": resume}
            return self._execute_module(module_args=module_args, task_vars=task_vars)

        def say(line: str) -> None:
            Display().display(printable(f"[{host}] {line}"))

        result.update(run_in_slices(call, say))
        return result


def run_in_slices(call: Callable[[dict], dict], say: Callable[[str], None], clock: Any = time) -> dict:
    """Return the result of the last slice."""
    start = clock.monotonic()
    said, said_at = "", 0.0
    result = call({})
    while result.get("waiting"):
        waited = clock.monotonic() - start
        if result["waiting"] != said or waited - said_at >= SILENCE:
            said, said_at = result["waiting"], waited
            say(f"{said} ({waited:.0f} s)")
        result = call({**result["resume"], "waited": waited})
    return result
