# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the scheduler's commands; check for the server job whether a job has ended and whether a successor is queued."""

import contextlib
import os
import re
import signal
import subprocess
import time
from typing import Dict, List, Optional

from .schedulers import SCHEDULERS
from .schedulers.slurm import parse_time

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


def run_has_ended(name: str, bin_dir: str, job: str, restarts: str) -> bool:
    """Return whether the scheduler reports that one run of ``job`` has ended; False if that is unknown."""
    scheduler = SCHEDULERS.get(name)
    command = scheduler.run_command(job) if scheduler and job else None
    if not scheduler or not command:
        return job_has_ended(name, bin_dir, job)
    try:
        answer = run(name, bin_dir, command, STATE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return scheduler.run_has_ended(job, restarts, answer.returncode, answer.stdout, answer.stderr)


def time_left(settings: dict, job: str) -> Optional[float]:
    """Return the remaining walltime of a running job of this user in seconds; None if it is unknown or unlimited."""
    scheduler = SCHEDULERS[settings["scheduler"]]
    if not scheduler.job_variable:
        return None
    try:
        listed = run(settings["scheduler"], settings["bin_dir"], scheduler.queue_command(), TIMEOUT).stdout
        return next((each["time_left"] for each in scheduler.parse_queue(listed) if each["id"] == job), None)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


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
    """The queue as the server job uses it: it ensures that a successor of this job is queued.

    ``successor`` is the next server job, as in run/state.json; None if there is none. ``predecessor`` is the id of a
    job that has handed over to this one, and may still be ending.
    """

    def __init__(self, settings: dict, job: str) -> None:
        self.successor = None  # type: Optional[dict]
        self.predecessor = ""
        #: Seconds after the start of this job at which a successor may take over; None if only at its end.
        self.earliest = None  # type: Optional[float]
        #: What is wrong with the successors; empty if nothing is.
        self.trouble = ""
        self._settings = settings
        self._job = job
        self._scheduler = SCHEDULERS[settings["scheduler"]]
        self._refused = ""
        self._vanished = 0
        self._gone = ""
        self._has_ended = False

    def ensure_successor(self) -> str:
        """Submit a successor unless one is queued; return one line with its id.

        After each successor that ended without taking over, the next one may begin later.
        """
        jobs = self._jobs()
        own = self._own(jobs)
        # A listing without this job is filtered or empty: it does not show whether a successor is queued.
        if not own and not job_has_ended(self._settings["scheduler"], self._settings["bin_dir"], self._job):
            raise OSError("%s does not list job %s, although it is running" % (
                self._scheduler.queue_command()[0], self._job))
        self.earliest = self._find_earliest(own["time_limit"] if own else None)
        others = self._others(jobs)
        if not others:
            lost, self.successor = self.successor, None
            self._vanished += bool(lost)
            pause = pause_before(self._vanished)
            others = [self._submit(self._begin(own, pause))]
            if lost:
                later = " at %s or later" % clock(time.time() + pause) if pause and self.earliest is not None else ""
                self._gone = "job %s has ended without taking over, job %s follows%s" % (
                    lost["id"], others[0]["id"], later)
        self.successor = self._describe(others[0])
        self.trouble = self._gone
        if self._is_hopeless(others[0]):
            self.trouble = "job %s cannot start (%s)" % (others[0]["id"], others[0]["reason"])
        return self.trouble or "job %s follows%s" % (others[0]["id"], self._refused)

    def takes_over(self, job: str, place: str) -> None:
        """Note that a job has begun, and takes over from this one."""
        if self.successor:
            told = "job %s on %s takes over" % (job, place)
            self.successor = dict(self.successor, id=job, state="RUNNING", told=told)

    def look(self, timeout: float) -> None:
        """Update ``successor`` as this job ends; keep it if the scheduler does not answer in time."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            jobs = self._jobs(timeout)
            if self._own(jobs):  # else the list is filtered
                others = self._others(jobs)
                self.successor = self._describe(others[0], timeout) if others else None

    def successor_command(self, seconds: Optional[float] = None) -> List[str]:
        """Return the call that submits the successor.

        It may begin ``seconds`` after the start of this job or, if that is None, at its end.
        """
        wanted = self._settings["successor"]
        if isinstance(wanted, list):  # written by a release before 0.2
            return wanted
        name, notice = self._settings["job_name"], self._settings["stop_notice"]
        options = wanted["options"]
        if seconds is not None:
            options = self._scheduler.handover_options(options, self._job, seconds)
        options = self._scheduler.server_options(options, name, wanted["memory"], notice, True)
        return self._scheduler.submit_command(name, wanted["script"], options, wanted["output"])

    def _submit(self, seconds: Optional[float]) -> dict:
        """Submit a job of our name; its id is read from the queue, since sites may print other text around it."""
        if self._has_ended:
            raise OSError("the server has failed for good")
        command = self.successor_command(seconds)
        self._refused = ""
        try:
            printed = self._run(command)
        except OSError as error:
            if seconds is None or not self._scheduler.is_dependency_refused(str(error)):
                raise
            self._refused = ", but only at the end of this job: %s" % error
            self.earliest = None
            command = self.successor_command()
            printed = self._run(command)
        found: List[dict] = []
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = self._others(self._jobs())
        if found:
            return found[0]
        job = self._scheduler.parse_submit(printed)
        if not job:
            raise OSError("%s printed no job id (%s), and no job %s is in the queue" % (
                command[0], " ".join(printed.split()) or "nothing at all", self._settings["job_name"]))
        return {"id": job, "state": "PENDING", "reason": ""}

    def _begin(self, own: Optional[dict], pause: float) -> Optional[float]:
        """Return the seconds after the start of this job at which a successor that is submitted now may begin."""
        if not pause or self.earliest is None or not own or own["time_left"] is None:
            return self.earliest
        return max(self.earliest, own["time_limit"] - own["time_left"] + pause)

    def _describe(self, job: dict, timeout: float = TIMEOUT) -> dict:
        """Return a successor as in run/state.json: workers wait for it if there is something to tell them."""
        found = {name: job[name] for name in ("id", "state", "reason")}
        found["late"] = self._why_late(job)
        command = self._scheduler.forecast_command(job["id"])
        forecast = self._scheduler.parse_forecast("")
        if command and job["state"] == "PENDING":
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                forecast = self._scheduler.parse_forecast(self._run(command, timeout))
        told = "" if self._is_hopeless(job) else in_words(found, forecast)
        return dict(found, told=told, **forecast)

    def _is_hopeless(self, job: dict) -> bool:
        return job["state"] == "PENDING" and self._scheduler.is_hopeless(job["reason"])

    def _find_earliest(self, walltime: Optional[float]) -> Optional[float]:
        seconds = handover_seconds(self._settings, walltime)
        wanted = self._settings["successor"]
        if seconds is None or isinstance(wanted, list):
            return None
        options = wanted["options"]
        return None if self._scheduler.handover_options(options, self._job, seconds) == options else seconds

    def _why_late(self, job: dict) -> str:
        """Return why a successor cannot begin before the end of this job; empty if it can."""
        if job["state"] == "PENDING" and self._scheduler.is_job_limit(job["reason"]):
            return "cannot start earlier (%s); a QOS, account or partition that allows two jobs avoids this" % (
                job["reason"])
        if self._refused:
            return "cannot start earlier, since the scheduler refuses a time in dependencies"
        if self.earliest is None:
            return "cannot start earlier (%s)" % self._scheduler.no_handover
        return ""

    def cancel_successors(self) -> None:
        """Cancel the waiting jobs of our name, and submit no more: they would fail for the same reason."""
        self._has_ended, self.successor = True, None
        for job in self._others(self._jobs()):
            self._run(self._scheduler.cancel_waiting_command(job["id"]))

    def _jobs(self, timeout: float = TIMEOUT) -> List[dict]:
        """Return the jobs in the queue; raise OSError if the output is not a list of jobs."""
        try:
            return self._scheduler.parse_queue(self._run(self._scheduler.queue_command(), timeout))
        except ValueError as error:
            raise OSError(str(error)) from None

    def _own(self, jobs: List[dict]) -> Optional[dict]:
        return next((job for job in jobs if job["id"] == self._job), None)

    def _others(self, jobs: List[dict]) -> List[dict]:
        """Return the other jobs of our name that are not about to end."""
        ours = (self._job, self.predecessor)
        return [
            job for job in jobs
            if job["name"] == self._settings["job_name"] and job["id"] not in ours and job["state"] != LEAVING
        ]

    def _run(self, command: List[str], timeout: float = TIMEOUT) -> str:
        """Run one of the scheduler's commands and return its output; raise OSError with its error message."""
        done = run(self._settings["scheduler"], self._settings["bin_dir"], command, timeout)
        if done.returncode:
            raise OSError("%s: %s" % (command[0], " ".join((done.stderr or done.stdout).split())))
        return done.stdout


def in_words(job: dict, forecast: dict) -> str:
    """Return the message about a successor for waiting workers."""
    if job["state"] != "PENDING":
        return "job %s is %s" % (job["id"], job["state"])
    since, expected = (clock(forecast[name]) for name in ("submitted", "expected"))
    queued = "queued as job %s%s" % (job["id"], since and " since " + since)
    return ", ".join(filter(None, [queued, job["reason"], expected and "expected " + expected]))


def clock(seconds: Optional[float]) -> str:
    """Return a time in the cluster's time zone, with the date unless it is today; empty for None."""
    if seconds is None:
        return ""
    then = time.localtime(seconds)
    return time.strftime("%H:%M" if then[:3] == time.localtime(time.time())[:3] else "%Y-%m-%d %H:%M", then)


def pause_before(vanished: int) -> float:
    """Return how much later a successor may begin, after so many that have ended without taking over."""
    return min(60.0 * 2 ** (vanished - 2), 3600.0) if vanished > 1 else 0.0


def handover_seconds(settings: dict, walltime: Optional[float]) -> Optional[float]:
    """Return the seconds after the start of a job at which its successor may take over; None if only at its end."""
    given = str(settings["handover_after"]).strip()
    if not given or not walltime:
        return None
    seconds = walltime * float(given[:-1]) / 100 if given.endswith("%") else parse_time(given)
    return seconds if seconds is not None and seconds < walltime - settings["stop_notice"] else None
