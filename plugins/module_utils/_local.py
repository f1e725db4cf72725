# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One machine without a scheduler: the commands of the hosting program's own, to be run in <root>/host."""

from __future__ import annotations

from collections.abc import Mapping

# The hosting program prints its queue and its ids as Slurm does, without a head.
from ansible_collections.mala.hpc_db.plugins.module_utils._slurm import parse_hosts, parse_nodes, parse_submit
from ansible_collections.mala.hpc_db.plugins.module_utils._slurm import read_jobs as parse_jobs
from ansible_collections.mala.hpc_db.plugins.module_utils._slurm import read_queue as parse_queue

__all__ = ["parse_hosts", "parse_jobs", "parse_nodes", "parse_queue", "parse_submit"]

LOCAL_JOB = ["python3", "-m", "hpc_db_host.local_job"]


def environment(variables: Mapping[str, str], bin_dir: str) -> dict[str, str]:
    """Return all of them: no scheduler takes any for an option."""
    return dict(variables)


def check_environment(variables: Mapping[str, str], options: dict, setting: str) -> None:
    """Accept anything."""


def overridden(variables: Mapping[str, str], options: dict, setting: str) -> list[str]:
    """Return nothing."""
    return []


def hosting_options(options: dict, name: str, memory: str, notice: int, chain: bool) -> dict:
    """Return the options as they are."""
    return options


def short_options(options: dict) -> dict:
    """Return the options as they are."""
    return options


def submit_command(name: str, script: str, options: dict, output: str) -> list[str]:
    """Return the call that starts the job; there are no resources to ask for."""
    return [*LOCAL_JOB, "submit", f"--name={name}", f"--script={script}", f"--output={output}"]


def batch_lines(name: str, number: int, folder: str, options: dict) -> list[str]:
    """Return no lines: the script itself starts the workers."""
    return []


def worker_name(cluster: str) -> str:
    """Return how a worker's connections are called, as its shell reads it in double quotes: by PID and start time."""
    return "hpc_db $$.$(sed 's/.*) //' /proc/$$/stat | cut -d ' ' -f 20) $(uname -n) $(uname -n) $$"


def batch_command(script: str) -> list[str]:
    """Return the call that runs the script."""
    return ["sh", script]


def check_batch_command(script: str, options: dict) -> list[str] | None:
    """Return None: nothing can be refused."""


def check_command(name: str, options: dict) -> list[str] | None:
    """Return None: nothing can be refused."""


def unavailable_command(refusal: str) -> list[str] | None:
    """Return None: there are no nodes."""


def parse_unavailable(text: str, options: dict) -> str:
    """Return nothing."""
    return ""


def limit_command(options: dict) -> list[str] | None:
    """Return None: nothing is limited."""


def check_limit(text: str, options: dict) -> None:
    """Accept anything."""


def queue_command(name: str) -> list[str]:
    """Return the call that prints the one job of the instance, if it runs."""
    return [*LOCAL_JOB, "queue"]


def jobs_command(ids: list[str]) -> list[str]:
    """Return the call that prints those of the processes that run, as jobs."""
    return [*LOCAL_JOB, "processes", *ids]


def nodes_command(nodes: str) -> list[str] | None:
    """Return None: there is one machine."""


def all_nodes_command() -> list[str] | None:
    """Return None: there is one machine, and whatever runs there may be a worker."""


def ask_command(job_id: str) -> list[str] | None:
    """Return the call that asks the job to end."""
    return cancel_command(job_id)


def cancel_command(job_id: str) -> list[str]:
    """Return the call that asks the job to end."""
    return [*LOCAL_JOB, "cancel", job_id]


def is_hopeless(reason: str) -> bool:
    """Return False: a job never waits."""
    return False


def check_options(options: dict) -> None:
    """Accept anything: the options of a scheduler mean nothing here."""
