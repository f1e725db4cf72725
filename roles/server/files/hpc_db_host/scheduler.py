# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asking the scheduler, from inside the job, whether another job has ended."""

import os
import subprocess
from typing import List

# Slurm's states of a job that has left its node for good. A state that nobody knows here is none of them.
SLURM_ENDED = (
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT"
).split()


def slurm_queue_command(job: str) -> List[str]:
    """Return the call that prints the state of ``job``."""
    return ["squeue", "--noheader", "--format=%T", "--jobs=%s" % job]


def slurm_has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: a job that Slurm has forgotten has ended, a Slurm that does not answer says no."""
    if returncode:
        return "Invalid job id" in stderr
    return all(word in SLURM_ENDED for word in stdout.split())


def job_has_ended(scheduler: str, bin_dir: str, job: str) -> bool:
    """Tell whether the scheduler says that ``job`` has ended. Unknown is False."""
    if scheduler != "slurm" or not job:
        return False
    command = slurm_queue_command(job)
    command[0] = "%s/%s" % (bin_dir, command[0]) if bin_dir else command[0]
    try:
        asked = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return slurm_has_ended(asked.returncode, asked.stdout, asked.stderr)


class Queue:
    """What the hosting job itself asks of the scheduler: its successor, so that a walltime is not the end."""

    def __init__(self, settings: dict, job: str) -> None:
        self._settings = settings
        self._job = job

    def ensure_successor(self) -> str:
        """Have one job of our name queued behind us; return what was done, in one line."""
        others = self._others()
        if others:
            return "job %s follows" % others[0]
        return "job %s follows" % self._run(self._settings["successor"]).strip()

    def cancel_successors(self) -> None:
        """Cancel the jobs of our name that wait: what stops us would stop them, too."""
        for job in self._others():
            self._run(["scancel", "--state=PENDING", job])

    def _others(self) -> List[str]:
        listed = self._run(["squeue", "--noheader", "--format=%i|%j|%T", "--user=%d" % os.getuid()])
        jobs = [line.split("|") for line in listed.splitlines() if line.count("|") == 2]
        return [
            job for job, name, state in jobs
            if name == self._settings["job_name"] and job != self._job and state not in ["COMPLETING"] + SLURM_ENDED
        ]

    def _run(self, command: List[str]) -> str:
        """Run one of the scheduler's commands; raise OSError with its own words."""
        folder = self._settings.get("bin_dir", "")
        # sbatch takes options from its environment, too; this job's are not the successor's.
        ours = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        done = subprocess.run(
            [os.path.join(folder, command[0])] + command[1:], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120, check=False,
        )
        if done.returncode:
            raise OSError("%s: %s" % (command[0], " ".join(done.stderr.split())))
        return done.stdout
