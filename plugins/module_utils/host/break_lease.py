# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a lease of which only the user can know that its holder is gone. Call it in <root>/host.

    python3 -m hpc_db_host.break_lease look     print who holds it, how long the heartbeat has stood still, and for how
                                                long "break" watches it
    python3 -m hpc_db_host.break_lease break    watch the heartbeat, and free the lease if that stands still

It is broken as any contender takes it over, with the user's word in the place of the scheduler's: a holder that was
frozen and comes back finds another epoch and stops at once. A heartbeat that moves is believed more than the user.
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

# How much longer to watch than its heartbeat has to stand still.
WATCH_FACTOR = 1.5
HERE = Layout("..")


def look(lease: Lease) -> dict:
    """Return in one line who holds the lease, None if nobody does; how long it stands still, and is to be watched."""
    holder = lease.holder()
    if holder is None:
        return {"holder": None, "still": None, "watch": None}
    return {"holder": describe(holder), "still": lease.still(), "watch": WATCH_FACTOR * lease.silence(holder)}


def free(lease: Lease) -> dict:
    """Take the lease from a holder that shows no life, and release it; return who that was."""
    found = look(lease)
    if found["holder"]:
        watched = found["watch"]
        try:
            lease.acquire(watched, lambda refused: None)
        except Held as held:
            raise SystemExit(
                "%s, who has renewed the lease in the %d s of watching, or runs on this host: it is not broken"
                % (held, watched)
            ) from None
        lease.release()
    return found


def contender(folder: str) -> Lease:
    """Return the view of somebody who believes the user that the holder has ended."""
    settings = complete(files.read_json(HERE.settings) or {})
    holder = {
        "host": socket.gethostname(), "pid": os.getpid(), "job": "", "kind": "bootstrap",
        "cluster": settings["cluster"],
    }
    return Lease(folder, holder, lambda _holder: True, settings["lease_ttl"])


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="hpc_db_host.break_lease", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("look", "break"))
    verb = parser.parse_args().verb
    os.umask(0o077)
    try:
        print(json.dumps((free if verb == "break" else look)(contender(HERE.run))))
    except (Lost, Unusable, OSError) as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
