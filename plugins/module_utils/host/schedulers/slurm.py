# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's commands, and parsers for their output."""

import math
import os
import re
import shlex
from typing import Dict, List, Mapping, Optional

from .base import INHERITED, Job, Scheduler, build_environment, megabytes

# Options that the module sets itself, and options that make sbatch wait, print, or submit to another cluster.
OWNED = (
    "array", "clusters", "error", "help", "input", "job-name", "open-mode", "output", "parsable", "quiet",
    "test-only", "usage", "verbose", "version", "wait", "wrap",
)
# Options that every job script of the collection sets.
HEAD = ("array", "job-name", "output")
# Options that may be set by sbatch's variables without an error: they do not affect a job with a new environment, or
# Slurm itself sets the variable inside a job.
UNTOLD = re.compile(r"debug|export|get-user-env|ignore-pbs|mem-bind.*|threads-per-core")
RENAMED = {
    "array-inx": "array", "burst-buffer": "bb", "cpu-freq-req": "cpu-freq", "mem-per-node": "mem",
    "req-switch": "switches", "segment-size": "segment", "timelimit": "time", "wait4switch": "switches",
}
# States of jobs without processes. In any other state a job may have some, also in these: REVOKED (it may run on
# another cluster of a federation), LAUNCH_FAILED.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}
# List the same jobs at every site: with hidden partitions and just-ended jobs, without other clusters.
LISTING = ["squeue", "--all", "--local", "--states=all"]
# The variables by which Slurm's commands find the cluster.
OWN_VARIABLES = ("SLURM_CONF", "SLURM_JWT")
# srun's options for a program beside the job's script, on its first node.
STEP = [
    "--overlap", "--quiet", "--nodes=1", "--ntasks=1", "--relative=0", "--mem=0", "--gres=none",
    "--cpu-bind=none", "--mpi=none", "--input=none", "--job-name=hpc_db",
]
# Reasons that do not resolve by waiting: the job has to be changed, or somebody has to release it.
# This includes limits per job or node, but not limits on all jobs of a user, group or account,
# and not PartitionNodeLimit, which Slurm also reports while nodes are down.
HOPELESS = re.compile(
    r"AccountNotAllowed|BadConstraints|DeadLine|DependencyNeverSatisfied|InvalidAccount|InvalidQOS"
    r"|JobHeld(Admin|User)|JobHoldMaxRequeue|MaxMemPerLimit|PartitionConfig|PartitionTimeLimit"
    r"|QOSMin\w+|QOSNotAllowed|Reservation(Deleted|Invalid)|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?"
)
# Reasons that resolve when another job of this user, account or QOS ends; not limits of one job, or on consumed time.
JOB_LIMIT = re.compile(r"(Assoc|QOS)(Max|Grp)(?!\w*(Minutes|Wall|Per(Job|Node)))|MaxJobsPerAccount|DependencySingleton")
# Refusals by --test-only that may be temporary: the job may only have to wait for nodes.
PASSING = re.compile(
    r"Requested node configuration is not available|Requested nodes are busy"
    r"|Required node not available \(down, drained or reserved\)"
)
# Node states in which no job begins. The signs mark nodes that do not respond, or are under maintenance.
OUT = re.compile(r"down|drain|fail|inval|maint|reserved|reboot|power|unknown|[*$@^!%]", re.IGNORECASE)
# Flags that select nodes by properties that are not parsed here.
CHOOSING = re.compile(r"--((cluster-)?constraint|exclu|gpus|gres=|node(file|list)|reservation|tmp|tres-)")
MEMORY = re.compile(r"\d+([KMGT]B?)?", re.ASCII | re.IGNORECASE)
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}", re.ASCII)


class Slurm(Scheduler):
    """Slurm 20.11 or newer."""

    name = "slurm"
    job_variable = "SLURM_JOB_ID"
    no_handover = "server_handover_after, or dependency in server_job_options"

    def environment(self, variables: Mapping[str, str], bin_dir: str) -> Dict[str, str]:
        """See Scheduler. Times are printed in seconds since 1970."""
        return {**build_environment(variables, OWN_VARIABLES), "SLURM_TIME_FORMAT": "%s"}

    def check_environment(self, variables: Mapping[str, str], options: dict, setting: str) -> None:
        """Raise ValueError for an option that is set only by a variable of sbatch's, since no job here gets those."""
        for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
            if variables.get(name) and "clusters" not in options:
                raise ValueError(
                    f"{setting}: clusters: your login shell sets {name}={variables[name]!r}, "
                    "but all jobs go to the cluster that this login node belongs to; "
                    "use a login node of that cluster, or set clusters: false here if it is this one"
                )
        for name, flag in flags_of(variables).items():
            memory = flag.startswith("mem") and any(str(option).startswith("mem") for option in options)
            if not (flag in options or flag in OWNED or memory or UNTOLD.fullmatch(flag)):
                raise ValueError(
                    f"{setting}: {flag}: not set, but your login shell sets {name}={variables[name]!r}, "
                    f"which is not passed to jobs; set {flag} here, or to false if the job needs none"
                )

    def overridden(self, variables: Mapping[str, str], options: dict, setting: str) -> List[str]:
        return [
            f"{setting}: {flag} in the job script has no effect while your shell sets {name}={variables[name]!r}, "
            f"which takes precedence; unset {name} before you submit it"
            for name, flag in flags_of(variables).items()
            if flag in HEAD or options.get(flag) not in (None, False, True) and str(options[flag]) != variables[name]
        ]

    def check_options(self, options: dict) -> None:
        """Raise ValueError for an option that sbatch would misread, or that the caller must not set."""
        for flag, value in ((str(key), value) for key, value in options.items()):
            if not re.fullmatch(r"[a-z][a-z0-9-]+", flag, re.ASCII):
                raise ValueError(f"{flag!r} is not a long option of sbatch; write for example mem, not --mem or m")
            if flag == "clusters" and options[flag] is False:
                continue  # this cluster, regardless of the login environment
            # sbatch accepts abbreviated flags.
            if any(owned.startswith(flag) for owned in OWNED):
                raise ValueError(f"{flag}: hosting_job sets this itself, or cannot work with it")
            if isinstance(value, (dict, list)):
                raise ValueError(f"{flag}: {value!r} is not a single value")
            if re.search(r"[\0\r\n]", str(value)):
                raise ValueError(f"{flag}: {value!r} is more than one line")
            if value is None or value is False:
                continue
            if flag in ("mem", "mem-per-cpu", "mem-per-gpu") and not MEMORY.fullmatch(str(value)):
                raise ValueError(f"{flag}: {value!r} is not an amount of memory; write for example 16G")
            if flag in ("time", "time-min"):
                if isinstance(value, int):
                    raise ValueError(f'{flag}: {value} is how YAML reads an unquoted time; quote it: "72:00:00"')
                if parse_time(str(value)) is None:
                    raise ValueError(f"{flag}: {value!r} is not a time; write for example 72:00:00 or 3-00:00:00")

    def server_options(self, options: dict, name: str, memory: str, notice: int, chain: bool) -> dict:
        """See Scheduler. With a chain, the successor takes over after a node failure, so the job is not requeued.

        A requeued job waits 2 minutes, until Slurm's credentials expire, and its successor would wait as well.
        """
        signal = f"B:USR1@{notice}"
        return {"mem": memory, "dependency": "singleton", "signal": signal, "no-requeue": chain, **options}

    def handover_options(self, options: dict, job: str, seconds: float) -> dict:
        """See Scheduler. The job gains priority by age as soon as it may begin."""
        return {"dependency": f"after:{job}+{math.ceil(seconds / 60)}?afterany:{job}", **options}

    def is_dependency_refused(self, refusal: str) -> bool:
        """See Scheduler. Slurm before 20.11 does not understand the time."""
        return "dependency" in refusal.lower()

    def short_options(self, options: dict) -> dict:
        untied = dict.fromkeys(("begin", "dependency", "exclusive", "nodelist", "signal"), False)
        return {**options, "time": "00:05:00", "mem": "512M", **untied}

    def submit_command(self, name: str, script: str, options: dict, output: str) -> List[str]:
        log = [f"--output={output.replace('%', '%%')}", "--open-mode=append"]
        return ["sbatch", "--parsable", f"--job-name={name}", *log, *flags(options), script]

    def parse_submit(self, text: str) -> Optional[str]:
        return parse_submitted(text)

    def check_command(self, name: str, options: dict) -> Optional[List[str]]:
        return ["sbatch", "--test-only", f"--job-name={name}", *flags(options), "--wrap=:"]

    def limit_command(self, options: dict) -> Optional[List[str]]:
        """Return a call that prints the time limits of the requested partitions.

        Slurm accepts a job above its partition's limit and leaves it pending for ever. The limit is not checked with
        a QOS, which may lift it, nor without a partition, since the site then decides where the job runs.
        """
        if options.get("qos") or not (options.get("partition") and options.get("time")):
            return None
        return ["sinfo", "--noheader", "--local", "--format=%R|%l", f"--partition={options['partition']}"]

    def check_limit(self, text: str, options: dict) -> None:
        limits = dict(re.findall(r"^[ \t]*([^\s|]+)\|(\S+)[ \t]*$", text, re.MULTILINE))
        longest = max((parse_time(limit) or math.inf for limit in limits.values()), default=math.inf)
        if (parse_time(str(options["time"])) or 0) > longest:
            known = ", ".join(f"{partition} {limit}" for partition, limit in sorted(limits.items()))
            raise ValueError(f"time: {options['time']} is above the limit ({known}), the job would never start")

    def unavailable_command(self, refusal: str) -> Optional[List[str]]:
        """Return a call that prints the nodes, if a refusal by ``--test-only`` may be temporary.

        ``--test-only`` considers only nodes that are up; a real submission considers all nodes.
        """
        if not PASSING.search(refusal):
            return None
        # All partitions, since a hidden one may be requested; sinfo accepts no --partition together with --all.
        return ["sinfo", "--noheader", "--local", "--all", "--exact", "--Node", "--format=%P|%a|%N|%T|%m|%c"]

    def parse_unavailable(self, text: str, options: dict) -> str:
        rows = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 5]
        if options.get("partition"):
            rows = [row for row in rows if row[0].rstrip("*") in str(options["partition"]).split(",")]
        else:
            rows = [row for row in rows if row[0].endswith("*")] or rows  # the default partition
        rows = [row for row in rows if row[4].isdigit() and row[5].isdigit()]
        cpus = whole(options.get("cpus-per-task")) * whole(options.get("ntasks-per-node"))
        memory = max(megabytes(options.get("mem")), megabytes(options.get("mem-per-cpu")) * cpus)
        fitting = {row[2]: row for row in rows if int(row[4]) >= memory and int(row[5]) >= cpus}
        there = {name: row for name, row in fitting.items() if not OUT.search(row[3])}
        shut = sorted({f"partition {row[0].rstrip('*')} {row[1]}" for row in fitting.values() if row[1] != "up"})
        chosen = any(CHOOSING.match(flag) for flag in flags(options))
        if not suffice(fitting, options) or (not shut and not chosen and suffice(there, options)):
            return ""
        return ", ".join(shut or [f"{name} {fitting[name][3]}" for name in sorted(fitting.keys() - there.keys())])

    def batch_lines(self, name: str, number: int, folder: str, options: dict) -> List[str]:
        log = f"{folder.replace('%', '%%')}/%A_%a.log"
        head = [f"--job-name={name}", f"--array=1-{number}", f"--output={log}"]
        return [f"#SBATCH {shlex.quote(flag)}" for flag in head + flags(options)]

    def batch_command(self, script: str) -> List[str]:
        return ["sbatch", script]

    def check_batch_command(self, script: str, options: dict) -> Optional[List[str]]:
        return ["sbatch", "--test-only", script]

    def worker_name(self, cluster: str) -> str:
        return f"hpc_db $SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}} {cluster} $(uname -n) $$"

    def step_command(self, bin_dir: str) -> str:
        """See Scheduler. The step shares all resources of the job, and does not delay other steps.

        The options of the job and of its script, which srun would read from the environment, are not for this step.
        """
        kept = (*INHERITED, *OWN_VARIABLES, "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
        variables = [f'${{{name}+"{name}=${name}"}}' for name in kept]
        path = os.path.join(bin_dir, "srun")
        srun = f'"$HOME"{shlex.quote(path[1:])}' if path.startswith("~/") else shlex.quote(path)
        return " ".join(["env", "-i", *variables, srun, *STEP])

    def queue_command(self, name: str = "") -> List[str]:
        """See Scheduler. squeue compares names without case. A running task of an array has an id of its own."""
        return [*LISTING, "--me", *([f"--name={name}"] if name else []), "--format=%A|%T|%N|%L/%l|%j|%r"]

    def parse_queue(self, text: str) -> List[dict]:
        """See Scheduler. An unknown state is data, not an error."""
        return read_queue(listed(text))

    def jobs_command(self, ids: List[str]) -> List[str]:
        fields = ("JobID", "RestartCnt", "State", "StartTime", "NodeList", "Name")
        return [*LISTING, "--me", f"--Format={','.join(f'{field}:|' for field in fields)}"]

    def parse_jobs(self, text: str) -> List[Job]:
        return read_jobs(listed(text))

    def is_job_limit(self, reason: str) -> bool:
        """See Scheduler. Limits on processors, nodes or memory of all jobs count as well."""
        return bool(JOB_LIMIT.match(reason))

    def forecast_command(self, job: str) -> Optional[List[str]]:
        return [*LISTING, "--noheader", "--format=forecast|%V|%S|", f"--jobs={job}"]

    def parse_forecast(self, text: str) -> Dict[str, Optional[float]]:
        """See Scheduler. Slurm plans only for the first jobs in the queue."""
        found = re.search(r"^forecast\|(\d*)[^|]*\|(\d*)", text, re.ASCII | re.MULTILINE)
        submitted, expected = found.groups() if found else ("", "")
        return {
            "submitted": float(submitted) if submitted else None, "expected": float(expected) if expected else None,
        }

    def is_hopeless(self, reason: str) -> bool:
        """See Scheduler. Details may follow the reason after a comma."""
        return bool(HOPELESS.fullmatch(reason.partition(",")[0].strip()))

    def state_command(self, job: str) -> Optional[List[str]]:
        return [*LISTING, "--noheader", "--format=job|%T|", f"--jobs={job}"]

    def has_ended(self, returncode: int, stdout: str, stderr: str) -> bool:
        """See Scheduler. A job that Slurm does not know any more has ended.

        Output that is empty, truncated, or consists only of a site's own lines is inconclusive.
        """
        if returncode:
            return "Invalid job id specified" in stdout + stderr
        states = re.findall(r"^job\|(.*)$", stdout, re.MULTILINE)
        return bool(states) and all(state.endswith("|") and state[:-1] in ENDED for state in states)

    def run_command(self, job: str) -> Optional[List[str]]:
        return [*LISTING, "--noheader", "--Format=JobID:|,RestartCnt:|,State:|", f"--jobs={job}"]

    def run_has_ended(self, job: str, run: str, returncode: int, stdout: str, stderr: str) -> bool:
        """See Scheduler. Other tasks of an array are listed too, if one task has the array's id."""
        if returncode:
            return "Invalid job id specified" in stdout + stderr
        runs = re.findall(rf"^{job}\|(\d+)\|(\w+)\|\s*$", stdout, re.ASCII | re.MULTILINE)
        return bool(runs) and all(
            state in ENDED or int(restarts) > int(run) and state != "COMPLETING" for restarts, state in runs
        )

    def all_nodes_command(self) -> Optional[List[str]]:
        return ["sinfo", "--noheader", "--all", "--local", "--Node", "--format=%t|%N"]

    def parse_nodes(self, text: str) -> List[str]:
        found = (line.strip().partition("|")[2] for line in text.splitlines())  # no bar: a site's own message
        return sorted({nodes for nodes in found if nodes})

    def nodes_command(self, nodes: str) -> Optional[List[str]]:
        return ["scontrol", "show", "hostnames", nodes]

    def parse_hosts(self, text: str) -> List[str]:
        """See Scheduler. Sites may print their own lines before and after the nodes."""
        return re.findall(r"^[ \t]*(\w[\w.-]*)[ \t]*$", text, re.MULTILINE)

    def ask_command(self, job_id: str) -> Optional[List[str]]:
        """See Scheduler. The signal goes only to the job script, which is the supervisor."""
        return ["scancel", "--batch", "--signal=TERM", job_id]

    def cancel_command(self, job_id: str) -> List[str]:
        """Return the scancel call, which returns 0 also for a job that has already ended.

        It signals every process of the job, including postgres and each of its sessions.
        """
        return ["scancel", job_id]

    def cancel_waiting_command(self, job_id: str) -> List[str]:
        return ["scancel", "--state=PENDING", job_id]


def parse_time(text: str) -> Optional[float]:
    """Return a time in Slurm's format in seconds; inf for no limit, None for anything else."""
    if text.lower() in ("infinite", "unlimited"):
        return math.inf
    if not TIME.fullmatch(text):
        return None
    days, dash, clock = text.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if not dash and len(fields) < 3:  # the first field is minutes; after days, or with three fields, it is hours
        fields.insert(0, 0)
    hours, minutes, seconds = (fields + [0, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def whole_seconds(text: str) -> Optional[int]:
    """Return a time in Slurm's format in seconds; None for no limit and for anything else."""
    seconds = parse_time(text)
    return None if seconds is None or math.isinf(seconds) else int(seconds)


def flags(options: dict) -> List[str]:
    """Return the options as flags: true makes a flag without a value, false and null are left out."""
    return [
        f"--{flag}" if value is True else f"--{flag}={value}"
        for flag, value in sorted(options.items())
        if value is not False and value is not None
    ]


def flags_of(variables: Mapping[str, str]) -> Dict[str, str]:
    """Return the flag of each variable that sbatch reads as an option."""
    words = {name: name[7:].lower().replace("_", "-") for name in sorted(variables) if name.startswith("SBATCH_")}
    return {name: RENAMED.get(word, word) for name, word in words.items()}


def suffice(nodes: dict, options: dict) -> bool:
    """Return whether these nodes, each with its CPUs as the last field, are enough for all of the job's tasks."""
    cpus = whole(options.get("ntasks")) * whole(options.get("cpus-per-task"))
    return len(nodes) >= whole(options.get("nodes")) and sum(int(row[5]) for row in nodes.values()) >= cpus


def whole(value: object) -> int:
    """Return a number as sbatch reads it; the lower one of a range such as 1-2; 1 for none."""
    found = re.match(r"\d+", str(value), re.ASCII)
    return int(found[0]) if found else 1


def parse_submitted(text: str) -> Optional[str]:
    """Return the id of the new job, alone or in a sentence, ignoring lines of the site; None if there is none."""
    found = re.findall(r"^\s*(?:Submitted batch job )?(\d+)(?:;.*| on cluster \S+)?\s*$", text, re.ASCII | re.MULTILINE)
    return found[-1] if found else None


def listed(text: str) -> str:
    """Return squeue's output below its header. Raise ValueError without a header: that is not even an empty list."""
    found = re.search(r"^JOBID\|.*$", text, re.MULTILINE)
    if not found:
        raise ValueError(f"squeue: the output is not a list of jobs: {text.strip()[:200]!r}")
    return text[found.end():]


def read_queue(text: str) -> List[dict]:
    """Return the jobs in the format of ``queue_command``, without its header."""
    jobs = []
    for line in text.splitlines():
        if line.count("|") < 5:  # a site's own message
            continue
        job_id, state, node, left, name, reason = line.strip().split("|", 5)
        if state.upper() in ENDED:
            continue
        left, _slash, limit = left.partition("/")
        jobs.append({
            "id": job_id,
            "name": name,
            "state": state.upper(),
            "node": node,
            "reason": "" if reason == "None" else reason,
            "time_left": whole_seconds(left),
            "time_limit": whole_seconds(limit),
        })
    return jobs


def read_jobs(text: str) -> List[Job]:
    """Return the jobs in the format of ``jobs_command``, without its header."""
    jobs = []
    for line in text.splitlines():
        if line.count("|") < 6:  # a site's own message
            continue
        job_id, restart, state, start, nodes, name = line.strip().rsplit("|", 1)[0].split("|", 5)
        begun = float(start) if start.isdigit() else None
        if state.upper() not in ENDED:
            jobs.append(Job(job_id, restart, state.upper(), begun, nodes, name))
    return jobs
