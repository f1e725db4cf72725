#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure, on the login node, the times from sbatch to an empty job's start, and to a server's first accepted write.

Prints both in seconds. The instance must exist, and the user must have no job in the queue.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

LONGEST = 120.0
WRITE = """
import sys, time, psycopg2
limit = time.time() + float(sys.argv[2])
while True:
    try:
        connection = psycopg2.connect(service=sys.argv[1])
        connection.cursor().execute("CREATE TABLE bench_start_up (at float)")
        connection.rollback()
        print(time.time())
        break
    except psycopg2.Error:
        if time.time() > limit:
            raise
        time.sleep(0.01)
"""


def submit(command: list[str]) -> float:
    """Submit a job; return the time before the submission."""
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return began


def wait(condition: Callable[[], object]) -> None:
    limit = time.time() + LONGEST
    while not condition():
        if time.time() > limit:
            sys.exit("start_up.py: it takes too long")
        time.sleep(0.01)


def queue_is_empty() -> bool:
    return not subprocess.run(["squeue", "--me", "-h"], check=True, stdout=subprocess.PIPE).stdout


def empty_job(folder: Path, partition: str) -> float:
    """Return the seconds that Slurm needs to start a job that only reports its start."""
    script, said = folder / "empty.sh", folder / "said"
    script.write_text(f"#!/bin/sh\ndate +%s.%N >'{said}.new' && mv '{said}.new' '{said}'\n")
    began = submit(["sbatch", "--parsable", "--output=/dev/null", f"--partition={partition}", str(script)])
    wait(said.exists)
    taken = float(said.read_text()) - began
    said.unlink()
    wait(queue_is_empty)
    return taken


def first_write(root: Path) -> float:
    """Return the seconds until the job's server accepts a write over the workers' connection."""
    settings = json.loads((root / "host" / "settings.json").read_text())
    # The call that submits a successor equals the call with which hpc_db.yml submits the first job.
    sys.path.insert(0, str(root / "host"))
    from hpc_db_host.scheduler import Queue

    writer = subprocess.Popen(
        [root / "python" / "bin" / "python", "-c", WRITE, settings["instance"], str(LONGEST)],
        stdout=subprocess.PIPE, text=True,
    )
    began = submit(Queue(settings, "").successor_command())
    return float(writer.communicate()[0]) - began


if __name__ == "__main__":
    instance = Path(sys.argv[1]).expanduser()
    print(empty_job(instance / "log", sys.argv[2]), first_write(instance))
