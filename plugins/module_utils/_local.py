# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One machine without a scheduler: the commands of the hosting program's own, to be run in <root>/host."""

from __future__ import annotations

# The hosting program prints its queue and its ids as Slurm does.
from ansible_collections.mala.hpc_db.plugins.module_utils._slurm import parse_queue, parse_submit

__all__ = [
    "cancel_command", "check_command", "check_limit", "check_options", "limit_command", "parse_queue",
    "parse_submit", "queue_command", "submit_command",
]

LOCAL_JOB = ["python3", "-m", "hpc_db_host.local_job"]


def submit_command(name: str, script: str, options: dict, output: str) -> list[str]:
    """Return the call that starts the job; there are no resources to ask for."""
    return [*LOCAL_JOB, "submit", f"--name={name}", f"--script={script}", f"--output={output}"]


def check_command(name: str, options: dict) -> list[str] | None:
    """Return None: nothing can be refused."""


def limit_command(options: dict) -> list[str] | None:
    """Return None: nothing is limited."""


def check_limit(text: str, options: dict) -> None:
    """Accept anything."""


def queue_command(name: str) -> list[str]:
    """Return the call that prints the one job of the instance, if it runs."""
    return [*LOCAL_JOB, "queue"]


def cancel_command(job_id: str, gently: bool) -> list[str]:
    """Return the call that asks the job to stop, always gently."""
    return [*LOCAL_JOB, "cancel", job_id]


def check_options(options: dict) -> None:
    """Accept anything: the options of a scheduler mean nothing here."""
