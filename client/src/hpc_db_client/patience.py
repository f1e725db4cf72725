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
    """The max outage for one engine; the threads of a process report each outage only once."""

    def __init__(self, seconds: float, server: str) -> None:
        self.seconds = seconds
        self.server = server
        self.known = False  # a connection has succeeded before
        self._told = False
        self._lock = threading.Lock()

    def tell_once(self, error: BaseException) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            tell(f"waiting up to {self.seconds:.0f} s for the database server ({self.server}): {in_short(error)}")

    def is_over(self) -> None:
        """Note that the server has answered, so that the next outage is reported again."""
        self.known = True
        self._told = False


class Outage:
    """One wait for the server, from the moment the outage was noticed."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._limit = time.monotonic() + patience.seconds
        self._pause = FIRST_PAUSE

    def pause(self, error: BaseException) -> None:
        """Wait for a random time that grows with each call; raise GaveUp after the max outage."""
        left = self._limit - time.monotonic()
        if left <= 0:
            raise GaveUp(
                f"hpc_db: the database server ({self._patience.server}) did not come back within"
                f" {self._patience.seconds:g} s (hpc_db_patience): {in_short(error)}"
            ) from error
        self._patience.tell_once(error)
        time.sleep(min(left, self._pause * _random.uniform(0.5, 1.5)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE / 1.5)
