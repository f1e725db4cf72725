# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The differences to SQLAlchemy's dialects: the pool uses our connections, which wait for the server."""

from __future__ import annotations

from typing import Any, Callable

from sqlalchemy.pool import QueuePool

from .connection import MOST_REPEATS, Connection, Engine, Link
from .outlook import Outlook
from .patience import Patience
from .refusal import english, note_state


class Pool(QueuePool):  # type: ignore[misc]
    """SQLAlchemy's pool, but it keeps only one idle connection, no matter how many were in use."""

    at_rest: int | None = 1  # None: pool_size, if the application has set that

    def _do_return_conn(self, record: Any) -> None:
        somebody_waits = 0 <= self._max_overflow <= self._overflow
        if self.at_rest is None or self._pool.qsize() < self.at_rest or somebody_waits:
            super()._do_return_conn(record)
            return
        try:
            record.close()
        finally:
            self._dec_overflow()

    def recreate(self) -> Pool:
        again = super().recreate()
        again.at_rest = self.at_rest
        return again


class Waiting:
    """Mixin for one of SQLAlchemy's dialects: its connections wait for the server and survive its restarts."""

    # from SQLAlchemy's dialect
    dbapi: Any
    on_connect_url: Callable
    poolclass = Pool

    def __init__(
        self, hpc_db_patience: float = 0.0, hpc_db_max_wait: float = 0.0, hpc_db_server: str = "",
        hpc_db_service: str = "", **options: Any,
    ) -> None:
        super().__init__(**options)
        outlook = Outlook(service=hpc_db_service)
        self._patience = Patience(hpc_db_patience, hpc_db_server, hpc_db_max_wait, outlook)

    def keep_up(self, pool: Any) -> None:
        """Wrap the pool's connections, however they are opened, also by ``creator`` and the event ``do_connect``.

        Connections that are opened in these ways can be lost as well.
        """
        base: Any = super()
        prepare = base.on_connect() or (lambda _connection: None)
        opened = pool._invoke_creator
        engine = Engine(self.dbapi, self._patience)

        def connect(connection_record: Any) -> Connection:
            return Connection(Link(lambda: opened(connection_record), prepare, engine))

        pool._creator = connect

    def connect(self, *arguments: Any, **options: Any) -> Any:
        """Open the driver's connection; ensure that the cause of an error can be identified in any language."""
        base: Any = super()
        with english():
            try:
                return base.connect(*arguments, **options)
            except self.dbapi.OperationalError as error:
                if not self._patience.known:
                    note_state(error, self.dbapi, arguments, options)
                raise

    def on_connect(self) -> Callable | None:
        """Return the function that prepares a connection; our connections prepare themselves each time they open."""
        base: Any = super()
        prepare = base.on_connect()
        return prepare and (lambda connection: isinstance(connection, Connection) or prepare(connection))

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Return whether a connection is alive; if not, the pool opens another one, which waits for the server."""
        if isinstance(dbapi_connection, Connection):
            return dbapi_connection.ping()
        base: Any = super()
        return base.do_ping(dbapi_connection)

    def get_driver_connection(self, connection: Any) -> Any:
        """Return the driver's own connection, for features of the driver that need it; this binds the session."""
        if not isinstance(connection, Connection):
            return connection
        connection.bind("the driver's own connection")
        return connection.real

    def initialize(self, connection: Any) -> None:
        """Query the server's properties. This uses the driver's own connection, but leaves no state in the session."""
        base: Any = super()
        ours = getattr(connection.connection, "dbapi_connection", connection.connection)  # 1.4 passes it unwrapped
        if not isinstance(ours, Connection):
            return base.initialize(connection)
        wrapper = connection._dbapi_connection
        for left in reversed(range(MOST_REPEATS)):
            connection._dbapi_connection = wrapper  # SQLAlchemy has removed it after an error with a lost session
            ours.looks = True
            try:
                return base.initialize(connection)
            except Exception:
                if not (left and ours.real.closed):
                    raise
                ours.rollback()
            finally:
                ours.looks = False
