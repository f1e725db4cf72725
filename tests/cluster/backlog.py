#!/usr/bin/python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep whole-node jobs of this user in the queue: backlog.py MINUTES, a new job's wait if one node is left."""

from __future__ import annotations

import subprocess
import sys
import time

SECONDS = 30
JOB = ["sbatch", "--quiet", "--exclusive", "--nodes=1", "--time=1", "--chdir=/tmp", "--output=/dev/null",
       f"--wrap=exec sleep {SECONDS}"]


def main() -> None:
    wanted = int(sys.argv[1]) * 60 // SECONDS
    while True:
        asked = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%i"]
        listed = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=False)
        if listed.returncode == 0:
            for _job in range(wanted - len(listed.stdout.split())):
                subprocess.run(JOB, check=False)
        time.sleep(2)


if __name__ == "__main__":
    main()
