# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Waiting for the server: time limit, intervals, and messages for the user."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time

from .outlook import Outlook

FIRST_PAUSE = 0.1
# Maximum pause in seconds. Thousands of workers that retry every 2 s on average are no load for a server that starts.
LONGEST_PAUSE = 2.5
# But they are one for the file system during hours: after these minutes of an outage, as many seconds are the maximum.
LATE_MINUTES = 30.0
_random = random.Random()  # not the global one, which the program may have seeded
os.register_at_fork(after_in_child=_random.seed)


def tell(text: str) -> None:
    """Write one line to stderr, the job's log; ignore errors."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, missing
        print(f"hpc_db: {text}", file=sys.stderr, flush=True)


def in_short(error: BaseException) -> str:
    """Return the first line of an error, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class GaveUp(Exception):
    """The server did not come back within the max outage; the message is for the user."""


class Patience:
    """Time limits of an outage; a process reports each change once.

    ``seconds`` counts from the last moment at which a server job was queued or running, ``max_wait`` from the start of
    the outage.
    """

    def __init__(self, seconds: float, server: str, max_wait: float = 0.0, outlook: Outlook | None = None) -> None:
        self.seconds = seconds
        self.server = server
        self.max_wait = max(seconds, max_wait)
        self.outlook = outlook or Outlook()
        self.known = False  # a connection has succeeded before
        self._told: str | None = None
        self._lock = threading.Lock()

    def tell_change(self, error: BaseException, next_job: str) -> None:
        """Report the start of an outage and each change of the next server job."""
        with self._lock:
            told, self._told = self._told, next_job
        if told != next_job:
            seconds = self.max_wait if next_job else self.seconds
            why = next_job or ("no server job is queued any more" if told else in_short(error))
            tell(f"waiting up to {seconds:.0f} s for the database server ({self.server}): {why}")

    def is_over(self) -> None:
        """Note that the server has answered, so that the next outage is reported again."""
        if not self.known:
            self.outlook.learn()
        self.known = True
        self._told = None


class Outage:
    """One wait for the server, from the moment the outage was noticed."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._begun = time.monotonic()
        self._limit = self._begun + patience.seconds
        self._last = self._begun + patience.max_wait
        self._pause = FIRST_PAUSE

    def pause(self, error: BaseException) -> None:
        """Wait for a random time that grows with each call; raise GaveUp after the max outage."""
        next_job = self._patience.outlook.next_job()
        now = time.monotonic()
        if next_job:
            self._limit = max(self._limit, now + self._patience.seconds)
        left = min(self._limit, self._last) - now
        if left <= 0:
            within = f"{self._patience.seconds:g} s (hpc_db_patience)"
            if self._last < self._limit:
                within = f"{self._patience.max_wait:g} s (hpc_db_max_wait)"
            elif self._limit > self._begun + self._patience.seconds:
                within += " after the last server job was queued or running"
            raise GaveUp(
                f"hpc_db: the database server ({self._patience.server}) did not come back within {within}:"
                f" {in_short(error)}"
            ) from error
        self._patience.tell_change(error, next_job)
        time.sleep(min(left, self._pause * _random.uniform(0.5, 1.5)))
        longest = max(LONGEST_PAUSE, min((now - self._begun) / 60, LATE_MINUTES))
        self._pause = min(2 * self._pause, longest / 1.5)
