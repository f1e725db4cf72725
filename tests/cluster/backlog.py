#!/usr/bin/python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep whole-node jobs of this user in the queue, so that a new job has to wait for tens of minutes."""

from __future__ import annotations

import subprocess
import time

# With a limit of a minute each, as many minutes on one node.
WAITING = 60
SECONDS = 30
JOB = ["sbatch", "--quiet", "--exclusive", "--nodes=1", "--time=1", "--chdir=/tmp", "--output=/dev/null",
       f"--wrap=exec sleep {SECONDS}"]


def main() -> None:
    while True:
        asked = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%i"]
        listed = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=False)
        if listed.returncode == 0:
            for _job in range(WAITING - len(listed.stdout.split())):
                subprocess.run(JOB, check=False)
        time.sleep(2)


if __name__ == "__main__":
    main()
