# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's commands, as scheduler.py wants them."""

import os
import re
from typing import Dict, List, Optional, Tuple

from .scheduler import build_environment

JOB_VARIABLE = "SLURM_JOB_ID"
# States of a job that has left its node for good. Any other is none of them, also one that says something else than
# where the job is, and may hide that it runs: REVOKED (on another cluster of a federation), LAUNCH_FAILED.
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
# All jobs, whatever a site hides or adds: partitions that are hidden, other clusters, jobs that have ended just now.
LISTING = ["squeue", "--all", "--local", "--states=all"]


def environment(variables: Dict[str, str], bin_dir: str) -> Dict[str, str]:
    """Leave out what Slurm's commands take for options, and what describes this job."""
    return dict(build_environment(variables, ["SLURM_CONF", "SLURM_JWT"]), SLURM_TIME_FORMAT="%s")


def state_command(job: str) -> List[str]:
    """Return the call that prints the state of ``job``."""
    return LISTING + ["--noheader", "--format=job|%T|", "--jobs=%s" % job]


def has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: a job that Slurm has forgotten has ended.

    No answer says nothing, nor does an empty one, one that is cut off, or one with nothing but a site's own lines.
    """
    if returncode:
        return "Invalid job id specified" in stdout + stderr
    states = re.findall(r"^job\|(.*)$", stdout, re.MULTILINE)
    return bool(states) and all(state.endswith("|") and state[:-1] in ENDED for state in states)


def queue_command() -> List[str]:
    """Return the call that lists this user's jobs."""
    return LISTING + ["--format=%i|%j|%T", "--user=%d" % os.getuid()]


def parse_queue(stdout: str) -> List[Tuple[str, str]]:
    """Return id and name of the jobs that go on. Without its head a listing is none, or not all of one."""
    if not re.search(r"^JOBID\|", stdout, re.MULTILINE):
        raise OSError("squeue: no list of jobs in what was printed: %s" % " ".join(stdout[:200].split()))
    jobs = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return [(job, name) for job, name, state in jobs if job != "JOBID" and state not in ["COMPLETING"] + ENDED]


def parse_submit(stdout: str) -> Optional[str]:
    """Return the id, which may stand in a sentence, between lines of the site."""
    found = re.findall(r"^\s*(?:Submitted batch job )?([0-9]+)(?:;.*| on cluster \S+)?\s*$", stdout, re.MULTILINE)
    return found[-1] if found else None


def cancel_command(job: str) -> List[str]:
    """Return the call that cancels a job that waits, and leaves it alone if it has begun meanwhile."""
    return ["scancel", "--state=PENDING", job]
