# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Health: whether workers can write now. Watched beside the main loop, so that a probe that hangs delays nothing."""

import errno
import os

from .postgres import Postgres
from .threads import Repeat

# What the file system must have left: less than one WAL segment (16 MiB), so it is seen before PostgreSQL stops.
SPARE_BYTES = 1024 * 1024
# What is written again and again: more at once than file systems compress, and soon made.
BLOCK_BYTES = 256 * 1024

HEALTHY = ""


class Health(Repeat):
    """Probes the server every ``probe_seconds``; ``reason`` says in one line what is wrong, "" if nothing is."""

    def __init__(self, settings: dict, postgres: Postgres) -> None:
        self.reason = HEALTHY
        self._data = settings["data"]
        self._postgres = postgres
        self._seconds = settings["probe_seconds"]
        Repeat.__init__(self, self._seconds, self._probe)

    def _probe(self) -> float:
        self.reason = space(self._data) or self._postgres.probe()
        return self._seconds


def space(data: str) -> str:
    """Take a little space beside the data directory and give it back; say why if that fails."""
    path = os.path.join(os.path.dirname(data), ".space.%d" % os.getpid())
    try:
        with open(path, "wb") as spare:
            block = os.urandom(BLOCK_BYTES)  # not zeros, which some file systems do not store
            for _again in range(SPARE_BYTES // BLOCK_BYTES):
                spare.write(block)
            spare.flush()
            os.fsync(spare.fileno())
    except OSError as error:
        reasons = {errno.ENOSPC: "disk full", errno.EDQUOT: "quota exceeded"}
        return "%s: %s" % (reasons.get(error.errno or 0, error.strerror), os.path.dirname(data))
    finally:
        try:
            os.unlink(path)
        except OSError:
            pass  # it was not made
    return HEALTHY
