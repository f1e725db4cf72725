# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait until the server of an instance accepts connections: python wait.py ROOT INSTANCE PATIENCE MAX_WAIT.

The limits are in seconds: PATIENCE from the last moment at which a server job was known to follow, MAX_WAIT from the
beginning.
"""

import json
import os
import sys
import time

try:
    import psycopg2 as driver
except ImportError:
    import psycopg as driver


def read_follows(root: str) -> str:
    """Return what follows the last server, as the server job has written it; empty if nothing does."""
    try:
        with open(os.path.join(root, "run", "state.json"), encoding="utf-8") as stream:
            return str((json.load(stream).get("follows") or {}).get("told", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def main() -> None:
    """Try to connect until it succeeds; after the given time, exit with the last error."""
    root, instance, patience, longest = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    limit = time.monotonic() + patience
    last = time.monotonic() + max(patience, longest)
    told = None
    while True:
        try:
            driver.connect(f"service={instance}").close()
            return
        except driver.Error as error:
            follows = read_follows(root)
            if follows:
                limit = max(limit, time.monotonic() + patience)
            if time.monotonic() >= min(limit, last):
                seconds = longest if last < limit else patience
                sys.exit(f"hpc_db: no server within {seconds:.0f} s: {str(error).strip()}")
            if follows != told:
                words = f", up to {longest:.0f} s: {follows}" if follows else f" up to {patience:.0f} s"
                print(f"hpc_db: waiting for the server{words}", file=sys.stderr, flush=True)
            told = follows
        time.sleep(2)


if __name__ == "__main__":
    main()
