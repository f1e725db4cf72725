#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: short_job
short_description: Run a short job and return its answer
author: mala.hpc_db contributors (@mala-project)
description:
  - Submits a job, waits until it has ended, and returns the JSON object in the last line of its output.
  - If the job is refused, does not start in time, or prints no answer, the module does not fail but returns the reason
    in RV(said).
extends_documentation_fragment:
  - mala.hpc_db.scheduler
  - mala.hpc_db.slices
attributes:
  check_mode:
    support: none
    description: Intended for jobs that change nothing.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  script:
    description: Absolute path of the job script.
    type: path
    required: true
  output:
    description: Absolute path of a file for its output. The file must not exist yet.
    type: path
    required: true
  options:
    description: Scheduler options in the format of M(mala.hpc_db.hosting_job).
    type: dict
    default: {}
  shorten:
    description:
      - If V(true), O(options) are those of a long job. The short job gets five minutes and 512 MB instead, and lacks
        the options that tie the long job to a node, a time or another job.
    type: bool
    default: false
  timeout:
    description: Seconds after which the job is cancelled.
    type: int
    default: 120
  listening:
    description:
      - File into which the job writes its host and port, separated by a space, once it listens there.
      - This host then tries to connect to the running job, and returns the result in RV(reached).
    type: path
seealso:
  - module: mala.hpc_db.hosting_job
"""

EXAMPLES = r"""
- name: Check from a compute node
  mala.hpc_db.short_job:
    name: hpc-db-doctor
    root: /home/alice/hpc_db/hpc_db
    script: /home/alice/look.sh
    output: /home/alice/look.out
    options:
      partition: defq
      time: "00:05:00"
  register: looked
"""

RETURN = r"""
answer:
  description: The JSON object that the job printed. V(null) if there is none.
  returned: success
  type: dict
reached:
  description: Whether this host could connect to the job. V(null) if the job did not write its host and port.
  returned: success
  type: bool
said:
  description: Reason for a missing answer in one line. Empty if there is an answer.
  returned: success
  type: str
"""

import json
import os
import socket
import time
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _slices
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_environment,
    check_name,
    find_jobs,
    make_run,
    submit_job,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS

# A shared file system may show the output after the scheduler has forgotten the job, NFS up to a minute later. Output
# without an answer is incomplete, or will never have one.
LATE_SECONDS = 65
SETTLED_SECONDS = 5
# A packet dropped by a firewall is sent again after 1 s and 3 s.
CONNECT_SECONDS = 5


def run_job(params: dict, run: Run, sleep: Callable[[float], None] = time.sleep) -> dict:
    """Submit the job and wait for its answer. ``run`` takes an argument list and returns its stdout."""
    check_name(params["name"])
    slice_ = _slices.Slice(params)
    door = _Door(params["listening"], slice_.resume.get("reached"))
    try:
        job_id = slice_.resume.get("job") or _submit(params, run)
        stuck = _wait(params, job_id, run, sleep, door, slice_)
    except (SchedulerError, ValueError) as error:
        return _result(None, " ".join(str(error).split()), door)
    if stuck:
        return _result(None, f"job {job_id} was {stuck} after {params['timeout']} s, and was cancelled", door)
    return _result(*_read(params["output"], job_id, sleep, door, slice_), door)


def _submit(params: dict, run: Run) -> str:
    """Submit the job; return its id."""
    scheduler = SCHEDULERS[params["scheduler"]]
    if params["shorten"]:
        params = {**params, "options": scheduler.short_options(params["options"])}
    scheduler.check_options(params["options"])
    check_environment(params, "server_job_options")
    jobs = find_jobs(params, run)  # refuses relative paths
    wishes = params["script"], params["options"], params["output"]
    return submit_job(params, run, scheduler.submit_command(params["name"], *wishes), jobs).id


class _Door:
    """The address on which the job listens, if it does."""

    def __init__(self, path: str | None, reached: bool | None) -> None:
        self.path = path
        self.reached = reached

    def knock(self) -> None:
        """Connect once, as soon as the job has written its address."""
        if self.path is None or self.reached is not None:
            return
        try:
            with open(self.path, encoding="utf-8") as stream:
                host, port = stream.read().split()
        except (FileNotFoundError, ValueError):  # not written yet, or only in part
            return
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            self.reached = True
        except (OSError, ValueError, OverflowError):
            self.reached = False


def _wait(
    params: dict, job_id: str, run: Run, sleep: Callable[[float], None], door: _Door, slice_: _slices.Slice
) -> str:
    """Wait for the job's end; on a timeout cancel it and return its state."""
    deadline = slice_.began + params["timeout"]
    pause = 0.2
    while True:
        door.knock()
        job = next((each for each in find_jobs(params, run) if each["id"] == job_id), None)
        if job is None:
            return ""
        state = f"{job['state']} ({job['reason']})" if job["reason"] else job["state"]
        if time.monotonic() >= deadline:
            run(SCHEDULERS[params["scheduler"]].cancel_command(job_id))
            return state
        told = f"{params['name']}: job {job_id} is {state}, {params['timeout']} s are allowed"
        slice_.check(told, job=job_id, reached=door.reached)
        sleep(pause)
        pause = min(2 * pause, 2.0)


def _read(
    path: str, job_id: str, sleep: Callable[[float], None], door: _Door, slice_: _slices.Slice
) -> tuple[dict | None, str]:
    """Return the answer in the output, or why there is none."""
    last = ""
    for second in range(slice_.resume.get("second", 0), LATE_SECONDS):
        last = _last_line(path)
        try:
            answer = json.loads(last)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer, ""
        if last and second >= SETTLED_SECONDS:
            break
        told = f"job {job_id} has ended, and {path} is not complete yet"
        slice_.check(told, job=job_id, reached=door.reached, second=second)
        sleep(1.0)
    return None, f"job {job_id} ended without a result: {last or 'it printed nothing'}"


def _last_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return (stream.read().strip().splitlines() or [""])[-1]
    except FileNotFoundError:
        return ""


def _result(answer: dict | None, said: str, door: _Door) -> dict:
    return {"changed": False, "answer": answer, "said": said, "reached": door.reached}


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            script={"type": "path", "required": True},
            output={"type": "path", "required": True},
            options={"type": "dict", "default": {}},
            shorten={"type": "bool", "default": False},
            timeout={"type": "int", "default": 120},
            listening={"type": "path"},
            **_slices.OPTIONS,
        ),
        supports_check_mode=False,
    )
    os.umask(0o077)  # sbatch passes it on to the job
    try:
        result = run_job(module.params, make_run(module))
    except _slices.Waiting as waiting:
        result = waiting.result()
    except ValueError as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
