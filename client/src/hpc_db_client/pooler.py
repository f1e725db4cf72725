# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Behind a pooler in transaction mode (PgBouncer): no thread waits for a connection while it keeps one.

There a transaction holds one of few connections, and Optuna asks for a second one at its start while it holds the
first: workers that start together would wait for each other for ever. So a thread that is about to ask gives back
what it holds: a transaction that has only read is rolled back, and repeated when it goes on.
"""

from __future__ import annotations

import re
import threading
import weakref
from typing import Any

# A statement that changes nothing and locks no row.
_READS = re.compile(r"\s*(select(?!\s+nextval)|show|values|table)\b(?!.*\bfor\s+(update|no|share|key)\b)", re.I | re.S)


class _Held(threading.local):
    def __init__(self) -> None:
        self.connections: weakref.WeakSet[Any] = weakref.WeakSet()


_held = _Held()


def only_reads(text: str) -> bool:
    """Tell whether a statement can be taken back without anybody noticing."""
    return bool(_READS.match(text))


def hold(connection: Any) -> None:
    """This thread's transaction on ``connection`` holds one of the pooler's."""
    _held.connections.add(connection)


def release(connection: Any) -> None:
    """The transaction is over."""
    _held.connections.discard(connection)


def give_back(asking: Any = None) -> None:
    """Park this thread's transactions, but for that of the connection that asks."""
    for connection in list(_held.connections):
        if connection is not asking:
            connection.park()
