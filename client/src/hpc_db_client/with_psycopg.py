# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The dialect for the driver psycopg."""

from sqlalchemy.dialects.postgresql import psycopg

from .dialect import Waiting


class Dialect(Waiting, psycopg.dialect):  # type: ignore[misc]
    """SQLAlchemy's dialect, with connections that wait for the server."""

    supports_statement_cache = True
