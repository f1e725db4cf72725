# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's commands, as scheduler.py wants them."""

import os
from typing import Dict, List, Tuple

from .scheduler import build_environment

JOB_VARIABLE = "SLURM_JOB_ID"
# States of a job that has left its node for good. Any other is none of them, also one that says something else than
# where the job is, and may hide that it runs: REVOKED (on another cluster of a federation), LAUNCH_FAILED.
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
# All jobs, whatever a site hides or adds: partitions that are hidden, other clusters, jobs that have ended just now.
LISTING = ["squeue", "--noheader", "--all", "--local", "--states=all"]


def environment(variables: Dict[str, str], bin_dir: str) -> Dict[str, str]:
    """Leave out what Slurm's commands take for options, and what describes this job."""
    return dict(build_environment(variables, ["SLURM_CONF", "SLURM_JWT"]), SLURM_TIME_FORMAT="%s")


def state_command(job: str) -> List[str]:
    """Return the call that prints the state of ``job``."""
    return LISTING + ["--format=%T", "--jobs=%s" % job]


def has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: a job that Slurm has forgotten has ended. No answer, or an empty one, says nothing."""
    if returncode:
        return "Invalid job id specified" in stderr
    states = stdout.split()
    return bool(states) and all(state in ENDED for state in states)


def queue_command() -> List[str]:
    """Return the call that lists this user's jobs."""
    return LISTING + ["--format=%i|%j|%T", "--user=%d" % os.getuid()]


def parse_queue(stdout: str) -> List[Tuple[str, str]]:
    """Return id and name of the jobs that go on."""
    jobs = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return [(job, name) for job, name, state in jobs if state not in ["COMPLETING"] + ENDED]


def cancel_command(job: str) -> List[str]:
    """Return the call that cancels a job that waits, and leaves it alone if it has begun meanwhile."""
    return ["scancel", "--state=PENDING", job]
