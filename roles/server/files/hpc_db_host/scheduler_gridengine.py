# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Grid Engine's commands, as scheduler.py wants them."""

import os
import pwd
import re
from typing import Dict, List, Optional, Tuple
from xml.etree import ElementTree

from .scheduler import build_environment

JOB_VARIABLE = "JOB_ID"
OWN_VARIABLES = ["SGE_CELL", "SGE_CLUSTER_NAME", "SGE_EXECD_PORT", "SGE_QMASTER_PORT", "SGE_ROOT"]


def environment(variables: Dict[str, str], bin_dir: str) -> Dict[str, str]:
    """Choose what Grid Engine's commands need; add the folder in which it is: a job knows it, a login may not."""
    found = re.match(r"(/.+)/bin/[^/]+/*$", bin_dir)
    return dict({"SGE_ROOT": found.group(1)} if found else {}, **build_environment(variables, OWN_VARIABLES))


def state_command(job: str) -> List[str]:
    """Return the call that prints all about ``job``."""
    return ["qstat", "-j", job]


def has_ended(returncode: int, stdout: str, stderr: str) -> bool:
    """Read the answer: Grid Engine forgets what has ended. No answer, or an empty one, says nothing."""
    if returncode:
        return "jobs do not exist" in stdout + stderr
    return "<unknown_jobs" in stdout  # with -xml in a file of qstat's defaults


def queue_command() -> List[str]:
    """Return the call that lists this user's jobs, in all states whatever ~/.sge_qstat says."""
    return ["qstat", "-s", "prs", "-u", pwd.getpwuid(os.getuid()).pw_name, "-xml"]


def parse_queue(stdout: str) -> List[Tuple[str, str]]:
    """Return id and name of the jobs that go on; one that was deleted does not."""
    found = re.search(r"<\?xml[^>]*>\s*<(\w+).*</\1\s*>", stdout, re.DOTALL)  # between lines of the site
    try:
        jobs = ElementTree.fromstring(found.group() if found else "").iter("job_list")
    except ElementTree.ParseError:
        raise OSError("qstat: no XML in what was printed: %s" % " ".join(stdout[:200].split())) from None
    told = [[job.findtext(key) or "" for key in ("JB_job_number", "JB_name", "state")] for job in jobs]
    return [(number, name) for number, name, state in told if "d" not in state]


def parse_submit(stdout: str) -> Optional[str]:
    """Return the id, which may stand in a sentence, between lines of the site."""
    found = re.findall(r"^\s*(?:Your job )?([0-9]+)(?: \(.*\) has been submitted)?\s*$", stdout, re.MULTILINE)
    return found[-1] if found else None


def cancel_command(job: str) -> List[str]:
    """Return the call that cancels a job. One that waits is held back by ours, so it has not begun."""
    return ["qdel", job]
