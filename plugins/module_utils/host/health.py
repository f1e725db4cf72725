# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check regularly whether workers can write. Runs in its own thread, so that a probe that hangs delays nothing."""

import errno
import os

from .postgres import Postgres
from .threads import Repeat

# Free space that must be available. It is less than one WAL segment (16 MiB), so that a full disk is noticed before
# PostgreSQL stops.
SPARE_BYTES = 1024 * 1024
# Size of the block that is written repeatedly: larger than file systems compress at a time, and quick to generate.
BLOCK_BYTES = 256 * 1024

HEALTHY = ""


class Health(Repeat):
    """Probe the server every ``probe_seconds``; ``reason`` is the problem in one line, "" if there is none."""

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
    """Allocate and release a little space next to the data directory; return the reason if that fails, else ""."""
    path = os.path.join(os.path.dirname(data), ".space.%d" % os.getpid())
    try:
        with open(path, "wb") as spare:
            block = os.urandom(BLOCK_BYTES)  # random: some file systems do not store zeros
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
            pass  # it was not created
    return HEALTHY
