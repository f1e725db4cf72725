# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record the duration of each task of a play, for bench/provision.py; not a part of the collection."""

from __future__ import annotations

import json
import os
import resource
import time
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: profile
type: aggregate
short_description: What each task takes
description: Writes wall and CPU seconds of each task into the file that E(HPC_DB_PROFILE) names, as JSON.
"""

# Actions that run only on the controller.
STAY = {
    f"ansible.builtin.{name}" for name in ("assert", "fail", "include_role", "include_tasks", "validate_argument_spec")
} | {"mala.hpc_db.show"}


class CallbackModule(CallbackBase):  # type: ignore[misc]
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "profile"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._tasks: list[dict[str, Any]] = [{"name": "start-up", "there": False}]
        self._since = (0.0, 0.0)
        self._began = time.time()
        self._goes_there = False

    def _next(self, name: str) -> None:
        self._end()
        self._tasks.append({"name": name, "there": False})

    def _end(self) -> None:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        now = (time.time() - self._began, sum(each.ru_utime + each.ru_stime for each in used))
        self._tasks[-1].update(wall=now[0] - self._since[0], cpu=now[1] - self._since[1])
        self._since = now

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self._next(task.get_name())
        self._goes_there = task.action not in STAY

    def v2_playbook_on_include(self, included_file: Any) -> None:
        self._next(f"read {os.path.basename(included_file._filename)}")

    def v2_runner_on_ok(self, result: Any) -> None:
        self._tasks[-1]["there"] = self._goes_there

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self.v2_runner_on_ok(result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._end()
        with open(os.environ["HPC_DB_PROFILE"], "w", encoding="utf-8") as stream:
            json.dump(self._tasks, stream, indent=1)
