# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is different for SQLAlchemy: connections are ours, and new keys are asked for before they are used."""

from __future__ import annotations

from typing import Any, Callable
from weakref import ref

from .connection import MOST_REPEATS, Connection, Link
from .patience import Patience


class Waiting:
    """Mixed into a dialect of SQLAlchemy's: its connections wait for the server, and outlive it."""

    # SQLAlchemy then asks the sequence for a key and names it in the INSERT, instead of reading it from the
    # INSERT's answer. After a crash the key is still ours, so that the same INSERT can be made again.
    insert_returning = False
    implicit_returning = False  # the same in SQLAlchemy 1.4

    # from SQLAlchemy's dialect
    dbapi: Any
    on_connect_url: Callable

    def __init__(self, hpc_db_patience: float = 0.0, hpc_db_server: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._patience = Patience(hpc_db_patience, hpc_db_server)
        self._connections: set[ref[Connection]] = set()

    def connect(self, *arguments: Any, **options: Any) -> Connection:
        """Open a connection as soon as the server lets us."""
        base: Any = super()
        prepare = base.on_connect() or (lambda _connection: None)
        link = Link(
            lambda: base.connect(*arguments, **options), prepare, self.dbapi, self._patience, self._connections
        )
        return Connection(link)

    def on_connect(self) -> Callable | None:
        """Return what prepares a connection; ours are prepared as often as they are opened."""
        base: Any = super()
        prepare = base.on_connect()
        return prepare and (lambda connection: isinstance(connection, Connection) or prepare(connection))

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Tell whether a connection is alive; if not, the pool opens another one, which waits."""
        if isinstance(dbapi_connection, Connection):
            return dbapi_connection.ping()
        base: Any = super()
        return base.do_ping(dbapi_connection)

    def get_driver_connection(self, connection: Any) -> Any:
        """Return the driver's own connection, for what the driver does with nothing else."""
        if not isinstance(connection, Connection):
            return connection
        connection.bind("the driver's own connection")
        return connection.real

    def initialize(self, connection: Any) -> None:
        """Look at the server; this uses the driver's own connection, but leaves nothing behind in it."""
        base: Any = super()
        ours = getattr(connection.connection, "dbapi_connection", connection.connection)  # SQLAlchemy 1.4 has it bare
        for left in reversed(range(MOST_REPEATS)):
            try:
                return base.initialize(connection)
            except Exception:
                if not (left and isinstance(ours, Connection) and ours.real.closed):
                    raise
                ours.rollback()
            finally:
                if isinstance(ours, Connection):
                    ours.unbind()
