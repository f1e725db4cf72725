# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Release a lease whose holder has ended, if only the user can know that. Call it in <root>/host.

    python3 -m hpc_db_host.break_lease look     print the holder, how long ago its last heartbeat was, and how long
                                                "break" watches the heartbeat
    python3 -m hpc_db_host.break_lease break    watch the heartbeat, and release the lease if there is none

The lease is taken over as by any contender, except that the user answers instead of the scheduler. A holder that was
only frozen finds another epoch when it continues, and stops at once. A heartbeat overrides the user.
"""

import argparse
import json
import os
import socket
import sys

from . import files
from .layout import Layout
from .lease import Held, Lease, Lost, Unusable, describe
from .settings import complete

# How long to watch, as a multiple of the time without a heartbeat that allows a takeover.
WATCH_FACTOR = 1.5
HERE = Layout("..")


def look(lease: Lease) -> dict:
    """Return the holder in one line, None if there is none; the seconds since its heartbeat, and those to watch."""
    holder = lease.holder()
    if holder is None:
        return {"holder": None, "still": None, "watch": None}
    return {"holder": describe(holder), "still": lease.still(), "watch": WATCH_FACTOR * lease.silence(holder)}


def free(lease: Lease) -> dict:
    """Take the lease from a holder without a heartbeat, and release it; return what ``look`` found before."""
    found = look(lease)
    if found["holder"]:
        watched = found["watch"]
        try:
            lease.acquire(watched, lambda refused: None)
        except Held as held:
            raise SystemExit(
                "%s: the holder renewed the lease within %d s, or runs on this host, so the lease is kept"
                % (held, watched)
            ) from None
        lease.release()
    return found


def contender(folder: str) -> Lease:
    """Return a contender that takes the user's word that the holder has ended."""
    settings = complete(files.read_json(HERE.settings) or {})
    holder = {
        "host": socket.gethostname(), "pid": os.getpid(), "job": "", "kind": "bootstrap",
        "cluster": settings["cluster"],
    }
    return Lease(folder, holder, lambda _holder: True, settings["lease_ttl"])


def main() -> int:
    """Run the command line's verb and print the result as JSON."""
    parser = argparse.ArgumentParser(
        prog="hpc_db_host.break_lease", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("look", "break"))
    verb = parser.parse_args().verb
    os.umask(0o077)
    try:
        sys.stdout.write(json.dumps((free if verb == "break" else look)(contender(HERE.run))) + "\n")
    except (Lost, Unusable, OSError) as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
