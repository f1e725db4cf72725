# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage proxy behind TLS that requires the instance's certificate from clients, and runs each request once.

Optuna's own ``run_grpc_proxy_server`` has no authentication: anyone who reaches its port can change every study. The
service here is the same, but its port is protected. Needs Optuna 4.2 or newer and grpcio; the rest of the supervisor
does not.

A client that loses the connection before the answer repeats its request, perhaps to a proxy that was started meanwhile.
So requests that must not run twice have an id, and their result is recorded with this id in the same transaction, in
the table ``hpc_db.requests``. The client's next such request names the records that it does not need any more. A client
also caches its trials: if the database has been replaced by another one, the client gets an error.

The requests that run once create or delete studies, create trials, begin or end a trial, or set a study's attributes,
since a repetition could undo a later change by another worker. A trial's parameters, attributes and intermediate values
are set only by the worker that runs it, so a repetition changes nothing. All other requests only read. ``guard: NAME``
is as in ``hpc_db_client.connection``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import urllib.parse
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import grpc
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, get_storage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

# All addresses: of both families, or of the only one on this host.
EVERYWHERE = ("[::]", "0.0.0.0")
# Metadata of requests and answers: the id of a request, whether it is a repetition, the ids of earlier requests that
# were answered and will not be repeated, and the identity of the data.
REQUEST, AGAIN, ANSWERED, DATA = "hpc-db-request", "hpc-db-again", "hpc-db-answered", "hpc-db-data"
OTHER_DATA = "the database was restored or replaced; restart this program"
# Exit code; the supervisor then restarts the proxy.
ANEW = 3
IDENTITY = """
SELECT (SELECT system_identifier FROM pg_control_system()), oid::bigint, coalesce((
    SELECT setting FROM pg_db_role_setting, unnest(setconfig) setting
    WHERE setdatabase = oid AND setrole = 0 AND left(setting, 18) = 'hpc_db.generation='), '')
FROM pg_database WHERE datname = current_database()
"""
PREPARE = (
    "CREATE SCHEMA IF NOT EXISTS hpc_db",
    "CREATE TABLE IF NOT EXISTS hpc_db.requests ("
    "id uuid PRIMARY KEY, made timestamptz NOT NULL DEFAULT now(), what bigint NOT NULL)",
)
# Removes the last records of clients that have ended. A client waits for at most 30 days (hpc_db_client.proxy).
FORGET = "DELETE FROM hpc_db.requests WHERE made < now() - interval '90 days'"
FORGET_SECONDS = 86400.0
# Runs in the transaction of the request.
NOTE = """
WITH answered AS (DELETE FROM hpc_db.requests WHERE id = ANY (CAST(:answered AS uuid[])))
INSERT INTO hpc_db.requests (id, what)
SELECT CAST(:request AS uuid), """
# Records the row that the request has written, if any.
NOTE_ROW = NOTE + "{0} FROM {1} WHERE {2} AND xmin = pg_current_xact_id()::xid"
NOTE_STUDY = NOTE_ROW.format("study_id", "studies", "study_name = :name")
NOTE_STATE = NOTE_ROW.format("trial_id", "trials", "trial_id = :trial")
NOTE_TRIAL = NOTE_ROW.format(
    "trial_id", "trials", "study_id = :study AND trial_id = currval(pg_get_serial_sequence('trials', 'trial_id'))"
)
# Records the study that was deleted, or whose attribute was set, even if that changed no row.
NOTE_CHANGE = NOTE + ":study"
DONE = "SELECT what FROM hpc_db.requests WHERE id = CAST(:request AS uuid)"


class Once:
    """Optuna's storage, with requests that run only once."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._engine = storage._backend.engine
        self.request = threading.local()  # id, again, answered: the request that this thread serves
        self._note = threading.local()
        with self._engine.begin() as connection:
            for statement in PREPARE:
                connection.exec_driver_sql(statement)
        self.forget()
        sqlalchemy.event.listen(storage._backend.scoped_session, "before_commit", self._write_note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def forget(self) -> None:
        """Delete records that no client needs any more; if the server is down, try again later."""
        with contextlib.suppress(SQLAlchemyError), self._engine.begin() as connection:
            connection.exec_driver_sql(FORGET)

    def create_new_study(self, directions: Any, study_name: str | None = None) -> int:
        """See Optuna; runs once."""
        return self._once(
            lambda: self._storage.create_new_study(directions, study_name), int, NOTE_STUDY, {"name": study_name}
        )

    def delete_study(self, study_id: int) -> None:
        """See Optuna; runs once."""
        self._change(study_id, lambda: self._storage.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna; runs once."""
        self._change(study_id, lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna; runs once."""
        self._change(study_id, lambda: self._storage.set_study_system_attr(study_id, key, value))

    def create_new_trial(self, study_id: int, template_trial: Any = None) -> int:
        """See Optuna; runs once."""

        def found(trial_id: int) -> int:
            self._storage.get_all_trials(study_id, deepcopy=False)  # fills Optuna's cache, which refuses unknown trials
            return trial_id

        return self._once(
            lambda: self._storage.create_new_trial(study_id, template_trial), found, NOTE_TRIAL, {"study": study_id}
        )

    def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
        """See Optuna; runs once."""
        return self._once(
            lambda: self._storage.set_trial_state_values(trial_id, state, values), bool, NOTE_STATE,
            {"trial": trial_id},
        )

    def _change(self, study_id: int, act: Callable) -> None:
        self._once(act, lambda _study_id: None, NOTE_CHANGE, {"study": study_id})

    def _once(self, act: Callable, found: Callable, note: str, parameters: dict[str, Any]) -> Any:
        request = getattr(self.request, "id", None)
        if not request:
            return act()
        if self.request.again:
            what = self._done(request)
            if what is not None:
                return found(what)
        parameters = {"request": request, "answered": self.request.answered, **parameters}
        self._note.now = sqlalchemy.text(note), parameters
        try:
            did = act()
        except Exception:
            # If there is a record, the commit succeeded although its answer was lost, or the first attempt was still
            # running and has committed.
            what = self._done(request)  # guard: note of a commit that was cut
            if what is None:
                raise
            return found(what)
        finally:
            self._note.now = None
        if did is False and self.request.again:
            return self._done(request) is not None
        return did

    def _write_note(self, session: Any) -> None:
        if getattr(self._note, "now", None):
            session.flush()
            session.execute(*self._note.now)  # guard: notes

    def _done(self, request: str) -> int | None:
        with self._engine.connect() as connection:
            return connection.execute(sqlalchemy.text(DONE), {"request": request}).scalar()


class Serving(grpc.ServerInterceptor):  # type: ignore[misc]
    """Send the identity of the data to clients; report an outage of postgres like one of the proxy, so clients wait."""

    def __init__(self, once: Once, data: str) -> None:
        self._request = once.request
        self._data = data
        self._turns = weakref.WeakValueDictionary()  # type: weakref.WeakValueDictionary[str, threading.Semaphore]
        self._lock = threading.Lock()

    def intercept_service(self, continuation: Callable, details: grpc.HandlerCallDetails) -> object:
        """Wrap the handler of a request; see grpc."""
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        said = dict(details.invocation_metadata)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._serve(handler.unary_unary, request, context, said),
            handler.request_deserializer, handler.response_serializer,
        )

    def _serve(self, serve: Callable, request: object, context: grpc.ServicerContext, said: dict) -> object:
        if said.get(DATA, self._data) != self._data:
            return context.abort(grpc.StatusCode.ABORTED, OTHER_DATA)
        context.send_initial_metadata(((DATA, self._data),))
        self._request.id, self._request.again = said.get(REQUEST), AGAIN in said
        self._request.answered = said.get(ANSWERED, "").split()
        try:
            with self._turn(said.get(REQUEST)):
                return serve(request, context)
        except (StorageInternalError, DBAPIError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, DBAPIError) or not (cause.connection_invalidated or is_outage(cause)):
                raise
            return context.abort(grpc.StatusCode.UNAVAILABLE, "the server does not answer")
        finally:
            self._request.id = None

    def _turn(self, request: str | None) -> threading.Semaphore:
        """Let a repetition wait for the first attempt, which could otherwise undo later changes."""
        if request is None:  # guard: repetitions
            return threading.Semaphore()  # not shared
        with self._lock:
            return self._turns.setdefault(request, threading.Semaphore())


def is_outage(error: DBAPIError) -> bool:
    """Return whether a connection could not be opened, or was ended by a server that stops."""
    return isinstance(error, OperationalError) and (getattr(error.orig, "pgcode", None) or "57P0")[:4] == "57P0"


def stay_with(engine: Any) -> str:
    """Return the identity of the engine's data; end this program if it changes later, since Optuna caches the data."""

    def identity(connection: Any) -> str:
        with connection.cursor() as cursor:
            cursor.execute(IDENTITY)
            found = cursor.fetchone()
        connection.rollback()
        return urllib.parse.quote("{}/{}/{}".format(*found))

    def check(connection: Any, _record: object) -> None:
        if identity(connection) != data:
            print(OTHER_DATA.partition(";")[0], file=sys.stderr, flush=True)
            os._exit(ANEW)  # guard: other data behind the storage proxy

    raw = engine.raw_connection()
    data = identity(raw)
    raw.close()
    sqlalchemy.event.listen(engine, "connect", check)
    return data


def read(path: str) -> bytes:
    """Return a file's bytes."""
    with open(path, "rb") as stream:
        return stream.read()


def listen(server: grpc.Server, address: str, port: int, credentials: grpc.ServerCredentials) -> None:
    """Listen on an address; ``*`` means all addresses."""
    for host in EVERYWHERE if address == "*" else (f"[{address}]" if ":" in address else address,):
        try:
            if server.add_secure_port(f"{host}:{port}", credentials):
                return
        except RuntimeError:
            continue
    sys.exit(f"cannot listen on {address} port {port}")


def main() -> None:
    """Serve until a signal ends the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True, help="the URL for RDBStorage")
    parser.add_argument("--listen", required=True, help="addresses, separated by commas; * means all")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True, help="limit of connections and requests at a time")
    parser.add_argument("--certificate", required=True, help="the certificate of server and clients")
    parser.add_argument("--key", required=True, help="its key")
    arguments = parser.parse_args()
    certificate = read(arguments.certificate)
    credentials = grpc.ssl_server_credentials(
        [(read(arguments.key), certificate)], root_certificates=certificate, require_client_auth=True
    )
    pool = {"pool_size": arguments.connections, "max_overflow": 1, "pool_pre_ping": True}
    database = RDBStorage(arguments.storage, engine_kwargs=pool)
    data = stay_with(database.engine)
    storage = get_storage(database)
    for study in storage.get_all_studies():
        # Fill Optuna's cache: it refuses parameters of unknown trials, such as those that began before a restart.
        storage.get_all_trials(study._study_id, deepcopy=False)
    once = Once(storage)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=arguments.connections),
        interceptors=[Serving(once, data)],
        options=[
            ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0),
            # Drop connections that present no certificate in time.
            ("grpc.server_handshake_timeout_ms", 10000),
            # Clients send keepalive pings while they wait for an answer.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000), ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    api_pb2_grpc.add_StorageServiceServicer_to_server(OptunaStorageProxyService(once), server)
    for address in arguments.listen.split(","):
        listen(server, address.strip(), arguments.port, credentials)
    server.start()
    while server.wait_for_termination(FORGET_SECONDS):
        once.forget()


if __name__ == "__main__":
    main()
