#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: hosting_job
short_description: Submit or cancel the server job
author: mala.hpc_db contributors (@mala-project)
description:
  - Submits the server job unless a job of this name is already queued or running.
  - An existing job is left unchanged, even if O(options) or O(script) have changed since it was submitted. New options
    take effect with the next job.
  - A job that is ending (Slurm's state C(COMPLETING)) does not count as existing, so O(state=present) submits the
    next one. With C(dependency=singleton) in O(options), that job starts only after the old one has ended.
  - Options that the scheduler would refuse are refused before anything changes, with the scheduler's own message.
  - The scheduler's commands and the job get only a few variables of the login's environment, such as C(PATH) and
    C(SLURM_CONF). A variable such as C(SBATCH_ACCOUNT) is refused if it sets an option that O(options) do not
    contain.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
  - mala.hpc_db.slices
attributes:
  check_mode:
    support: full
    description:
      - In check mode C(sbatch --test-only) checks whether Slurm would accept the job. It also refuses a job while its
        nodes are down, drained or reserved, although a real submission would be queued. In this case the module does
        not fail, but warns and lists these nodes.
  diff_mode:
    support: full
    description: Shows the job that is submitted or cancelled.
options:
  placement:
    description:
      - V(job) submits a job for the server.
      - V(workers) submits none, because the server runs in the workers' jobs. Queued server jobs are cancelled; a
        running one serves until a worker's job takes over. O(state=absent) then stops the server, but no worker's job,
        and no worker's job starts it again before the next O(state=present).
    type: str
    choices: [job, workers]
    default: job
  state:
    description:
      - V(present) ensures that one job is queued or running.
      - V(absent) cancels all jobs of this name, including a queued successor, and waits until they have ended. The
        script of a running job has 30 s to end before the scheduler ends all its processes. If a job's node has died,
        the endpoint that it left behind is removed.
    type: str
    choices: [present, absent]
    default: present
  script:
    description:
      - Absolute path of the job script.
      - Required for O(state=present).
    type: path
  output:
    description:
      - Absolute path of the file to which the job's output is appended. It is taken literally, so C(%j) is not replaced
        by a job ID. Its folder must exist.
      - Required for O(state=present).
    type: path
  options:
    description:
      - Options of C(sbatch) under their long names without dashes, such as C(partition), C(mem) or C(time), or of
        the corresponding command of O(scheduler).
      - V(true) passes the bare flag. V(false) and V(null) omit it.
      - Times need quotes. YAML reads a bare C(72:00:00) as the number 259200, which Slurm would read as minutes, so it
        is refused.
      - C(mem) and similar options are in MB, or have a suffix C(K), C(M), C(G) or C(T).
      - A C(time) above the limit of the C(partition) is refused, because Slurm would accept the job and never start
        it. With a C(qos), which may raise the limit, it is not refused.
      - Job name, output, arrays, and options that make C(sbatch) wait cannot be set.
      - Not used by O(scheduler=local).
    type: dict
    default: {}
  memory:
    description:
      - The memory of the job, such as V(16G), unless O(options) set it. With this option the job gets all options that
        the server job needs; those in O(options) take precedence. The job starts only if no other one of its name runs
        (C(dependency=singleton)). It gets a signal before its walltime. It is requeued after a failure of its node only
        with O(chain=false).
    type: str
  notice:
    description: Seconds before the walltime at which the job gets the signal. Used with O(memory).
    type: int
    default: 120
  chain:
    description: Whether the job submits its successor. Used with O(memory).
    type: bool
    default: true
  timeout:
    description: Maximum time in seconds that O(state=absent) waits until the job has ended. Then it fails.
    type: int
    default: 60
seealso:
  - module: mala.hpc_db.hosting_job_info
  - module: mala.hpc_db.server_wait
"""

EXAMPLES = r"""
- name: Ensure the server job is in the queue
  mala.hpc_db.hosting_job:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
    script: /home/alice/hpc_db/hpc_db/host/job.sh
    output: /home/alice/hpc_db/hpc_db/log/job.log
    options:
      partition: defq
      mem: 16G
      time: "72:00:00"
      dependency: singleton

- name: Stop the server job and wait until it has ended
  mala.hpc_db.hosting_job:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
    state: absent
    timeout: 120

- name: Run the server on this machine without a scheduler
  mala.hpc_db.hosting_job:
    name: hpc-db
    scheduler: local
    root: /home/alice/hpc_db/hpc_db
    script: /home/alice/hpc_db/hpc_db/host/job.sh
    output: /home/alice/hpc_db/hpc_db/log/job.log
"""

RETURN = r"""
job:
  description:
    - The job at the end of the module. V(null) if there is none, as after O(state=absent).
    - In check mode, the current job.
  returned: success
  type: dict
  contains:
    id:
      description: Job ID of the scheduler. With O(scheduler=local), the PID.
      type: str
    name:
      description: Job name.
      type: str
    state:
      description: State in Slurm's terms, such as V(PENDING), V(RUNNING) or V(COMPLETING).
      type: str
    node:
      description: Node of the job. Empty if it is not running.
      type: str
    reason:
      description: The scheduler's reason why the job is not running. Empty if there is none.
      type: str
    time_left:
      description: Remaining walltime in seconds; before the start, the whole walltime. V(null) without a limit.
      type: int
    time_limit:
      description: Walltime in seconds. V(null) without a limit.
      type: int
    placement:
      description: V(workers) if it is a worker's job that runs the server, else V(job).
      type: str
  sample:
    id: "4711"
    name: hpc-db
    state: PENDING
    node: ""
    reason: Resources
    time_left: 259200
    time_limit: 259200
    placement: job
submitted:
  description: ID of the job that the module has submitted, which may have ended already. V(null) if it submitted none.
  returned: success
  type: str
outage:
  description: Start, reason and expected length of the outage at the end of the running job, in one line; empty if
    none is expected.
  returned: success
  type: str
endpoint:
  description: Endpoint of the server in the format of M(mala.hpc_db.hosting_job_info). V(null) unless it is live.
  returned: success
  type: dict
"""

import json
import os
import pathlib
import sys
import time
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _slices
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    Submitted,
    check_environment,
    check_name,
    find_jobs,
    judge_job,
    make_run,
    submit_job,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host import outlook
from ansible_collections.mala.hpc_db.plugins.module_utils.host.candidate import FOLLOWS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.endpoint import (
    forget_successor,
    read_endpoint,
    serving_job,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json, write_state
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.scheduler import LEAVING
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS

# Runs "look" or "withdraw" of the supervisor's program for the endpoint; returns whether there is or was an endpoint.
Endpoint = Callable[[str], bool]

# Seconds that a job has to end when asked, for running transactions and a checkpoint.
GENTLE_SECONDS = 30


def ensure_job(params: dict, run: Run, check_mode: bool, endpoint: Endpoint = lambda _verb: False) -> dict:
    """Bring the job to the wanted state. ``run`` takes an argument list and returns its stdout."""
    check_name(params["name"])
    params = {**params, "options": _all_options(params)}
    SCHEDULERS[params["scheduler"]].check_options(params["options"])
    wanted = params["state"] == "present"
    # First of all, so that no worker's job starts the server after the look at the jobs.
    forbids = not wanted and _allow_workers(params, False, check_mode)
    published = read_endpoint(Layout(params["root"]))
    jobs = find_jobs(params, run)
    said: list[str] = []
    own = [job for job in jobs if job["placement"] == "job"]
    slice_ = _slices.Slice(params)
    if wanted and params["placement"] == "workers":
        return _leave_to_workers(params, run, jobs, check_mode)
    changed = wanted != any(job["state"] != LEAVING for job in (own if wanted else jobs))
    diff = {"before": {"jobs": _shown(jobs)}, "after": {"jobs": _shown(jobs) if wanted else []}}
    changed, diff = slice_.resume.get("changed", changed), slice_.resume.get("diff", diff)
    changed |= forbids and params["placement"] == "workers"
    if wanted:
        _allow_workers(params, True, check_mode)
    if changed and wanted:
        said += _check_submission(params, run, check_mode)
        diff["after"]["jobs"].append({"script": params["script"], "options": params["options"]})
    submitted = None
    if changed and wanted and not check_mode:
        if params["scheduler"] == "local":
            _take_from_workers(params, run, jobs)
        _create_files(Layout(params["root"]))
        try:
            new = _submit(params, run, own)
        except (SchedulerError, OSError, ValueError):
            forget_successor(Layout(params["root"]))
            raise
        submitted, said = new.id, [*said, *filter(None, [new.said])]
        jobs = find_jobs(params, run)
    elif not wanted:
        try:
            rest = jobs if check_mode else _clear_queue(params, run, jobs, slice_)
        except _slices.Waiting as waiting:
            waiting.resume.update(changed=changed, diff=diff)
            raise
        # A job on a dead node cannot withdraw its endpoint; any other job has done so when it ends.
        changed |= endpoint("look" if check_mode else "withdraw")
        if rest and not check_mode:
            hint = "; if its candidate has died, end that job" if rest[0]["placement"] == "workers" else ""
            raise SchedulerError(f"{params['name']} has not ended after {params['timeout']} s: {_in_words(rest)}{hint}")
        jobs = rest
    serving = serving_job(published, jobs)
    job = serving or next(iter(jobs), None)
    return {
        "changed": changed, "job": job, "endpoint": published if serving else None, "diff": diff, "warnings": said,
        "submitted": submitted, "outage": outlook.look(Layout(params["root"]), serving),
    }


def _leave_to_workers(params: dict, run: Run, jobs: list[dict], check_mode: bool) -> dict:
    """Let the workers' jobs run the server: cancel the server jobs that wait. One that runs is asked by a worker's."""
    layout = Layout(params["root"])
    scheduler = SCHEDULERS[params["scheduler"]]
    waiting = [job for job in jobs if job["placement"] == "job" and job["state"] == "PENDING"]
    rest = [job for job in jobs if job not in waiting]
    changed = _allow_workers(params, True, check_mode) or bool(waiting)
    for job in [] if check_mode else waiting:
        run(scheduler.cancel_waiting_command(job["id"]))
    if changed and not check_mode and os.path.isdir(layout.run):
        if not os.path.exists(layout.endpoint):
            write_state(layout.endpoint, {})
        state = read_json(layout.state) or {}
        write_state(layout.state, {**state, "follows": FOLLOWS, "failures": []})
    published = read_endpoint(layout)
    serving = serving_job(published, rest)
    return {
        "changed": changed, "job": serving or next(iter(rest), None), "endpoint": published if serving else None,
        "diff": {"before": {"jobs": _shown(jobs)}, "after": {"jobs": _shown(rest)}}, "submitted": None, "outage": "",
    }


def _take_from_workers(params: dict, run: Run, jobs: list[dict]) -> None:
    """Stop a server beside workers. Where a job has to wait in a queue, it asks that server itself when it runs."""
    limit = time.monotonic() + params["timeout"]
    _allow_workers(params, False, check_mode=False)
    while any(job["placement"] == "workers" for job in jobs):
        if time.monotonic() >= limit:
            raise SchedulerError(f"{params['name']} has not ended after {params['timeout']} s: {_in_words(jobs)}")
        time.sleep(0.5)
        jobs = find_jobs(params, run)


def _allow_workers(params: dict, allowed: bool, check_mode: bool) -> bool:
    """Allow the workers' jobs to start the server, or forbid it; return whether that is a change."""
    layout = Layout(params["root"])
    if params["placement"] == "job" and not os.path.exists(layout.wanted):
        return False  # the server was never in a worker's job
    before = read_json(layout.wanted) or {}
    failed = allowed and bool((read_json(layout.state) or {}).get("failures"))
    if bool(before.get("wanted")) == allowed and not failed:
        return False
    if not check_mode and os.path.isdir(layout.run):
        write_state(layout.wanted, {"wanted": allowed})
    return True


def _all_options(params: dict) -> dict:
    """Return the job's options; if its memory is given, with the options that a server job needs."""
    if params.get("memory") is None:
        return params["options"]
    needs = params["name"], params["memory"], params["notice"], params["chain"]
    return SCHEDULERS[params["scheduler"]].server_options(params["options"], *needs)


def _create_files(layout: Layout) -> None:
    """Create the files that others read while they wait, since hosts cache the absence of a file for a minute."""
    if not os.path.isdir(layout.run):
        return
    if not os.path.exists(layout.endpoint):
        write_state(layout.endpoint, {})
    # Before the submission: once the job runs, it owns the file.
    told = {"id": "", "told": f"server job submitted at {time.strftime('%Y-%m-%d %H:%M')}"}
    write_state(layout.state, {**(read_json(layout.state) or {}), "follows": told})


def _submit(params: dict, run: Run, jobs: list[dict]) -> Submitted:
    """Submit the job."""
    wishes = params["script"], params["options"], params["output"]
    command = SCHEDULERS[params["scheduler"]].submit_command(params["name"], *wishes)
    try:
        return submit_job(params, run, command, jobs)
    except SchedulerError as error:
        raise SchedulerError(f"server_job_options: {command[0]} says: {error}") from None


def _check_submission(params: dict, run: Run, check_mode: bool) -> list[str]:
    """Raise the errors that a submission would raise; a real one gets them from sbatch. Return warnings."""
    scheduler = SCHEDULERS[params["scheduler"]]
    check_environment(params, "server_job_options")
    limit = scheduler.limit_command(params["options"])
    if limit:
        scheduler.check_limit(run(limit), params["options"])
    check = scheduler.check_command(params["name"], params["options"]) if check_mode else None
    return judge_job(params, run, check, "server_job_options") if check else []


def _clear_queue(params: dict, run: Run, jobs: list[dict], slice_: _slices.Slice) -> list[dict]:
    """Cancel all jobs of the name, including a successor submitted meanwhile; return the jobs that have not ended."""
    began, asked = slice_.began, set(slice_.resume.get("asked", []))
    deadline = began + params["timeout"]
    pause = 0.1
    while jobs:
        # The last job in the queue first, otherwise a successor starts when its predecessor ends.
        for job in reversed(jobs):
            gently = time.monotonic() < began + GENTLE_SECONDS and (job["state"] == "RUNNING" or job["id"] in asked)
            if job["placement"] == "job" and job["state"] != LEAVING and not (gently and job["id"] in asked):
                _cancel(params, run, job["id"], gently)
                asked.update([job["id"]] if gently else [])
        if time.monotonic() >= deadline:
            return jobs
        told = f"{params['name']} was told to end, {params['timeout']} s are allowed: {_in_words(jobs)}"
        slice_.check(told, asked=list(asked))
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
        jobs = find_jobs(params, run)
    for job_id in asked:
        _wish_path(params, job_id).unlink(missing_ok=True)
    return jobs


def _cancel(params: dict, run: Run, job_id: str, gently: bool) -> None:
    """Cancel a job, or ask it to end. With some schedulers it is an error if the job has already ended."""
    scheduler = SCHEDULERS[params["scheduler"]]
    command = scheduler.ask_command(job_id) if gently else scheduler.cancel_command(job_id)
    try:
        if command:
            run(command)
        else:
            write_state(str(_wish_path(params, job_id)), {"stop": True})
    except (OSError, SchedulerError):
        if job_id in {job["id"] for job in find_jobs(params, run)}:
            raise


def _wish_path(params: dict, job_id: str) -> pathlib.Path:
    """Return the file that asks the supervisor to end, for schedulers that can only kill a job."""
    return pathlib.Path(Layout(params["root"]).stop_request(job_id))


def _in_words(jobs: list[dict]) -> str:
    return ", ".join(f"{job['id']} {job['state']}{' on ' if job['node'] else ''}{job['node']}" for job in jobs)


def _shown(jobs: list[dict]) -> list[dict]:
    """Return the part of the jobs that the diff shows: without values that change by themselves."""
    return [{"id": job["id"], "state": job["state"]} for job in jobs]


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            placement={"type": "str", "choices": ["job", "workers"], "default": "job"},
            state={"type": "str", "choices": ["present", "absent"], "default": "present"},
            script={"type": "path"},
            output={"type": "path"},
            options={"type": "dict", "default": {}},
            memory={"type": "str"},
            notice={"type": "int", "default": 120},
            chain={"type": "bool", "default": True},
            timeout={"type": "int", "default": 60},
            **_slices.OPTIONS,
        ),
        required_if=[("state", "present", ("script", "output"))],
        supports_check_mode=True,
    )
    os.umask(0o077)  # sbatch passes it on to the job, whose log must not be readable by others

    def endpoint(verb: str) -> bool:
        host = Layout(module.params["root"]).host
        command = [sys.executable, "-m", "hpc_db_host.endpoint", verb, module.params["name"]]
        if not os.path.isdir(host):
            return False
        returncode, stdout, stderr = module.run_command(
            command, cwd=host, ignore_invalid_cwd=False, expand_user_and_vars=False
        )
        if returncode:
            raise OSError(f"the endpoint is not withdrawn: {' '.join(stderr.split())}")
        return json.loads(stdout or "false")  # an older supervisor prints nothing

    try:
        result = ensure_job(module.params, make_run(module), module.check_mode, endpoint)
    except _slices.Waiting as waiting:
        result = waiting.result()
    except (OSError, SchedulerError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    for warning in result.pop("warnings", []):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
