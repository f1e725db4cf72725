# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Grid Engine's commands, as scheduler.py wants them."""

import os
import pwd
import re
from typing import Dict, List, Tuple
from xml.etree import ElementTree

JOB_VARIABLE = "JOB_ID"


def environment(variables: Dict[str, str], bin_dir: str) -> Dict[str, str]:
    """Add the folder in which Grid Engine is, which its commands want to be told: a job knows it, a login may not."""
    found = re.match(r"(/.+)/bin/[^/]+/*$", bin_dir)
    return dict({"SGE_ROOT": found.group(1)} if found else {}, **variables)


def state_command(job: str) -> List[str]:
    """Return the call that prints all about ``job``."""
    return ["qstat", "-j", job]


def has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: Grid Engine forgets what has ended; one that does not answer says no."""
    return returncode != 0 and "jobs do not exist" in stdout + stderr


def queue_command() -> List[str]:
    """Return the call that lists this user's jobs."""
    return ["qstat", "-u", pwd.getpwuid(os.getuid()).pw_name, "-xml"]


def parse_queue(stdout: str) -> List[Tuple[str, str]]:
    """Return id and name of the jobs that go on; one that was deleted does not."""
    jobs = ElementTree.fromstring(stdout[stdout.find("<?xml"):]).iter("job_list")
    told = [[job.findtext(key) or "" for key in ("JB_job_number", "JB_name", "state")] for job in jobs]
    return [(number, name) for number, name, state in told if "d" not in state]


def cancel_command(job: str) -> List[str]:
    """Return the call that cancels a job. One that waits is held back by ours, so it has not begun."""
    return ["qdel", job]
