# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scheduler as seen from inside the job: has another job ended, and does one follow us?

What the commands of one scheduler are is in scheduler_NAME.py, NAME being the setting server_scheduler. Each has

    JOB_VARIABLE                             the variable that tells a job its own id
    environment(variables, bin_dir)          the variables for the scheduler's commands, chosen from these by name
    state_command(job)                       the call that asks about a job
    has_ended(returncode, stdout, stderr)    what it answers: True if the job has left its node for good; else, and
                                             for an answer that says nothing, False
    queue_command()                          the call that lists this user's jobs
    parse_queue(stdout)                      id and name of each that waits or runs, and is not on its way out;
                                             OSError if that is no listing
    parse_submit(stdout)                     the id of a job in what a submission has printed; None if there is none
    cancel_command(job)                      the call that cancels a job that waits

A machine without a scheduler has no such file.
"""

import contextlib
import importlib
import os
import re
import signal
import subprocess
from types import ModuleType
from typing import Dict, List, Optional, Sequence, Tuple

# The variables that every scheduler's commands are given. All others stay out: SQUEUE_PARTITION in a .bashrc hides
# jobs, and inside a job there are variables that describe that job. plugins/module_utils/_environment.py has the same.
INHERITED = ("HOME", "KRB5CCNAME", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TZ", "USER")
# Whatever colours an answer or moves the cursor: escape sequences, and all control characters but tab and newline.
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])|[\x00-\x08\x0b-\x1f\x7f]"
)


def adapter(name: str) -> Optional[ModuleType]:
    """Return what speaks to the scheduler of that name; None if nothing here does."""
    if not re.match(r"[a-z]+$", name):
        return None
    try:
        return importlib.import_module("%s.scheduler_%s" % (__package__, name))
    except ImportError:
        return None


def build_environment(variables: Dict[str, str], names: Sequence[str]) -> Dict[str, str]:
    """Return what a scheduler's commands, and so its jobs, get of ``variables``; ``names`` are the scheduler's own."""
    kept = {name: variables[name] for name in (*INHERITED, *names) if name in variables}
    return dict(kept, LC_ALL="C.UTF-8")  # their words are read here


def own_job(name: str) -> str:
    """Return the id of the job that we run in; empty if the scheduler has not started us."""
    spoken = adapter(name)
    return os.environ.get(spoken.JOB_VARIABLE, "") if spoken else ""


def job_has_ended(name: str, bin_dir: str, job: str) -> bool:
    """Tell whether the scheduler says that ``job`` has ended. Unknown is False."""
    spoken = adapter(name)
    if not spoken or not job:
        return False
    try:
        asked = call(spoken, bin_dir, spoken.state_command(job), 60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return spoken.has_ended(asked.returncode, asked.stdout, asked.stderr)


def call(
    spoken: ModuleType, bin_dir: str, command: List[str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run one of the scheduler's commands; after the time-out nothing is left of it, not even what it has started."""
    bin_dir = os.path.expanduser(bin_dir)
    with subprocess.Popen(
        [os.path.join(bin_dir, command[0])] + command[1:], env=spoken.environment(dict(os.environ), bin_dir),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(
        command, process.returncode, ESCAPES.sub("", stdout), ESCAPES.sub("", stderr)
    )


class Queue:
    """What the hosting job itself asks of the scheduler: its successor, so that a walltime is not the end."""

    def __init__(self, settings: dict, job: str) -> None:
        self._settings = settings
        self._job = job
        self._adapter = importlib.import_module("%s.scheduler_%s" % (__package__, settings["scheduler"]))

    def ensure_successor(self) -> str:
        """Have one job of our name queued behind us; return what was done, in one line."""
        jobs = self._jobs()
        bin_dir = self._settings.get("bin_dir", "")
        # A listing without this job is filtered or empty: it does not show whether a successor is queued.
        listed = self._job in [job for job, _name in jobs]
        if not listed and not job_has_ended(self._settings["scheduler"], bin_dir, self._job):
            raise OSError("%s does not list job %s, which runs" % (self._adapter.queue_command()[0], self._job))
        others = self._others(jobs)
        if others:
            return "job %s follows" % others[0]
        return "job %s follows" % self._submit(self._settings["successor"])

    def _submit(self, command: List[str]) -> str:
        """Submit a job of our name; return its id as the queue has it, whatever a site prints around it."""
        printed = self._run(command)
        found = []  # type: List[str]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = self._others(self._jobs())
        job = found[0] if found else self._adapter.parse_submit(printed)
        if not job:
            raise OSError("%s printed no job id (%s), and no job %s is in the queue" % (
                command[0], " ".join(printed.split()) or "nothing at all", self._settings["job_name"]))
        return job

    def cancel_successors(self) -> None:
        """Cancel the jobs of our name that wait: what stops us would stop them, too."""
        for job in self._others(self._jobs()):
            self._run(self._adapter.cancel_command(job))

    def _jobs(self) -> List[Tuple[str, str]]:
        return self._adapter.parse_queue(self._run(self._adapter.queue_command()))

    def _others(self, jobs: List[Tuple[str, str]]) -> List[str]:
        return [job for job, name in jobs if name == self._settings["job_name"] and job != self._job]

    def _run(self, command: List[str]) -> str:
        """Run one of the scheduler's commands; raise OSError with its own words."""
        done = call(self._adapter, self._settings.get("bin_dir", ""), command, 120)
        if done.returncode:
            raise OSError("%s: %s" % (command[0], " ".join((done.stderr or done.stdout).split())))
        return done.stdout
