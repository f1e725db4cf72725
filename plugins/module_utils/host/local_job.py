# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A scheduler for one machine, with one job per instance. Call it in <root>/host.

    python3 -m hpc_db_host.local_job submit --name NAME --script SCRIPT --output LOG    print the id
    python3 -m hpc_db_host.local_job queue                                              print the job
    python3 -m hpc_db_host.local_job cancel ID                                          send SIGTERM
    python3 -m hpc_db_host.local_job processes PID...                                   print those that run

The queue is printed in the format of `squeue --format=%A|%T|%N|%L|%j|%r`; the id is the PID. Processes are printed as
PID, start time in the kernel's ticks, state, start time in seconds (always empty), host and name, with a | after each.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from typing import List, Optional

from . import files, processes
from .layout import Layout

RECORD = Layout("..").local_job


def live_job() -> Optional[dict]:
    """Return the recorded job if its process still runs, and is not another one with the same PID."""
    job = files.read_json(RECORD)
    if not job or job["host"] != processes.this_host():
        return None
    started = processes.start_time(int(job["id"]))
    return job if started and started == job["started"] else None


def submit(name: str, script: str, output: str) -> str:
    """Start the script so that it outlives the caller and its connection; return its id."""
    job = live_job()
    if job:
        raise SystemExit("job %(id)s (%(name)s) of this instance is already running" % job)
    os.umask(0o077)
    # A job that is started inside an allocation does not belong to it.
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    with open(output, "ab") as log:
        process = subprocess.Popen(
            ["bash", script], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )
    try:
        record(name, process.pid)
    except OSError:
        process.kill()  # without its record, nobody could find the job
        raise
    return str(process.pid)


def record(name: str, pid: int) -> None:
    """Record a process as the job."""
    job = {"id": str(pid), "name": name, "started": processes.start_time(pid), "host": processes.this_host()}
    files.write_json(RECORD, dict(job, since=time.time()))


def forget(pid: int) -> None:
    """Record that a process no longer is the job."""
    if (files.read_json(RECORD) or {}).get("id") == str(pid):
        files.write_json(RECORD, {})


def queue() -> str:
    """Return the line of the running job; empty if there is none."""
    job = live_job()
    if not job:
        return ""
    return "|".join([job["id"], "RUNNING", socket.gethostname(), "UNLIMITED", job["name"], "None"]) + "\n"


def running(pids: List[str]) -> str:
    """Return a line for each running process; the start time distinguishes processes with the same PID."""
    started = ((pid, processes.start_time(int(pid))) for pid in pids if pid.isdigit())
    line = "%s|%s|RUNNING||" + socket.gethostname() + "|process|\n"
    return "".join(line % (pid, time_) for pid, time_ in started if time_)


def cancel(job_id: str) -> None:
    """Send SIGTERM to the job. As with scancel, an id that is not in the queue is not an error."""
    job = live_job()
    if job and job["id"] == job_id:
        os.kill(int(job_id), signal.SIGTERM)


def main() -> int:
    """Run the command line's verb."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hpc_db_host.local_job", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb")
    verbs.required = True  # add_subparsers has no such argument before Python 3.7
    submitting = verbs.add_parser("submit")
    for option in ("--name", "--script", "--output"):
        submitting.add_argument(option, required=True)
    verbs.add_parser("queue")
    verbs.add_parser("cancel").add_argument("job_id", metavar="ID")
    verbs.add_parser("processes").add_argument("pids", metavar="PID", nargs="*")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "submit":
            sys.stdout.write("%s\n" % submit(arguments.name, arguments.script, arguments.output))
        elif arguments.verb == "cancel":
            cancel(arguments.job_id)
        elif arguments.verb == "processes":
            sys.stdout.write(running(arguments.pids))
        else:
            sys.stdout.write(queue())
    except OSError as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
