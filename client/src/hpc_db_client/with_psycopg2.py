# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The dialect for the driver psycopg2."""

from sqlalchemy.dialects.postgresql import psycopg2

from .dialect import Waiting


class Dialect(Waiting, psycopg2.dialect):  # type: ignore[misc]
    """SQLAlchemy's dialect, with connections that wait for the server."""

    supports_statement_cache = True
