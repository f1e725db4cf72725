# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Why a connection could not be made, whatever language the server or libpq would say that in.

libpq speaks the language that the application has chosen (``locale.setlocale``), the server that of its lc_messages.
The drivers do not pass on the SQLSTATE of a server that lets nobody in.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

try:
    import ctypes
except ImportError:  # of a Python that was built without libffi
    ctypes = None  # type: ignore[assignment]

# What waiting does not mend.
FUTILE = re.compile(
    "password authentication failed|no password supplied|no pg_hba.conf entry|authentication failed for user|"
    "does not exist|permission denied for database|channel binding|certificate|invalid connection option|"
    "server does not support SSL|root certificate file|sslmode value|unrecognized configuration parameter"
)
# The same as the first characters of an SQLSTATE: who it is, which database, what is allowed.
FUTILE_STATES = ("28", "3D", "42")
# What it mends.
PASSING = re.compile("the database system is|terminating connection|too many|remaining connection slots|timeout")
# A server's own words after their severity, in any language: one word or two. libpq's have one space.
OF_SERVER = re.compile(r"(?:^|: )[^:\n]+:  ", re.MULTILINE)
STATE = re.compile(r":  ([0-9A-Z]{5})$", re.MULTILINE)
SECONDS = 10.0

ONLY_STATES = 3  # libpq's PQERRORS_SQLSTATE
READING, WRITING = 1, 2  # libpq's PGRES_POLLING_READING, PGRES_POLLING_WRITING
MESSAGES = 1 << 5  # LC_MESSAGES_MASK of the C library


def is_futile(error: BaseException) -> bool:
    """Tell whether a connection would be refused however long one waits."""
    return getattr(error, "hpc_db_state", "").startswith(FUTILE_STATES) or bool(FUTILE.search(str(error)))


def note_state(error: Any, dbapi: Any, arguments: tuple, options: dict) -> None:
    """Note with an error the SQLSTATE of a server that speaks another language, for ``is_futile``.

    It is asked once more, since libpq tells that only if it has been asked to before.
    """
    said = str(error)
    if OF_SERVER.search(said) and not FUTILE.search(said) and not PASSING.search(said):
        with contextlib.suppress(AttributeError, OSError):  # a driver with another libpq than any of today's
            error.hpc_db_state = _ask(dbapi, arguments, options)


def _ask(dbapi: Any, arguments: tuple, options: dict) -> str:
    if hasattr(dbapi, "pq"):  # psycopg 3
        others = inspect.signature(dbapi.Connection.connect).parameters
        dsn = dbapi.conninfo.make_conninfo(*arguments, **{k: v for k, v in options.items() if k not in others})
        module = sys.modules[dbapi.pq.PGconn.__module__]
        path = module.impl.pq._name if hasattr(module, "impl") else module.__file__
    else:
        others = inspect.signature(dbapi.connect).parameters
        given = {k: v for k, v in options.items() if k not in others or k == "dsn"}
        dsn, path = dbapi.extensions.make_dsn(*arguments, **given), dbapi._psycopg.__file__
    libpq = ctypes.CDLL(path)  # of an extension module, that which it is linked to
    libpq.PQconnectStart.restype, libpq.PQerrorMessage.restype = ctypes.c_void_p, ctypes.c_char_p
    connection = ctypes.c_void_p(libpq.PQconnectStart(dsn.encode()))
    if not connection:
        return ""
    try:
        libpq.PQsetErrorVerbosity(connection, ONLY_STATES)
        state, limit = WRITING, time.monotonic() + SECONDS
        while state in (READING, WRITING) and libpq.PQsocket(connection) >= 0 and time.monotonic() < limit:
            ready = select.poll()
            ready.register(libpq.PQsocket(connection), select.POLLIN if state == READING else select.POLLOUT)
            ready.poll(1000 * SECONDS)
            state = libpq.PQconnectPoll(connection)
        found = STATE.search(libpq.PQerrorMessage(connection).decode(errors="replace"))
    finally:
        libpq.PQfinish(connection)
    return found[1] if found else ""


@contextlib.contextmanager
def english() -> Iterator[None]:
    """Have the C library, and so libpq, speak English in this thread."""
    library = _library()
    if library is None:
        yield
        return
    before = library.uselocale(None)
    ours = library.newlocale(MESSAGES, b"C", library.duplocale(before))
    library.uselocale(ours)
    try:
        yield
    finally:
        library.uselocale(before)
        library.freelocale(ours)


def _library() -> Any:
    """Return the C library; None if it, or this Python, cannot do that."""
    try:
        library = ctypes.CDLL(None)
        library.newlocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
        for function in (library.newlocale, library.duplocale, library.uselocale, library.freelocale):
            function.restype = ctypes.c_void_p
        for function in (library.duplocale, library.uselocale, library.freelocale):
            function.argtypes = [ctypes.c_void_p]
    except (AttributeError, OSError):
        return None
    return library
