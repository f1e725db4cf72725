# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper renews the lease for as long as a process of ours may have the data directory open.

It does so in threads of its own, whatever the program waits for: a slow checkpoint, programs that a cold file system
brings late, pg_upgrade. Once the lease is lost, every process below this one is killed at once. A gentle stop would
write a checkpoint into a data directory that is another's.
"""

import contextlib
import os
import threading

from . import processes
from .lease import Lease, Lost
from .threads import Repeat

# How often to look whether the lease is due. A freeze ends in the middle of such a pause.
LOOK_SECONDS = 0.5


class Keeper:
    """Keeps ``lease``, which we hold, from the beginning of a ``with`` block to its end or to ``release``.

    ``lost`` says why the lease is not ours any more, "" while it is.
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
        """Raise Lost if the lease is lost; then nothing of ours runs any more. Waits for no file system."""
        if self.lost:
            self._lose(self.lost)
            raise Lost(self.lost)

    def renew(self) -> None:
        """Renew now, due or not, before a step that only the owner may take; raise Lost or OSError if that fails."""
        try:
            with self._lock:
                self._lease.renew()
        except Lost as lost:
            self._lose(str(lost))
        self.check()

    def release(self) -> None:
        """Give the lease back: nothing of ours has the data directory open."""
        with self._lock:
            self._over = True
            self._lease.release()

    def beat(self) -> float:
        """Renew if that is due; return when to look again. Runs in the first thread."""
        with self._lock:
            try:
                if not self._over and not self.lost:
                    self._lease.renew_if_due()
            except Lost as lost:
                self._lose(str(lost))
        return min(LOOK_SECONDS, self._lease.ttl / 12)

    def watch(self) -> float:
        """Notice that a renewal hangs; return when to look again. Runs in the second thread, and reads no file.

        Late twice in a row: after a freeze the renewal gets its turn first.
        """
        self._late = self._late + 1 if self._lease.is_late() else 0
        if self.lost or self._late > 1 and not self._over:
            self._lose("the lease was not renewed for %g s, as the file system does not answer" % (self._lease.ttl / 2))
        return self._lease.ttl / 12

    def _lose(self, why: str) -> None:
        # In this order: what is started beside this is killed here, or its starter sees that the lease is lost.
        self.lost = self.lost or why
        processes.kill_below(os.getpid())
