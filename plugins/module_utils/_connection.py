# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How modules connect to the instance's PostgreSQL. Passwords come only from the password file on the cluster."""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

CONNECTION_OPTIONS: dict[str, Any] = {
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "user": {"type": "str", "required": True},
    "passfile": {"type": "path", "required": True},
    "tls": {"type": "bool", "default": True},
}
# As in the service entry: without these a connection hangs for minutes when a node fails.
LIMITS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 20000,
}
# The names of all databases that can contain studies.
DATABASES = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datallowconn ORDER BY datname"


class Unreachable(Exception):
    """The server refuses the login or the statement, or cannot be reached; the message is for the user.

    ``sqlstate`` is PostgreSQL's error code of a statement; None if the connection failed.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def not_importable(package: str, error: ImportError) -> str:
    """Return the advice on a package missing in the collection's environment on the cluster."""
    said = " ".join(str(error).split())
    return f"postgres_python_packages: {sys.executable} cannot import {package}: {said}; name the package there"


def safety(host: str, tls: bool) -> dict[str, Any]:
    """Return libpq's parameters for every connection, against rogue servers and endless waits.

    ``tls`` is whether the instance has TLS. Without TLS nothing binds the password to the connection, so a rogue server
    could relay the login.
    """
    if host.startswith("/"):
        return {**LIMITS, "requirepeer": pwd.getpwuid(os.geteuid()).pw_name}
    bound = {"sslmode": "require", "channel_binding": "require"} if tls else {}
    return {**LIMITS, **bound, "require_auth": "scram-sha-256"}


def parameters(params: dict, database: str) -> dict[str, Any]:
    """Return libpq's parameters for a connection to ``database``."""
    return {
        "host": params["host"],
        "port": params["port"],
        "user": params["user"],
        "passfile": params["passfile"],
        "dbname": database,
        "application_name": "mala.hpc_db",
        **safety(params["host"], params.get("tls", True)),
        **{name: params[name] for name in ("connect_timeout",) if name in params},
    }


def conninfo(params: dict, database: str) -> str:
    """Return the same parameters as a connection string for PostgreSQL's programs. It contains no password."""
    given = parameters(params, database)
    if "channel_binding" in given:
        del given["require_auth"]  # channel binding implies it, and PostgreSQL 15 does not know it
    escaped = {key: str(value).replace("\\", "\\\\").replace("'", "\\'") for key, value in given.items()}
    return " ".join(f"{key}='{value}'" for key, value in escaped.items())


def storage_url(params: dict, database: str) -> str:
    """Return SQLAlchemy's URL of ``database`` with the same parameters. The password comes from the password file."""
    query = parameters(params, database)
    user, name = (quote(query.pop(key), safe="") for key in ("user", "dbname"))
    return f"postgresql+psycopg2://{user}@/{name}?{urlencode(query)}"


@contextlib.contextmanager
def connect(params: dict, database: str) -> Iterator[Any]:
    """Open a connection that commits each statement; raise Unreachable with the server's message."""
    try:
        import psycopg2
    except ImportError as error:
        raise Unreachable(not_importable("psycopg2", error)) from None
    try:
        with contextlib.closing(psycopg2.connect(**parameters(params, database))) as connection:
            connection.autocommit = True
            yield connection
    except psycopg2.Error as error:
        raise Unreachable(f"database {database}: {' '.join(str(error).split())}", error.pgcode) from None


def rows(connection: Any, query: Any, values: tuple = ()) -> list[tuple]:
    """Return the rows of ``query``."""
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()
