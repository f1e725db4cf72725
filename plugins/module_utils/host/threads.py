# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Work beside the main thread, and the signals that only the main thread hears."""

import contextlib
import signal
import threading
from typing import Callable, Iterator

# What asks the hosting program to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Let signals wait until the block is done: what stops us must not keep us from stopping postgres."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Repeat:
    """Does ``work`` in a thread, again after as many seconds as it returns, until the ``with`` block ends.

    The thread blocks signals, or the kernel would give it those that the main thread lets wait.
    """

    def __init__(self, first: float, work: Callable[[], float]) -> None:
        self._first = first
        self._work = work
        self._over = threading.Event()

    def __enter__(self) -> "Repeat":
        with signals_waiting():  # a thread begins with the mask of the one that starts it
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._over.set()

    def _run(self) -> None:
        pause = self._first
        while not self._over.wait(pause):
            pause = self._work()
