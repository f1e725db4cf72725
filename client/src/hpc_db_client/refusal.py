# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Find out why a connection failed, independent of the language of the message.

libpq uses the language that the application has chosen (``locale.setlocale``), the server that of its lc_messages.
The drivers do not pass on the SQLSTATE if the server refuses a connection.
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
except ImportError:  # Python was built without libffi
    ctypes = None  # type: ignore[assignment]

# Errors that waiting does not resolve.
FUTILE = re.compile(
    "password authentication failed|no password supplied|no pg_hba.conf entry|authentication failed for user|"
    "does not exist|permission denied for database|channel binding|certificate|invalid connection option|"
    "server does not support SSL|root certificate file|sslmode value|unrecognized configuration parameter"
)
# The same as prefixes of an SQLSTATE: authentication, unknown database, missing privileges.
FUTILE_STATES = ("28", "3D", "42")
# Errors that waiting resolves.
PASSING = re.compile("the database system is|terminating connection|too many|remaining connection slots|timeout")
# A message of the server after its severity (one word or two, in any language). libpq's messages have only one space.
OF_SERVER = re.compile(r"(?:^|: )[^:\n]+:  ", re.MULTILINE)
STATE = re.compile(r":  ([0-9A-Z]{5})$", re.MULTILINE)
SECONDS = 10.0

ONLY_STATES = 3  # libpq's PQERRORS_SQLSTATE
READING, WRITING = 1, 2  # libpq's PGRES_POLLING_READING, PGRES_POLLING_WRITING
MESSAGES = 1 << 5  # LC_MESSAGES_MASK of the C library


def is_futile(error: BaseException) -> bool:
    """Return whether the connection would be refused no matter how long one waits."""
    return getattr(error, "hpc_db_state", "").startswith(FUTILE_STATES) or bool(FUTILE.search(str(error)))


def note_state(error: Any, dbapi: Any, arguments: tuple, options: dict) -> None:
    """Add the SQLSTATE to an error of a server with another language, for ``is_futile``.

    This connects once more, since libpq reports the SQLSTATE only if that was requested before.
    """
    said = str(error)
    if OF_SERVER.search(said) and not FUTILE.search(said) and not PASSING.search(said):
        with contextlib.suppress(AttributeError, OSError):  # a driver with an unknown kind of libpq
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
    libpq = ctypes.CDLL(path)  # for an extension module, the libpq that it is linked to
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
    """Make the C library, and thus libpq, use English in this thread."""
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
    """Return the C library; None if it has no locales per thread, or if Python has no ctypes."""
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
