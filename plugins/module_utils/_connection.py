# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How modules reach the instance's PostgreSQL. Passwords come from the password file on the cluster alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

CONNECTION_OPTIONS: dict[str, Any] = {
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "user": {"type": "str", "required": True},
    "passfile": {"type": "path", "required": True},
}


class Unreachable(Exception):
    """The server does not let us in, or refuses what we ask, or cannot be asked; the message is for the user."""


def not_importable(package: str, error: ImportError) -> str:
    """Return what to do about a package that the Python side lacks."""
    said = " ".join(str(error).split())
    return f"postgres_python_packages: {sys.executable} cannot import {package}: {said}; name the package there"


def parameters(params: dict, database: str) -> dict[str, Any]:
    """Return libpq's parameters for a connection to ``database``."""
    # A server that is not ours, on the port that was, must not be told the password.
    remote = {} if params["host"].startswith("/") else {"require_auth": "scram-sha-256"}
    return {
        **remote,
        "host": params["host"],
        "port": params["port"],
        "user": params["user"],
        "passfile": params["passfile"],
        "dbname": database,
        "connect_timeout": 10,
        "application_name": "mala.hpc_db",
    }


def storage_url(params: dict, database: str) -> str:
    """Return SQLAlchemy's URL of ``database``. The password comes from the password file."""
    query = {name: params[name] for name in ("host", "port", "passfile")}
    return f"postgresql+psycopg2://{quote(params['user'], safe='')}@/{quote(database, safe='')}?{urlencode(query)}"


@contextlib.contextmanager
def connect(params: dict, database: str) -> Iterator[Any]:
    """Open a connection that commits each statement; raise Unreachable with the server's words."""
    try:
        import psycopg2
    except ImportError as error:
        raise Unreachable(not_importable("psycopg2", error)) from None
    try:
        with contextlib.closing(psycopg2.connect(**parameters(params, database))) as connection:
            connection.autocommit = True
            yield connection
    except psycopg2.Error as error:
        raise Unreachable(f"database {database}: {' '.join(str(error).split())}") from None


def rows(connection: Any, query: Any, values: tuple = ()) -> list[tuple]:
    """Return what ``query`` finds."""
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()
