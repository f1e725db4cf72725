# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper renews the lease while a process of ours may have the data directory open.

It uses its own threads, so that nothing delays it: a slow checkpoint, programs loaded from a slow file system,
pg_upgrade. If the lease is lost, all processes below this one are killed at once. A clean shutdown would write a
checkpoint into a data directory that now belongs to another holder.
"""

import contextlib
import os
import threading

from . import processes
from .lease import Lease, Lost
from .threads import Repeat

# Seconds between two checks whether the lease is due. A frozen program continues within such a pause.
LOOK_SECONDS = 0.5


class Keeper:
    """Renew ``lease``, which we hold, from the beginning of a ``with`` block to its end or to ``release``.

    ``lost`` says why we have lost the lease; "" while we hold it.
    """

    def __init__(self, lease: Lease) -> None:
        self.lost = ""
        self._lease = lease
        self._lock = threading.Lock()
        self._late = 0
        self._over = False
        self._threads = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        self._threads.enter_context(Repeat(0.0, self.beat))
        self._threads.enter_context(Repeat(self._lease.ttl / 12, self.watch))
        return self

    def __exit__(self, *_unused: object) -> None:
        self._over = True
        self._threads.close()

    def check(self) -> None:
        """Raise Lost if the lease is lost, after killing all our processes. Never waits for the file system."""
        if self.lost:
            self._lose(self.lost)
            raise Lost(self.lost)

    def renew(self) -> None:
        """Renew now, due or not, before a step that only the holder may take; raise Lost or OSError if that fails."""
        try:
            with self._lock:
                self._lease.renew()
        except Lost as lost:
            self._lose(str(lost))
        self.check()

    def release(self) -> None:
        """Release the lease. No process of ours may have the data directory open."""
        with self._lock:
            self._over = True
            self._lease.release()

    def beat(self) -> float:
        """Renew the lease if it is due; return the seconds until the next call. Runs in the first thread."""
        with self._lock:
            try:
                if not self._over and not self.lost:
                    self._lease.renew_if_due()
            except Lost as lost:
                self._lose(str(lost))
        return min(LOOK_SECONDS, self._lease.ttl / 12)

    def watch(self) -> float:
        """Detect a renewal that hangs; return the seconds until the next call.

        Runs in the second thread, and reads no file. The lease has to be late twice in a row, so that after a freeze
        the renewal runs first.
        """
        self._late = self._late + 1 if self._lease.is_late() else 0
        if self.lost or self._late > 1 and not self._over:
            self._lose("the lease was not renewed for %g s: the file system does not answer" % (self._lease.ttl / 2))
        return self._lease.ttl / 12

    def _lose(self, why: str) -> None:
        # In this order: a process started at the same time is killed here, or its starter sees the lost lease.
        self.lost = self.lost or why
        processes.kill_below(os.getpid())
