# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait until the server of an instance accepts connections: python wait.py ROOT INSTANCE PATIENCE MAX_WAIT.

Both limits are in seconds: PATIENCE counts from the last moment at which a server job was queued or running, MAX_WAIT
from the start.
"""

import random
import sys
import time

from outlook import Outlook  # the client package's, in the same folder

try:
    import psycopg2 as driver
except ImportError:
    import psycopg as driver


def main() -> None:
    """Try to connect until it succeeds; after the given time, exit with the last error."""
    root, instance = sys.argv[1:3]
    patience, max_wait = (float(argument) for argument in sys.argv[3:5])
    outlook = Outlook(root)
    begun = time.monotonic()
    limit, last = begun + patience, begun + max(patience, max_wait)
    told = None
    while True:
        try:
            driver.connect(f"service={instance}").close()
            return
        except driver.Error as error:
            next_job, now = outlook.next_job(), time.monotonic()
            if next_job and not outlook.is_in_workers:
                limit = max(limit, now + patience)
            if now >= min(limit, last):
                sys.exit(f"hpc_db: no server within {now - begun:.0f} s: {str(error).strip()}")
            if next_job != told:
                seconds = last - begun if next_job and not outlook.is_in_workers else patience
                print(f"hpc_db: waiting up to {seconds:.0f} s for the server: {next_job or str(error).strip()}",
                      file=sys.stderr, flush=True)
            told = next_job
        # Thousands of workers may wait for hours.
        time.sleep(random.uniform(0.5, 1.5) * max(2.0, min((now - begun) / 60, 30.0)))


if __name__ == "__main__":
    main()
