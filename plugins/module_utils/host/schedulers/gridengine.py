# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Grid Engine's commands, and parsers for their output."""

import datetime
import os
import pwd
import re
import shlex
import time
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence
from xml.etree import ElementTree

from .base import Job, Scheduler, build_environment

# Options that the module sets itself, and options that make qsub wait, print, or depend on the order of its options;
# and notify, see GridEngine.
OWNED = (
    "C", "N", "S", "b", "cat", "clear", "cwd", "e", "hard", "help", "i", "j", "notify", "now", "o", "shell", "soft",
    "sync", "t", "tc", "terse", "verify", "w", "wd",
)
OWN_VARIABLES = ["SGE_CELL", "SGE_CLUSTER_NAME", "SGE_EXECD_PORT", "SGE_QMASTER_PORT", "SGE_ROOT"]
# Options of qstat that select jobs or change the output, and that no other option overrides without side effects.
FILTERS = ("-U", "-dj", "-dq", "-explain", "-f", "-F", "-g", "-help", "-j", "-l", "-pe", "-q", "-qs")
# Options of qsub that make it wait, print, hold a job, treat a script as a program, or end postgres together with its
# supervisor (see GridEngine), and that a job script cannot override; the options in the second list take yes or no.
BREAKING = ("-C", "-b", "-h", "-help", "-notify", "-now", "-soft", "-sync", "-t", "-verify")
ANSWERED = ("-b", "-now", "-sync")
# Options whose value is yes or no.
SWITCHES = ("R", "r")
# Resources that the hosts report. qsub ignores their values when it checks a job, and would refuse the job.
REPORTED = re.compile(r"(mem|virtual|swap)_\w+|(np_)?load_\w+|m_\w+|arch|cpu|num_proc")
MEMORIES = ("h_data", "h_rss", "h_vmem", "mem_free", "mem_total", "s_rss", "s_vmem", "virtual_free")
MEMORY = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?", re.ASCII)
TIME = re.compile(r"\d+|\d*:\d*:\d*", re.ASCII)


class GridEngine(Scheduler):
    """Sun Grid Engine and its descendants.

    Some methods are not overridden. A job script overrides all defaults (``overridden``). ``-w v`` considers all hosts
    and queues regardless of their state (``unavailable_command``) and refuses a job above every limit
    (``limit_command``). qstat does not abbreviate lists of nodes (``nodes_command``). Grid Engine cannot ask a single
    process to end (``ask_command``): with -notify, qdel sends a signal before it kills, but to every process of the
    job, and on that signal (USR2) postgres' checkpointer shuts down independently of its postmaster.
    """

    name = "gridengine"
    job_variable = "JOB_ID"
    can_share = False

    def environment(self, variables: Mapping[str, str], bin_dir: str) -> Dict[str, str]:
        """See Scheduler. A login over ssh may lack SGE_ROOT, so it is derived from ``bin_dir``."""
        found = re.fullmatch(r"(/.+)/bin/[^/]+/*", bin_dir)
        return {**({"SGE_ROOT": found[1]} if found else {}), **build_environment(variables, OWN_VARIABLES)}

    def check_environment(self, variables: Mapping[str, str], options: dict, setting: str) -> None:
        """Raise ValueError for an option in a file of defaults that prevents hosting a server.

        qsub reads no options from the environment; other defaults of a user or a site apply to every job alike.
        """
        check_defaults("request", BREAKING, "changes every job that qsub submits")

    def check_options(self, options: dict) -> None:
        """Raise ValueError for an option that qsub would misread, or that the caller must not set."""
        for flag, value in ((str(key), value) for key, value in options.items()):
            if not re.fullmatch(r"[A-Za-z][A-Za-z_]*", flag, re.ASCII):
                raise ValueError(f"{flag!r} is not an option of qsub; write for example l or pe, not -l or -pe")
            if flag in OWNED:
                raise ValueError(f"{flag}: hosting_job sets this itself, or cannot work with it")
            if flag == "l":
                check_resources(value)
            elif isinstance(value, (dict, list)):
                raise ValueError(f"{flag}: {value!r} is not a single value")
            elif re.search(r"[\0\r\n]", str(value)):
                raise ValueError(f"{flag}: {value!r} is more than one line")
            elif any(re.match(r"-\D|-$", word) for word in words_of(flag, value)):
                raise ValueError(f"{flag}: {value!r} contains another option")

    def server_options(self, options: dict, name: str, memory: str, notice: int, chain: bool) -> dict:
        """See Scheduler. The job waits until all jobs of its name in the queue have ended.

        After a node failure, the job runs again once Grid Engine has given up the node; its successor waits for that.
        """
        try:
            resources = parse_resources(options.get("l"))
        except ValueError:
            return options  # check_options refuses them
        if not set(MEMORIES) & set(resources):
            resources["mem_free"] = memory
        seconds = parse_time(resources.get("h_rt"))
        if seconds:
            resources = {"s_rt": max(seconds - notice, 1), **resources}
        return {"hold_jid": name, "r": True, **options, "l": resources}

    def short_options(self, options: dict) -> dict:
        try:
            resources = parse_resources(options.get("l"))
        except ValueError:
            return options  # check_options refuses them
        small = {key: "2G" if key.endswith("vmem") else "512M" for key in resources if key in MEMORIES}
        untied = {key: value for key, value in resources.items() if key not in ("exclusive", "h", "hostname", "s_rt")}
        return {**options, "a": False, "hold_jid": False, "r": False, "l": {**untied, **small, "h_rt": 300}}

    def submit_command(self, name: str, script: str, options: dict, output: str) -> List[str]:
        log = ["-o", check_output(output), "-j", "y"]
        return ["qsub", "-terse", "-N", name, *log, "-S", "/bin/sh", *flags(options), script]

    def parse_submit(self, text: str) -> Optional[str]:
        told = r"^\s*(?:Your job )?(\d+)(?: \(.*\) has been submitted)?\s*$"
        found = re.findall(told, text, re.ASCII | re.MULTILINE)
        return found[-1] if found else None

    def check_command(self, name: str, options: dict) -> Optional[List[str]]:
        """See Scheduler. The call fails for a job that can never start; without -w v, qsub would accept it."""
        judged = {key: value for key, value in parse_resources(options.get("l")).items() if not REPORTED.fullmatch(key)}
        return ["qsub", "-w", "v", "-N", name, *flags({**options, "l": judged}), "-b", "y", "/bin/true"]

    def batch_lines(self, name: str, number: int, folder: str, options: dict) -> List[str]:
        log = f"{check_output(folder)}/$JOB_ID.$TASK_ID.log"
        words = [["-N", name], ["-t", f"1-{number}"], ["-o", log], ["-j", "y"], ["-S", "/bin/sh"]]
        return [f"#$ {' '.join(map(shlex.quote, each))}" for each in words + pairs(options)]

    def batch_command(self, script: str) -> List[str]:
        return ["qsub", script]

    def check_batch_command(self, script: str, options: dict) -> Optional[List[str]]:
        """See Scheduler. Only the options are checked."""
        return self.check_command("check", options)

    def worker_name(self, cluster: str) -> str:
        task = "$(printf %s \"$JOB_ID.${SGE_TASK_ID:-undefined}\" | sed 's/[.]undefined$//')"
        return f"hpc_db {task}.${{RESTARTED:-0}} {cluster} $(uname -n) $$"

    def queue_command(self, name: str = "") -> List[str]:
        """See Scheduler. The list has all jobs of this user, with their requested resources."""
        return [*listing(), "-r", "-xml"]

    def parse_queue(self, text: str) -> List[dict]:
        jobs = []
        for job in job_list(text):
            state = state_of(job)
            limit = next((
                parse_time(each.text) for each in job.iter("hard_request") if each.get("name") == "h_rt"
            ), None)
            begun = start_of(job)
            jobs.append({
                "id": job.findtext("JB_job_number", ""),
                "name": job.findtext("JB_name", ""),
                "state": state,
                "node": node_of(job),
                "reason": reason_of(job),
                "time_left": limit if limit is None or begun is None else max(int(begun + limit - time.time()), 0),
                "time_limit": limit,
            })
        return jobs

    def jobs_command(self, ids: List[str]) -> List[str]:
        """See Scheduler. The list has one entry per job and node."""
        return [*listing(), "-g", "t", "-xml"]

    def parse_jobs(self, text: str) -> List[Job]:
        """See Scheduler. The id of an array's task is that of job and task, such as 12.3."""
        found: Dict[str, Job] = {}
        for job in job_list(text):
            task = job.findtext("tasks")
            number = job.findtext("JB_job_number", "") + (f".{task}" if task else "")
            before = found[number].nodes.split(",") if number in found else []
            nodes = ",".join(sorted({*before, node_of(job)} - {""}))
            restart = "1" if "R" in job.findtext("state", "") else "0"
            found[number] = Job(number, restart, state_of(job), start_of(job), nodes, job.findtext("JB_name", ""))
        return list(found.values())

    def is_hopeless(self, reason: str) -> bool:
        return reason.startswith("error")

    def state_command(self, job: str) -> Optional[List[str]]:
        return ["qstat", "-j", job]

    def has_ended(self, returncode: int, stdout: str, stderr: str) -> bool:
        """See Scheduler. Grid Engine does not know jobs that have ended. Empty output is inconclusive."""
        if returncode:
            return "jobs do not exist" in stdout + stderr
        return "<unknown_jobs" in stdout  # if a file of qstat's defaults has -xml

    def all_nodes_command(self) -> Optional[List[str]]:
        return ["qhost", "-xml"]

    def parse_nodes(self, text: str) -> List[str]:
        hosts = (host.get("name", "") for host in tree(text).iter("host"))
        return sorted(set(hosts) - {"", "global"})

    def cancel_command(self, job_id: str) -> List[str]:
        """Return the qdel call, which kills the job."""
        return ["qdel", job_id]


def check_resources(value: object) -> None:
    """Raise ValueError for a resource in option -l that qsub would misread."""
    for name, amount in parse_resources(value).items():
        if name in MEMORIES and not MEMORY.fullmatch(str(amount)):
            raise ValueError(f"l: {name}: {amount!r} is not an amount of memory; write for example 16G")
        if name in ("h_rt", "s_rt") and parse_time(amount) is None:
            raise ValueError(f'l: {name}: {amount!r} is not a time; write for example "72:00:00"')


def check_output(path: str) -> str:
    """Return the path unchanged. Raise ValueError if qsub would misread it."""
    if re.search(r"[:,$\\]", path):
        raise ValueError(f"output: {path!r} contains : , $ or \\, which qsub interprets")
    return path


def parse_resources(value: object) -> dict:
    """Return the resources requested by -l; ``value`` is a mapping, or a text as on qsub's command line."""
    if isinstance(value, str):
        value = {name: amount if equals else True for name, equals, amount in (
            part.partition("=") for part in value.split(",")
        )}
    if value is None or value is False:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"l: {value!r} are not resources; write for example {{h_rt: \"72:00:00\", mem_free: 16G}}")
    for name, amount in value.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", str(name), re.ASCII):
            raise ValueError(f"l: {name!r} is not a resource")
        if not re.fullmatch(r"[^\s,\0]+", str(amount)):
            raise ValueError(f"l: {name}: {amount!r} is not a single value")
    return dict(value)


def parse_time(value: object) -> Optional[int]:
    """Return a time in Grid Engine's format in seconds; None for no limit and for anything else."""
    text = str(value)
    if isinstance(value, bool) or not TIME.fullmatch(text):
        return None
    fields = [int(field or 0) for field in ("0:0:" + text).split(":")[-3:]]
    return (fields[0] * 60 + fields[1]) * 60 + fields[2]


def words_of(flag: str, value: object) -> List[str]:
    """Return the arguments of an option."""
    if flag == "l":
        asked = {name: "true" if amount is True else amount for name, amount in parse_resources(value).items()}
        return [",".join(f"{name}={amount}" for name, amount in sorted(asked.items()) if amount is not False)]
    if flag in SWITCHES and isinstance(value, bool):
        return ["y" if value else "n"]
    if value is True:
        return []
    try:
        return shlex.split(str(value))  # "smp 4" is two arguments
    except ValueError:
        raise ValueError(f"{flag}: {value!r} has an unbalanced quote") from None


def pairs(options: dict) -> List[List[str]]:
    """Return each option with its arguments: true makes an option without any, false and null are left out."""
    given = {
        flag: value for flag, value in options.items()
        if value is not None and value != {} and (value is not False or flag in SWITCHES)
    }
    return [[f"-{flag}", *words_of(flag, value)] for flag, value in sorted(given.items())]


def flags(options: dict) -> List[str]:
    """Return the options as one list of arguments for qsub."""
    return [word for pair in pairs(options) for word in pair]


def listing() -> List[str]:
    """Return the beginning of a qstat call for all jobs of this user.

    Defaults from files are overridden where possible; other defaults that hide jobs raise ValueError.
    """
    check_defaults("qstat", FILTERS, "changes what every qstat shows")
    return ["qstat", "-s", "prs", "-u", user()]


def check_defaults(command: str, refused: Sequence[str], effect: str) -> None:
    """Raise ValueError if a file of defaults, the user's or the site's, has one of the ``refused`` options."""
    root, cell = os.environ.get("SGE_ROOT", "/nonexistent"), os.environ.get("SGE_CELL", "default")
    home = pwd.getpwuid(os.geteuid()).pw_dir
    for path in (Path(home, f".sge_{command}"), Path(root, cell, "common", f"sge_{command}")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        words = [word for line in lines if not line.startswith("#") for word in line.split()]
        found = sorted(
            option for option, value in zip(words, [*words[1:], ""])
            if option in refused and not (option in ANSWERED and value in ("n", "no"))
        )
        if found:
            raise ValueError(f"{path}: the option {found[0]} {effect}; remove it there")


def user() -> str:
    """Return our user name; without one, qstat may list the jobs of all users."""
    return pwd.getpwuid(os.geteuid()).pw_name


def tree(text: str) -> ElementTree.Element:
    """Return the printed XML, without a site's own lines before and after it."""
    found = re.search(r"<\?xml[^>]*>\s*<(\w+).*</\1\s*>", text, re.DOTALL)
    try:
        return ElementTree.fromstring(found[0] if found else "")
    except ElementTree.ParseError:
        raise ValueError(f"the output is not XML: {text.strip()[:200]!r}") from None


def job_list(text: str) -> List[ElementTree.Element]:
    """Return the jobs in qstat's output."""
    return list(tree(text).iter("job_list"))


def state_of(job: ElementTree.Element) -> str:
    """Return the state by Slurm's name, which the modules use; an unknown state stays unchanged."""
    letters = job.findtext("state", "")
    if "d" in letters:
        return "COMPLETING"
    if "q" in letters:
        return "PENDING"
    if set(letters) & set("sSTN"):
        return "SUSPENDED"
    if "t" in letters:
        return "CONFIGURING"
    return "RUNNING" if "r" in letters else letters.upper()


def reason_of(job: ElementTree.Element) -> str:
    """Return why a job waits, as far as its state shows."""
    letters = job.findtext("state", "")
    if "E" in letters:
        return f"error, which qstat -j {job.findtext('JB_job_number')} explains"
    return "held" if "h" in letters else ""


def node_of(job: ElementTree.Element) -> str:
    """Return the host in all.q@host; empty for a waiting job."""
    return job.findtext("queue_name", "").partition("@")[2]


def start_of(job: ElementTree.Element) -> Optional[float]:
    """Return the start time of a job in seconds since 1970; None if it has not begun."""
    told = job.findtext("JAT_start_time", "").partition(".")[0]
    try:
        return datetime.datetime.strptime(told, "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:
        return None
