# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait until the server of an instance accepts connections: python wait.py INSTANCE SECONDS."""

import sys
import time

try:
    import psycopg2 as driver
except ImportError:
    import psycopg as driver


def main() -> None:
    """Try to connect until it succeeds; after the given time, exit with the last error."""
    instance, patience = sys.argv[1], float(sys.argv[2])
    limit = time.monotonic() + patience
    told = False
    while True:
        try:
            driver.connect(f"service={instance}").close()
            return
        except driver.Error as error:
            if time.monotonic() >= limit:
                sys.exit(f"hpc_db: no server within {patience:.0f} s: {str(error).strip()}")
            if not told:
                print(f"hpc_db: waiting up to {patience:.0f} s for the server", file=sys.stderr, flush=True)
        told = True
        time.sleep(2)


if __name__ == "__main__":
    main()
