# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shared by the modules about the server job: how to call the scheduler, and how to find the job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.lease import Lease
from ansible_collections.mala.hpc_db.plugins.module_utils.host.scheduler import LEAVING, TIMEOUT, call
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import Scheduler

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

Run = Callable[[list], str]

ARGUMENT_SPEC = {
    "name": {"type": "str", "required": True},
    "root": {"type": "path", "required": True},
    "scheduler": {"type": "str", "choices": list(SCHEDULERS), "default": "slurm"},
    "bin_dir": {"type": "path"},
}


class SchedulerError(Exception):
    """A command of the scheduler failed; the text is its own message."""


def make_run(module: AnsibleModule, params: dict | None = None) -> Run:
    """Return a function that takes an argument list and returns its stdout.

    ``params`` name the scheduler as ARGUMENT_SPEC does; the default are the module's own.
    """
    params = params or module.params
    local = params["scheduler"] == "local"
    bin_dir = None if local else params["bin_dir"]
    host = Path(Layout(params["root"]).host)  # all later jobs are submitted from here
    cwd = next(folder for folder in (host, *host.parents) if os.access(folder, os.X_OK))
    environment = SCHEDULERS[params["scheduler"]].environment(os.environ, bin_dir or "")

    def run(command: list) -> str:
        program = os.path.join(bin_dir, command[0]) if bin_dir else command[0]
        try:
            done = call([program, *command[1:]], environment, TIMEOUT, str(cwd))
        except subprocess.TimeoutExpired:
            raise SchedulerError(f"{program} has not answered within {TIMEOUT} s") from None
        except OSError as error:
            hint = "" if local else "; set server_bin_dir to the folder that contains the scheduler's commands"
            raise SchedulerError(f"{program}: {error.strerror}{hint}") from error
        if done.returncode:
            words = [line.strip() for line in (done.stderr.strip() or done.stdout.strip()).splitlines()]
            raise SchedulerError("; ".join(words) or f"{program} ended with {done.returncode}")
        return done.stdout

    return run


def check_environment(params: dict, setting: str) -> None:
    """Raise ValueError for an option set only by the login's environment; ``setting`` is the setting to use instead."""
    SCHEDULERS[params["scheduler"]].check_environment(os.environ, params["options"], setting)


def check_name(name: str) -> None:
    """Raise ValueError for a name that squeue, a file system or a shell could misinterpret."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name: {name!r} is not allowed; letters, digits, '.', '_' and '-', a letter or digit first")


def find_jobs(params: dict, run: Run) -> list[dict]:
    """Return this user's jobs with exactly this name, and the worker's job that serves; the most relevant one first."""
    for option in ("root", "bin_dir", "script", "output"):
        if params.get(option) is not None and not os.path.isabs(params[option]):
            raise ValueError(f"{option}: {params[option]!r} is not absolute; give a path that begins with / or ~")
    scheduler = SCHEDULERS[params["scheduler"]]
    program = Layout(params["root"]).package
    if params["scheduler"] == "local" and not os.path.isdir(program):
        return []  # the supervisor is not installed, so no job was ever started
    holder = serving_worker(Layout(params["root"]))
    jobs = scheduler.parse_queue(run(scheduler.queue_command("" if holder else params["name"])))
    found = [
        {**job, "placement": "workers" if job["id"] == holder else "job"}
        for job in jobs if params["name"] == job["name"] or job["id"] == holder
    ]
    return sorted(found, key=_weight)


def serving_worker(layout: Layout) -> str:
    """Return the id of the worker's job that holds the lease; empty if none does."""
    lease = Lease(layout.run, {"pid": os.getpid()}, lambda _holder: False)
    try:
        holder = lease.holder() or {}
    except OSError:
        return ""  # there is no instance yet
    return holder.get("job", "") if holder.get("placement") == "workers" else ""


def judge_job(params: dict, run: Run, command: list, setting: str) -> list[str]:
    """Let the scheduler check a job without submitting it. Raise its refusal; return why the job would have to wait."""
    scheduler = SCHEDULERS[params["scheduler"]]
    try:
        run(command)
        return []
    except SchedulerError as error:
        refused = SchedulerError(f"{setting}: {command[0]} says: {error}")
        question = scheduler.unavailable_command(str(error))
    try:
        nodes = scheduler.parse_unavailable(run(question), params["options"]) if question else ""
    except SchedulerError:
        nodes = ""
    if not nodes:
        raise refused
    return [f"{refused}; this is temporary, so the job is queued and waits: {nodes}"]


class Submitted(NamedTuple):
    """A job that was just submitted; ``said`` is a message for the user if its id could not be read."""

    id: str
    said: str


def submit_job(params: dict, run: Run, command: list, known: Iterable[dict]) -> Submitted:
    """Submit a job of the name, in addition to those that are ``known``.

    Its id is read from the queue: a site's sbatch may print any text around it, even other numbers.
    """
    before = {job["id"] for job in known}

    def find_new() -> dict | None:
        new = (job for job in find_jobs(params, run) if job["id"] not in before and job["placement"] == "job")
        return next(new, None)

    try:
        printed = run(command)
    except SchedulerError as error:
        try:
            job = find_new()
        except (SchedulerError, ValueError):
            job = None
        if job:
            raise SchedulerError(f"{error}; but job {job['id']} ({params['name']}) is in the queue") from None
        raise
    told = SCHEDULERS[params["scheduler"]].parse_submit(printed)
    words = f"{command[0]} printed no job id: {' '.join(printed.split())!r}"
    try:
        job = find_new()
    except (SchedulerError, ValueError) as error:
        if not told:
            raise SchedulerError(f"{words}, and the queue cannot be read: {error}") from None
        job = None
    if job and not told:
        return Submitted(job["id"], f"{words}; job {job['id']}, found by its name {params['name']}, is in the queue")
    if job or told:
        return Submitted(job["id"] if job else str(told), "")
    raise SchedulerError(f"{words}, and no new job of the name {params['name']} is in the queue")


def find_idle_nodes(params: dict, run: Run) -> list[str]:
    """Return the nodes on which this user has no job of any name."""
    scheduler = SCHEDULERS[params["scheduler"]]
    command = scheduler.all_nodes_command()
    if command is None:
        return []
    used = {job.nodes for job in scheduler.parse_jobs(run(scheduler.jobs_command([])))}
    return sorted(set(scheduler.parse_nodes(run(command))) - hosts_of(scheduler, used, run))


def hosts_of(scheduler: Scheduler, nodes: Iterable[str], run: Run) -> set[str]:
    """Return the single nodes of node lists such as c[1-3]; raise ValueError if the answer contains none."""
    written = ",".join(sorted(filter(None, nodes)))
    if not written:
        return set()
    command = scheduler.nodes_command(written)
    printed = run(command) if command else written
    found = set(scheduler.parse_hosts(printed))
    if not found:
        raise ValueError(f"no nodes of {written} in what was printed: {printed.strip()[:200]!r}")
    return found


def _weight(job: dict) -> tuple:
    """Sort key: a running job first, then its successor, and last a predecessor that is still ending."""
    return {"RUNNING": 0, "CONFIGURING": 1, LEAVING: 3}.get(job["state"], 2), len(job["id"]), job["id"]
