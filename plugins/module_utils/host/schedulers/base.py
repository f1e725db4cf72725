# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The interface of a scheduler: command lines, and parsers for their output.

Nothing here runs a command. The modules and the supervisor share one class per scheduler, so that both submit the same
job and agree on which job has ended.
"""

import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

# The variables that every scheduler's commands get. All others are left out: SQUEUE_PARTITION in a .bashrc hides jobs,
# and a job submitted inside another job would inherit the variables that describe that job.
INHERITED = ("HOME", "KRB5CCNAME", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TZ", "USER")
KILOBYTES = {"k": 1, "m": 1024, "g": 1024**2, "t": 1024**3}


class Job(NamedTuple):
    """A job of this user. ``start`` is in seconds since 1970; None if the job has not begun, or if it is unknown."""

    id: str
    restart: str
    state: str
    start: Optional[float]
    nodes: str
    name: str


def build_environment(variables: Mapping[str, str], names: Sequence[str]) -> Dict[str, str]:
    """Return the environment of a scheduler's commands; ``names`` are the variables that this scheduler also needs."""
    kept = {name: variables[name] for name in (*INHERITED, *names) if name in variables}
    return dict(kept, LC_ALL="C.UTF-8")  # the output is parsed


def megabytes(memory: object, bare: int = 1024) -> int:
    """Return a size such as ``16G`` in megabytes, 0 if it is invalid. A bare number has the unit ``bare`` kilobytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])b?)?", str(memory).strip(), re.ASCII | re.IGNORECASE)
    if not found:
        return 0
    return int(float(found[1]) * (KILOBYTES[found[2].lower()] if found[2] else bare) / 1024)


class Scheduler:
    """One scheduler. The defaults suit one without a queue; ``name`` is the value of the setting server_scheduler.

    ``options`` are the scheduler's own long options without their dashes, as in the inventory: True makes a flag
    without a value, False and None are left out. ``setting`` names the setting that they come from, for messages.
    The text of a ``ValueError`` is for the user and names the option, the given value and the allowed ones.
    """

    name = ""
    #: The variable that holds the job's own id inside a job; empty if there is none.
    job_variable = ""
    #: Whether a program beside a job's script can end in good order after it.
    can_share = True
    #: Why no successor can begin before the end of a server job; for Slurm, the settings that decide it.
    no_handover = "this scheduler knows no time in dependencies"

    # The login's environment

    def environment(self, variables: Mapping[str, str], bin_dir: str) -> Dict[str, str]:
        """Return the environment of the scheduler's commands; ``bin_dir`` is their folder, or empty."""
        return dict(variables)

    def check_environment(self, variables: Mapping[str, str], options: dict, setting: str) -> None:
        """Raise ValueError for an option that is set only by the login environment or by a user's file."""

    def overridden(self, variables: Mapping[str, str], options: dict, setting: str) -> List[str]:
        """Return a warning for each variable that overrides the job scripts that a user submits from this login."""
        return []

    # Options

    def check_options(self, options: dict) -> None:
        """Raise ValueError for an option that the scheduler would misread, or that the collection sets itself."""

    def server_options(self, options: dict, name: str, memory: str, notice: int, chain: bool) -> dict:
        """Return the server job's options: memory, one job at a time, and a signal ``notice`` seconds before the end.

        The given options win. With ``chain`` the job submits its own successor.
        """
        return options

    def handover_options(self, options: dict, job: str, seconds: float) -> dict:
        """Return the options of a successor that may begin ``seconds`` after the start of ``job``, or at its end.

        The same options if the scheduler cannot express this, or if they set the dependency: then the successor waits
        for the end of ``job``.
        """
        return options

    def is_dependency_refused(self, refusal: str) -> bool:
        """Return whether the scheduler refuses a job because of the dependency in ``handover_options``."""
        return False

    def short_options(self, options: dict) -> dict:
        """Return the options of a five-minute job that runs where a server job with ``options`` would run."""
        return options

    # Submission

    def submit_command(self, name: str, script: str, options: dict, output: str) -> List[str]:
        """Return the call that submits a job script; the job's output is appended to the file ``output``."""
        raise NotImplementedError

    def parse_submit(self, text: str) -> Optional[str]:
        """Return the id of the new job, ignoring lines that the site prints around it; None if there is none."""
        raise NotImplementedError

    def check_command(self, name: str, options: dict) -> Optional[List[str]]:
        """Return a call that fails if the submission would, without submitting; None if nothing can be refused."""
        return None

    def limit_command(self, options: dict) -> Optional[List[str]]:
        """Return a call that prints the time limits for these options; None if check_command checks them."""
        return None

    def check_limit(self, text: str, options: dict) -> None:
        """Raise ValueError if the requested time exceeds every limit in the output of limit_command."""

    def unavailable_command(self, refusal: str) -> Optional[List[str]]:
        """Return a call that prints the nodes, if a refusal by check_command may be temporary."""
        return None

    def parse_unavailable(self, text: str, options: dict) -> str:
        """Return the nodes that could run the job but are not available now; empty if it can never run."""
        return ""

    # Job scripts of workers

    def batch_lines(self, name: str, number: int, folder: str, options: dict) -> List[str]:
        """Return the header of a job script for an array of ``number`` jobs, each with a log in ``folder``."""
        return []

    def batch_command(self, script: str) -> List[str]:
        """Return the call that submits a job script with the header from ``batch_lines``."""
        return ["sh", script]

    def check_batch_command(self, script: str, options: dict) -> Optional[List[str]]:
        """Return a call that fails if batch_command would, without submitting; None if nothing can be refused."""
        return None

    def worker_name(self, cluster: str) -> str:
        """Return the application name of a worker's connections, to be expanded by a shell in double quotes."""
        raise NotImplementedError

    def step_command(self, bin_dir: str) -> str:
        """Return shell code that, put before a program's command, runs it in a step beside the job's script.

        Such a program is asked to end when the script has ended. Empty if the scheduler has no steps.
        """
        return ""

    # The queue

    def queue_command(self, name: str = "") -> List[str]:
        """Return the call that lists this user's jobs; with ``name``, at least the jobs of that name."""
        raise NotImplementedError

    def parse_queue(self, text: str) -> List[dict]:
        """Return the jobs that have not ended, each with id, name, state, node, reason, time_left and time_limit.

        States have Slurm's names; times are in seconds, or None. Raise ValueError if the text is not a list of jobs.
        """
        raise NotImplementedError

    def jobs_command(self, ids: List[str]) -> List[str]:
        """Return the call that lists all jobs of this user; the result must include the jobs ``ids``."""
        raise NotImplementedError

    def parse_jobs(self, text: str) -> List[Job]:
        """Return the jobs that have not ended. Raise ValueError if the text is not a list of jobs."""
        raise NotImplementedError

    def forecast_command(self, job: str) -> Optional[List[str]]:
        """Return the call that prints when a waiting job was submitted and is expected to begin; None if unknown."""
        return None

    def parse_forecast(self, text: str) -> Dict[str, Optional[float]]:
        """Return ``submitted`` and ``expected`` in seconds since 1970, each None if unknown."""
        return {"submitted": None, "expected": None}

    def is_hopeless(self, reason: str) -> bool:
        """Return whether a job that waits for this reason never starts."""
        return False

    def is_job_limit(self, reason: str) -> bool:
        """Return whether a job waits for this reason because another job of the same user or account runs."""
        return False

    def state_command(self, job: str) -> Optional[List[str]]:
        """Return the call that queries one job; None if the scheduler cannot be queried."""
        return None

    def has_ended(self, returncode: int, stdout: str, stderr: str) -> bool:
        """Return whether the result of state_command shows that the job has left its node for good.

        An inconclusive result means False: another server must not start while the job may still run.
        """
        return False

    def run_command(self, job: str) -> Optional[List[str]]:
        """Return the call that queries one job and its runs; None if ``state_command`` is all there is."""
        return None

    def run_has_ended(self, job: str, run: str, returncode: int, stdout: str, stderr: str) -> bool:
        """Return whether the result of run_command shows that one run of a job has left its node for good.

        ``run`` is how often the job had been started before. A job that is queued again has ended its earlier runs.
        """
        return self.has_ended(returncode, stdout, stderr)

    # Nodes

    def all_nodes_command(self) -> Optional[List[str]]:
        """Return the call that prints every node of the cluster; None if there is only one machine."""
        return None

    def parse_nodes(self, text: str) -> List[str]:
        """Return the nodes in the output of all_nodes_command, each once."""
        return []

    def nodes_command(self, nodes: str) -> Optional[List[str]]:
        """Return a call that expands a list of nodes such as c[1-3]; None if lists are never abbreviated."""
        return None

    def parse_hosts(self, text: str) -> List[str]:
        """Return the nodes in the output of nodes_command, or in the list itself."""
        return [node for node in text.split(",") if node]

    # The end of a job

    def ask_command(self, job_id: str) -> Optional[List[str]]:
        """Return the call that asks a running job's script to end; None if the scheduler can only kill jobs."""
        return None

    def cancel_command(self, job_id: str) -> List[str]:
        """Return the call that cancels a job in any state."""
        raise NotImplementedError

    def cancel_waiting_command(self, job_id: str) -> List[str]:
        """Return the call that cancels a job only if it has not begun."""
        return self.cancel_command(job_id)
