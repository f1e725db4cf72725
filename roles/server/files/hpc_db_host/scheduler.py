# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asking the scheduler, from inside the job, whether another job has ended."""

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
