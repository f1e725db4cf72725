# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage proxy behind TLS that asks clients for the instance's certificate, and does everything once.

Optuna's own ``run_grpc_proxy_server`` listens without any authentication: whoever reaches its port may change every
study. The service is the same here, its port is not. Needs Optuna 4.2 or newer and grpcio; the rest of the hosting
program does not.

A client whose answer was cut sends its request again, perhaps to a proxy that was started meanwhile. So requests that
must not be done twice have an id, and what they did is noted with it in the same transaction, in the table
``hpc_db.requests``. The client names the notes that it will not need in its next such request. And a client remembers
its trials: if the database is another one now, it is told.

Done once are new and deleted studies, new trials, a trial's begin and end, and a study's attributes, since a repetition
could undo what another worker has set meanwhile. A trial's parameters, attributes and intermediate values are set only
by the worker that runs it, so that to set them twice is the same. All else reads. ``guard: NAME`` is as in
``hpc_db_client.connection``.
"""

import argparse
import contextlib
import os
import sys
import threading
import urllib.parse
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Optional  # noqa: F401 - some in annotations

import grpc
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, get_storage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

# Everybody: both families, or the one that this host has.
EVERYWHERE = ("[::]", "0.0.0.0")
# The metadata of requests and answers: the id of a request, whether it is sent again, the ids of earlier ones that were
# answered and will not be, and whose data it is about.
REQUEST, AGAIN, ANSWERED, DATA = "hpc-db-request", "hpc-db-again", "hpc-db-answered", "hpc-db-data"
OTHER_DATA = "the database is another one now, restored or moved to other data; start this program anew"
# Of the hosting program: an engine that ended is started again.
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
# The last notes of clients that have ended. Those that wait do so for at most 30 days (hpc_db_client.proxy).
FORGET = "DELETE FROM hpc_db.requests WHERE made < now() - interval '90 days'"
FORGET_SECONDS = 86400.0
# In the transaction of the request.
NOTE = """
WITH answered AS (DELETE FROM hpc_db.requests WHERE id = ANY (CAST(:answered AS uuid[])))
INSERT INTO hpc_db.requests (id, what)
SELECT CAST(:request AS uuid), """
# The row that it has written, if it has.
NOTE_ROW = NOTE + "{0} FROM {1} WHERE {2} AND xmin = pg_current_xact_id()::xid"
NOTE_STUDY = NOTE_ROW.format("study_id", "studies", "study_name = :name")
NOTE_STATE = NOTE_ROW.format("trial_id", "trials", "trial_id = :trial")
NOTE_TRIAL = NOTE_ROW.format(
    "trial_id", "trials", "study_id = :study AND trial_id = currval(pg_get_serial_sequence('trials', 'trial_id'))"
)
# The study that it has deleted, or given an attribute, perhaps the same as before.
NOTE_CHANGE = NOTE + ":study"
DONE = "SELECT what FROM hpc_db.requests WHERE id = CAST(:request AS uuid)"


class Once:
    """Optuna's storage, whose requests are done once."""

    def __init__(self, storage: "Any") -> None:
        self._storage = storage
        self._engine = storage._backend.engine
        self.request = threading.local()  # id, again, answered: of the request that this thread serves
        self._note = threading.local()
        with self._engine.begin() as connection:
            for statement in PREPARE:
                connection.exec_driver_sql(statement)
        self.forget()
        sqlalchemy.event.listen(storage._backend.scoped_session, "before_commit", self._write_note)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._storage, name)

    def forget(self) -> None:
        """Delete what nobody will ask for; if the server is away, another time."""
        with contextlib.suppress(SQLAlchemyError), self._engine.begin() as connection:
            connection.exec_driver_sql(FORGET)

    def create_new_study(self, directions: "Any", study_name: "Optional[str]" = None) -> int:
        """Optuna's, once."""
        return self._once(
            lambda: self._storage.create_new_study(directions, study_name), int, NOTE_STUDY, {"name": study_name}
        )

    def delete_study(self, study_id: int) -> None:
        """Optuna's, once."""
        self._change(study_id, lambda: self._storage.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: "Any") -> None:
        """Optuna's, once."""
        self._change(study_id, lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: "Any") -> None:
        """Optuna's, once."""
        self._change(study_id, lambda: self._storage.set_study_system_attr(study_id, key, value))

    def create_new_trial(self, study_id: int, template_trial: "Any" = None) -> int:
        """Optuna's, once."""

        def found(trial_id: int) -> int:
            self._storage.get_all_trials(study_id, deepcopy=False)  # for its cache, which refuses unknown trials
            return trial_id

        return self._once(
            lambda: self._storage.create_new_trial(study_id, template_trial), found, NOTE_TRIAL, {"study": study_id}
        )

    def set_trial_state_values(self, trial_id: int, state: "Any", values: "Any" = None) -> bool:
        """Optuna's, once."""
        return self._once(
            lambda: self._storage.set_trial_state_values(trial_id, state, values), bool, NOTE_STATE,
            {"trial": trial_id},
        )

    def _change(self, study_id: int, act: "Callable") -> None:
        self._once(act, lambda _study_id: None, NOTE_CHANGE, {"study": study_id})

    def _once(self, act: "Callable", found: "Callable", note: str, parameters: "Dict[str, Any]") -> "Any":
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
            # It was done though an answer of the server was cut, or the first one was still under way, and has won.
            what = self._done(request)  # guard: note of a commit that was cut
            if what is None:
                raise
            return found(what)
        finally:
            self._note.now = None
        if did is False and self.request.again:
            return self._done(request) is not None
        return did

    def _write_note(self, session: "Any") -> None:
        if getattr(self._note, "now", None):
            session.flush()
            session.execute(*self._note.now)  # guard: notes

    def _done(self, request: str) -> "Optional[int]":
        with self._engine.connect() as connection:
            return connection.execute(sqlalchemy.text(DONE), {"request": request}).scalar()


class Serving(grpc.ServerInterceptor):  # type: ignore[misc]
    """Tells clients whose data is served, and that postgres has gone as if the proxy had: they wait for both."""

    def __init__(self, once: Once, data: str) -> None:
        self._request = once.request
        self._data = data
        self._turns = weakref.WeakValueDictionary()  # type: weakref.WeakValueDictionary[str, threading.Semaphore]
        self._lock = threading.Lock()

    def intercept_service(self, continuation: "Callable", details: "grpc.HandlerCallDetails") -> object:
        """Wrap the handler of a request."""
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        said = dict(details.invocation_metadata)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._serve(handler.unary_unary, request, context, said),
            handler.request_deserializer, handler.response_serializer,
        )

    def _serve(self, serve: "Callable", request: object, context: "grpc.ServicerContext", said: dict) -> object:
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
            return context.abort(grpc.StatusCode.UNAVAILABLE, "the server is away")
        finally:
            self._request.id = None

    def _turn(self, request: "Optional[str]") -> threading.Semaphore:
        """Have a repetition wait for the first one, which would undo what comes after if it went on later."""
        if request is None:  # guard: repetitions
            return threading.Semaphore()  # of its own
        with self._lock:
            return self._turns.setdefault(request, threading.Semaphore())


def is_outage(error: DBAPIError) -> bool:
    """Tell whether a connection could not be made, or was ended by a server that stops."""
    return isinstance(error, OperationalError) and (getattr(error.orig, "pgcode", None) or "57P0")[:4] == "57P0"


def stay_with(engine: "Any") -> str:
    """Return whose data the engine sees; a connection to other data ends this program, since Optuna has a cache."""

    def identity(connection: "Any") -> str:
        with connection.cursor() as cursor:
            cursor.execute(IDENTITY)
            found = cursor.fetchone()
        connection.rollback()
        return urllib.parse.quote("%s/%s/%s" % found)

    def check(connection: "Any", _record: object) -> None:
        if identity(connection) != data:
            print(OTHER_DATA.partition(";")[0], file=sys.stderr, flush=True)
            os._exit(ANEW)  # guard: other data behind the storage proxy

    raw = engine.raw_connection()
    data = identity(raw)
    raw.close()
    sqlalchemy.event.listen(engine, "connect", check)
    return data


def read(path: str) -> bytes:
    """Return a file's content."""
    with open(path, "rb") as stream:
        return stream.read()


def listen(server: "grpc.Server", address: str, port: int, credentials: "grpc.ServerCredentials") -> None:
    """Listen on an address; ``*`` is every one."""
    for host in EVERYWHERE if address == "*" else ("[%s]" % address if ":" in address else address,):
        try:
            if server.add_secure_port("%s:%d" % (host, port), credentials):
                return
        except RuntimeError:
            continue
    sys.exit("cannot listen on %s port %d" % (address, port))


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True, help="the URL for RDBStorage")
    parser.add_argument("--listen", required=True, help="addresses, with commas between them; * is every one")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True, help="connections, and requests at a time")
    parser.add_argument("--certificate", required=True, help="the certificate of both sides")
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
        # Optuna's cache refuses parameters of a trial that it does not know, such as one that began before a restart.
        storage.get_all_trials(study._study_id, deepcopy=False)
    once = Once(storage)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=arguments.connections),
        interceptors=[Serving(once, data)],
        options=[
            ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0),
            # A connection that shows no certificate is not waited for.
            ("grpc.server_handshake_timeout_ms", 10000),
            # Clients ask whether the proxy is there while they wait for an answer.
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
