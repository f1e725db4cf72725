# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a scheduler has to know: command lines, and how to read the answers.

Nothing here runs a command. The modules and the program in the job share one class per scheduler, so that both submit
the same job and agree on which job has ended.
"""

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

# The variables that every scheduler's commands are given. All others stay out: SQUEUE_PARTITION in a .bashrc hides
# jobs, and a job that is submitted inside another one would inherit the variables that describe the other one.
INHERITED = ("HOME", "KRB5CCNAME", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TZ", "USER")


class Job(NamedTuple):
    """A job of this user. ``start`` is in seconds since 1970; None if it has not begun, or nobody knows when."""

    id: str
    restart: str
    state: str
    start: Optional[float]
    nodes: str
    name: str



def build_environment(variables: Mapping[str, str], names: Sequence[str]) -> Dict[str, str]:
    """Return the variables for a scheduler's commands; ``names`` are those that this scheduler needs besides."""
    kept = {name: variables[name] for name in (*INHERITED, *names) if name in variables}
    return dict(kept, LC_ALL="C.UTF-8")  # the answers are parsed


class Scheduler:
    """One scheduler. The defaults suit one without a queue; ``name`` is the value of the setting server_scheduler.

    ``options`` are the scheduler's own long options without their dashes, as the inventory has them: True stands
    alone, False and None are left out. ``setting`` is the name of the setting that they come from, for messages.
    A ``ValueError`` is a refusal for the user; its text names the option, what was given and what is allowed.
    """

    name = ""
    #: The variable that tells a job its own id; empty if there is none.
    job_variable = ""

    # The login's environment

    def environment(self, variables: Mapping[str, str], bin_dir: str) -> Dict[str, str]:
        """Return the variables for the scheduler's commands, which are in the folder ``bin_dir``, if that is given."""
        return dict(variables)

    def check_environment(self, variables: Mapping[str, str], options: dict, setting: str) -> None:
        """Raise ValueError for an option that only the login's environment or a user's file sets."""

    def overridden(self, variables: Mapping[str, str], options: dict, setting: str) -> List[str]:
        """Return a warning for each variable that overrides a job script which the user submits from this login."""
        return []

    # Options

    def check_options(self, options: dict) -> None:
        """Raise ValueError for an option that would be misread, or that is set here and nowhere else."""

    def server_options(self, options: dict, name: str, memory: str, notice: int, chain: bool) -> dict:
        """Return the server job's options: memory, one job at a time, and a signal ``notice`` seconds before the end.

        An option that is given wins. With ``chain`` the job submits its own successor.
        """
        return options

    def short_options(self, options: dict) -> dict:
        """Return the options of a job of five minutes that runs where a server job with ``options`` would."""
        return options

    # Submission

    def submit_command(self, name: str, script: str, options: dict, output: str) -> List[str]:
        """Return the call that submits a job script, its output appended to the file ``output``."""
        raise NotImplementedError

    def parse_submit(self, text: str) -> Optional[str]:
        """Return the id of the new job, which may stand between lines of the site; None if there is none."""
        raise NotImplementedError

    def check_command(self, name: str, options: dict) -> Optional[List[str]]:
        """Return a call that fails where a submission would, without submitting; None if nothing can be refused."""
        return None

    def limit_command(self, options: dict) -> Optional[List[str]]:
        """Return a call that prints the time limits for these options; None if check_command judges them."""
        return None

    def check_limit(self, text: str, options: dict) -> None:
        """Raise ValueError if the time that was asked for is above every limit that limit_command has printed."""

    def unavailable_command(self, refusal: str) -> Optional[List[str]]:
        """Return a call that prints the nodes, if a refusal by check_command may be true only now."""
        return None

    def parse_unavailable(self, text: str, options: dict) -> str:
        """Return which nodes could run the job but are not available now; empty if it can never run."""
        return ""

    # Job scripts of workers

    def batch_lines(self, name: str, number: int, folder: str, options: dict) -> List[str]:
        """Return the head of a job script for an array of ``number`` jobs, each with a log in the folder."""
        return []

    def batch_command(self, script: str) -> List[str]:
        """Return the call that submits a job script with such a head."""
        return ["sh", script]

    def check_batch_command(self, script: str, options: dict) -> Optional[List[str]]:
        """Return a call that fails where batch_command would, without submitting; None if nothing can be refused."""
        return None

    def worker_name(self, cluster: str) -> str:
        """Return the name of a worker's connections, as a shell in its job reads it in double quotes."""
        raise NotImplementedError

    # The queue

    def queue_command(self, name: str = "") -> List[str]:
        """Return the call that lists this user's jobs; with a name, at least those of that name."""
        raise NotImplementedError

    def parse_queue(self, text: str) -> List[dict]:
        """Return the jobs that have not ended, each with id, name, state, node, reason, time_left and time_limit.

        States are Slurm's words; times are in seconds, or None. ValueError if the answer is not a list of jobs.
        """
        raise NotImplementedError

    def jobs_command(self, ids: List[str]) -> List[str]:
        """Return the call that lists all jobs of this user; ``ids`` are those that matter."""
        raise NotImplementedError

    def parse_jobs(self, text: str) -> List[Job]:
        """Return the jobs that have not ended. ValueError if the answer is not a list of jobs."""
        raise NotImplementedError

    def is_hopeless(self, reason: str) -> bool:
        """Tell whether a job that waits for this reason never starts."""
        return False

    def state_command(self, job: str) -> Optional[List[str]]:
        """Return the call that asks about one job; None if there is nobody to ask."""
        return None

    def has_ended(self, returncode: int, stdout: str, stderr: str) -> bool:
        """Tell whether the answer to state_command says that the job has left its node for good.

        An answer that says nothing is False: another server must not start while the job may run.
        """
        return False

    # Nodes

    def all_nodes_command(self) -> Optional[List[str]]:
        """Return the call that prints every node of the cluster; None if there is one machine."""
        return None

    def parse_nodes(self, text: str) -> List[str]:
        """Return the nodes that all_nodes_command has printed, each once."""
        return []

    def nodes_command(self, nodes: str) -> Optional[List[str]]:
        """Return a call that prints each node of a list such as c[1-3]; None if the list holds the names themselves."""
        return None

    def parse_hosts(self, text: str) -> List[str]:
        """Return the nodes that nodes_command has printed, or those in the list itself."""
        return [node for node in text.split(",") if node]

    # The end of a job

    def ask_command(self, job_id: str) -> Optional[List[str]]:
        """Return the call that asks a running job's script to end; None if the scheduler can only kill it."""
        return None

    def cancel_command(self, job_id: str) -> List[str]:
        """Return the call that cancels a job in any state."""
        raise NotImplementedError

    def cancel_waiting_command(self, job_id: str) -> List[str]:
        """Return the call that cancels a job unless it has begun."""
        return self.cancel_command(job_id)
