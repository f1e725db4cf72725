# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Waiting: how long, how often, and what the user is told meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time

FIRST_PAUSE = 0.1
# Thousands of workers that ask every 2 s on average are no load for a server that starts.
LONGEST_PAUSE = 2.5
_random = random.Random()  # the program's own may be seeded
os.register_at_fork(after_in_child=_random.seed)


def tell(text: str) -> None:
    """Write one line for whoever reads the job's log, if it can be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, none
        print(f"hpc_db: {text}", file=sys.stderr, flush=True)


def in_short(error: BaseException) -> str:
    """Return the first line of an error, which is all that most people need."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class GaveUp(Exception):
    """The budget is used up; the message is for the user."""


class Patience:
    """The budget for one engine's waits; the threads of a process tell each outage once."""

    def __init__(self, seconds: float, server: str) -> None:
        self.seconds = seconds
        self.server = server
        self.known = False  # the server has let us in before
        self._told = False
        self._lock = threading.Lock()

    def tell_once(self, error: BaseException) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            tell(f"waiting up to {self.seconds:.0f} s for the database server ({self.server}): {in_short(error)}")

    def is_over(self) -> None:
        """The server answered: the next outage is another one."""
        self.known = True
        self._told = False


class Outage:
    """One wait for the server, from the moment its absence was noticed."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._limit = time.monotonic() + patience.seconds
        self._pause = FIRST_PAUSE

    def pause(self, error: BaseException) -> None:
        """Wait a little, each time a little longer and never as long as the others; raise GaveUp in the end."""
        left = self._limit - time.monotonic()
        if left <= 0:
            raise GaveUp(
                f"hpc_db: the database server ({self._patience.server}) did not come back within"
                f" {self._patience.seconds:g} s (hpc_db_patience): {in_short(error)}"
            ) from error
        self._patience.tell_once(error)
        time.sleep(min(left, self._pause * _random.uniform(0.5, 1.5)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE / 1.5)
