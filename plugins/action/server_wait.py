# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Callable

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import ARGUMENT_SPEC
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0
SILENCE = 30.0
# A scheduler may sometimes be too busy to answer; the third failure in a row is an error.
MISSES = 3


class WaitFailed(Exception):
    """The server will not answer, or has not answered in time."""

    def __init__(self, message: str, log_tail: list[str] | None = None) -> None:
        super().__init__(message)
        self.log_tail = log_tail


class ActionModule(ActionBase):  # type: ignore[misc]
    """Wait until the job's server answers, and show the progress."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = dict(super().run(tmp, task_vars), changed=False, endpoint=None)
        options = {"timeout": {"type": "int", "default": 600}, "job": {"type": "str"}}
        params = self.validate_argument_spec(dict(ARGUMENT_SPEC, **options))[1]
        if self._task.check_mode:
            return result
        # Not ``params``, in which ~ is already expanded to a home on the controller.
        module_args = {key: value for key, value in self._task.args.items() if key not in options}
        host = (task_vars or {}).get("inventory_hostname", "")

        def look() -> dict:
            return self._execute_module(
                module_name="mala.hpc_db.hosting_job_info", module_args=module_args, task_vars=task_vars
            )

        def say(line: str) -> None:
            Display().display(printable(f"[{host}] {params['name']}: {line}"))

        try:
            is_hopeless = SCHEDULERS[params["scheduler"]].is_hopeless
            known = {params["job"]} if params["job"] else set()
            result["endpoint"] = wait_for_server(look, say, params["timeout"], is_hopeless, known=known)
        except WaitFailed as failed:
            result.update(failed=True, msg=printable(f"{params['name']}: {failed}"), log_tail=failed.log_tail)
        return result


def wait_for_server(
    look: Callable[[], dict], say: Callable[[str], None], timeout: float, is_hopeless: Callable[[str], bool],
    clock: Any = time, known: Iterable[str] = (),
) -> dict:
    """Return the endpoint as soon as the running job's server answers, or raise WaitFailed.

    ``known`` are ids of jobs that may have ended before the wait.
    """
    start = clock.monotonic()
    pause, misses, said, said_at = FIRST_PAUSE, 0, "", start
    seen = set(known)
    while True:
        found = look()
        waited = clock.monotonic() - start
        if found.get("failed"):
            misses += 1
            status = found.get("msg", "no answer")
            if misses == MISSES:
                raise WaitFailed(status)
        else:
            misses = 0
            endpoint = found["endpoint"]
            if endpoint:
                say(f"serving on {endpoint['host']}:{endpoint['port']} after {waited:.0f} s")
                return endpoint
            if found["job"]:
                seen.add(found["job"]["id"])
            trouble = why_hopeless(found, seen, is_hopeless)
            if trouble:
                raise WaitFailed(trouble, found["log_tail"])
            status = describe(found)
        if waited >= timeout:
            raise WaitFailed(f"{status}, no server after {timeout} s; it stays queued: playbooks/status.yml")
        if status != said or clock.monotonic() - said_at >= SILENCE:
            say(f"{status}, {waited:.0f} s of at most {timeout} s")
            said, said_at = status, clock.monotonic()
        clock.sleep(min(pause, max(timeout - waited, 0)))
        pause = min(1.5 * pause, LONGEST_PAUSE)


def why_hopeless(found: dict, seen: set, is_hopeless: Callable[[str], bool]) -> str | None:
    """Return why further waiting is pointless, or None. ``seen`` are the ids of the jobs found during the wait."""
    job, state = found["job"], found["state"] or {}
    # Ignore the state of an earlier job, and this job's state from before it was requeued.
    own = state.get("job") in seen and not (job and job["state"] == "PENDING")
    if own and state.get("state") == "failed":
        return f"failed: {state.get('reason')}"
    if not job:
        last_words = f" ({state.get('reason')})" if own else ""
        return f"the job is not in the queue{last_words}; its log may show the reason"
    if job["state"] == "PENDING" and is_hopeless(job["reason"]):
        return (
            f"job {job['id']} can never start with these options ({job['reason']}); "
            "stop it with playbooks/stop.yml, change server_job_options and start again"
        )
    return None


def describe(found: dict) -> str:
    """Return the job's state in a few words."""
    job, state = found["job"], found["state"] or {}
    words = job["state"]
    if job["reason"]:
        words += f" ({job['reason']})"
    if job["node"]:
        words += f" on {job['node']}"
    if state.get("job") == job["id"] and job["state"] == "RUNNING":
        words += f", {state.get('state')}: {state.get('reason')}"
    return words
