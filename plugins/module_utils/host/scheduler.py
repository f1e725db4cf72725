# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the scheduler's commands; check for the server job whether a job has ended and whether a successor is queued."""

import contextlib
import os
import re
import signal
import subprocess
from typing import Dict, List, Optional

from .schedulers import SCHEDULERS

# Colours and cursor movements in the output: escape sequences, and control characters except tab and newline.
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])|[\x00-\x08\x0b-\x1f\x7f]"
)
# Time limits in seconds for a query about one job, and for any other command.
STATE_TIMEOUT = 60
TIMEOUT = 120
# The state of a job that is ending, which cannot be reversed.
LEAVING = "COMPLETING"


def own_job(name: str) -> str:
    """Return the id of the job in which this program runs; empty if this scheduler has not started it."""
    scheduler = SCHEDULERS.get(name)
    return os.environ.get(scheduler.job_variable, "") if scheduler and scheduler.job_variable else ""


def job_has_ended(name: str, bin_dir: str, job: str) -> bool:
    """Return whether the scheduler reports that ``job`` has ended; False if that is unknown."""
    scheduler = SCHEDULERS.get(name)
    command = scheduler.state_command(job) if scheduler and job else None
    if not scheduler or not command:
        return False
    try:
        answer = run(name, bin_dir, command, STATE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return scheduler.has_ended(answer.returncode, answer.stdout, answer.stderr)


def run(name: str, bin_dir: str, command: List[str], timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run one of the scheduler's commands, which are in ``bin_dir`` unless that is empty."""
    bin_dir = os.path.expanduser(bin_dir)
    environment = SCHEDULERS[name].environment(os.environ, bin_dir)
    return call([os.path.join(bin_dir, command[0])] + command[1:], environment, timeout)


def call(
    command: List[str], environment: Dict[str, str], timeout: float, cwd: Optional[str] = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command with exactly these variables; after the timeout, kill all of its processes."""
    with subprocess.Popen(
        command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", errors="replace", start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, ESCAPES.sub("", stdout), ESCAPES.sub("", stderr))


class Queue:
    """The queue as the server job uses it: to have a successor when its walltime ends."""

    def __init__(self, settings: dict, job: str) -> None:
        self._settings = settings
        self._job = job
        self._scheduler = SCHEDULERS[settings["scheduler"]]

    def ensure_successor(self) -> str:
        """Submit a successor unless one is queued; return one line with its id."""
        jobs = self._jobs()
        # A listing without this job is filtered or empty: it does not show whether a successor is queued.
        listed = self._job in [job["id"] for job in jobs]
        if not listed and not job_has_ended(self._settings["scheduler"], self._settings["bin_dir"], self._job):
            raise OSError("%s does not list job %s, although it is running" % (
                self._scheduler.queue_command()[0], self._job))
        others = self._others(jobs)
        if others:
            return "job %s follows" % others[0]
        return "job %s follows" % self._submit(self.successor_command())

    def successor_command(self) -> List[str]:
        """Return the call that submits the successor."""
        wanted = self._settings["successor"]
        if isinstance(wanted, list):  # written by a release before 0.2
            return wanted
        name, notice = self._settings["job_name"], self._settings["stop_notice"]
        options = self._scheduler.server_options(wanted["options"], name, wanted["memory"], notice, True)
        return self._scheduler.submit_command(name, wanted["script"], options, wanted["output"])

    def _submit(self, command: List[str]) -> str:
        """Submit a job of our name; return its id from the queue, since sites may print other text around it."""
        printed = self._run(command)
        found: List[str] = []
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = self._others(self._jobs())
        job = found[0] if found else self._scheduler.parse_submit(printed)
        if not job:
            raise OSError("%s printed no job id (%s), and no job %s is in the queue" % (
                command[0], " ".join(printed.split()) or "nothing at all", self._settings["job_name"]))
        return job

    def cancel_successors(self) -> None:
        """Cancel the waiting jobs of our name: they would fail for the same reason."""
        for job in self._others(self._jobs()):
            self._run(self._scheduler.cancel_waiting_command(job))

    def _jobs(self) -> List[dict]:
        """Return the jobs that are not about to end; raise OSError if the output is not a list of jobs."""
        try:
            jobs = self._scheduler.parse_queue(self._run(self._scheduler.queue_command()))
        except ValueError as error:
            raise OSError(str(error)) from None
        return [job for job in jobs if job["state"] != LEAVING]

    def _others(self, jobs: List[dict]) -> List[str]:
        return [job["id"] for job in jobs if job["name"] == self._settings["job_name"] and job["id"] != self._job]

    def _run(self, command: List[str]) -> str:
        """Run one of the scheduler's commands and return its output; raise OSError with its error message."""
        done = run(self._settings["scheduler"], self._settings["bin_dir"], command, TIMEOUT)
        if done.returncode:
            raise OSError("%s: %s" % (command[0], " ".join((done.stderr or done.stdout).split())))
        return done.stdout
