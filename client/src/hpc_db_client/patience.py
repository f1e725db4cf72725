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
# Seconds. Thousands of workers that retry every 2 s on average are no load for a server that starts.
LONGEST_PAUSE = 2.5
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
    """The max outage for one engine; the threads of a process report each change of an outage only once.

    ``seconds`` count from the last moment at which a server was known to follow, and ``max_wait`` from the beginning of
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

    def tell_change(self, error: BaseException, follows: str) -> None:
        """Report the beginning of an outage, and each change of what follows."""
        with self._lock:
            told, self._told = self._told, follows
        if told == follows:
            return
        if follows:
            tell(f"waiting for the database server ({self.server}), up to {self.max_wait:.0f} s: {follows}")
        elif told:
            tell(f"waiting up to {self.seconds:.0f} s for the database server ({self.server}): no job follows any more")
        else:
            tell(f"waiting up to {self.seconds:.0f} s for the database server ({self.server}): {in_short(error)}")

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
        begun = time.monotonic()
        self._limit = begun + patience.seconds
        self._last = begun + patience.max_wait
        self._pause = FIRST_PAUSE

    def pause(self, error: BaseException) -> None:
        """Wait for a random time that grows with each call; raise GaveUp after the max outage."""
        follows = self._patience.outlook.follows()
        now = time.monotonic()
        if follows:
            self._limit = max(self._limit, now + self._patience.seconds)
        left = min(self._limit, self._last) - now
        if left <= 0:
            setting = "hpc_db_max_wait" if self._last < self._limit else "hpc_db_patience"
            seconds = self._patience.max_wait if self._last < self._limit else self._patience.seconds
            raise GaveUp(
                f"hpc_db: the database server ({self._patience.server}) did not come back within"
                f" {seconds:g} s ({setting}): {in_short(error)}"
            ) from error
        self._patience.tell_change(error, follows)
        time.sleep(min(left, self._pause * _random.uniform(0.5, 1.5)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE / 1.5)
