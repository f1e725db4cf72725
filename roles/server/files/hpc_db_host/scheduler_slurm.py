# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's commands, as scheduler.py wants them."""

import os
from typing import Dict, List, Tuple

JOB_VARIABLE = "SLURM_JOB_ID"
# States of a job that has left its node for good. A state that nobody knows here is none of them.
ENDED = (
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT"
).split()


def environment(variables: Dict[str, str], bin_dir: str) -> Dict[str, str]:
    """Leave out this job's own: sbatch takes options from its environment, too."""
    return {
        name: value for name, value in variables.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }


def state_command(job: str) -> List[str]:
    """Return the call that prints the state of ``job``."""
    return ["squeue", "--noheader", "--format=%T", "--jobs=%s" % job]


def has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: a job that Slurm has forgotten has ended, a Slurm that does not answer says no."""
    if returncode:
        return "Invalid job id" in stderr
    return all(word in ENDED for word in stdout.split())


def queue_command() -> List[str]:
    """Return the call that lists this user's jobs."""
    return ["squeue", "--noheader", "--format=%i|%j|%T", "--user=%d" % os.getuid()]


def parse_queue(stdout: str) -> List[Tuple[str, str]]:
    """Return id and name of the jobs that go on."""
    jobs = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return [(job, name) for job, name, state in jobs if state not in ["COMPLETING"] + ENDED]


def cancel_command(job: str) -> List[str]:
    """Return the call that cancels a job that waits, and leaves it alone if it has begun meanwhile."""
    return ["scancel", "--state=PENDING", job]
