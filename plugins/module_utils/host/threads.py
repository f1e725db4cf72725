# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Background threads, and the signals that only the main thread receives."""

import contextlib
import signal
import threading
from typing import Callable, Iterator

# Signals that ask the supervisor to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Defer stop signals until the block ends: they must not interrupt the shutdown of postgres."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Repeat:
    """Run ``work`` repeatedly in a thread until the ``with`` block ends; it returns the seconds until the next call.

    The thread blocks signals. Otherwise the kernel would deliver to it the signals that the main thread defers.
    """

    def __init__(self, first: float, work: Callable[[], float]) -> None:
        self._first = first
        self._work = work
        self._over = threading.Event()

    def __enter__(self) -> "Repeat":
        with signals_waiting():  # a thread inherits the mask of the thread that starts it
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._over.set()

    def _run(self) -> None:
        pause = self._first
        while not self._over.wait(pause):
            pause = self._work()
