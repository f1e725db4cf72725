# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One machine without a scheduler. The commands are those of local_job.py and run in <root>/host."""

from typing import List, Optional

from .base import Job, Scheduler
from .slurm import parse_submitted, read_jobs, read_queue

LOCAL_JOB = ["python3", "-m", "hpc_db_host.local_job"]


class Local(Scheduler):
    """One machine, on which jobs are processes.

    The output has Slurm's format without a header, so that it can be parsed for every version of local_job.py.
    """

    name = "local"

    def submit_command(self, name: str, script: str, options: dict, output: str) -> List[str]:
        return [*LOCAL_JOB, "submit", f"--name={name}", f"--script={script}", f"--output={output}"]

    def parse_submit(self, text: str) -> Optional[str]:
        return parse_submitted(text)

    def worker_name(self, cluster: str) -> str:
        """See Scheduler. PID and start time identify a process."""
        return "hpc_db $$.$(sed 's/.*) //' /proc/$$/stat | cut -d ' ' -f 20) $(uname -n) $(uname -n) $$"

    def queue_command(self, name: str = "") -> List[str]:
        """See Scheduler. An instance has one job."""
        return [*LOCAL_JOB, "queue"]

    def parse_queue(self, text: str) -> List[dict]:
        return read_queue(text)

    def jobs_command(self, ids: List[str]) -> List[str]:
        return [*LOCAL_JOB, "processes", *ids]

    def parse_jobs(self, text: str) -> List[Job]:
        return read_jobs(text)

    def ask_command(self, job_id: str) -> Optional[List[str]]:
        return self.cancel_command(job_id)

    def cancel_command(self, job_id: str) -> List[str]:
        """See Scheduler. The call only asks the job to end; it may stay in the queue."""
        return [*LOCAL_JOB, "cancel", job_id]
