# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage proxy behind TLS that asks clients for the instance's certificate.

Optuna's own ``run_grpc_proxy_server`` listens without any authentication: whoever reaches its port may change every
study. The service is the same here, its port is not. Needs Optuna 4.2 or newer and grpcio; the rest of the hosting
program does not.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Callable  # noqa: F401 - in annotations

import grpc
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, get_storage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from sqlalchemy.exc import DBAPIError, OperationalError

# Everybody: both families, or the one that this host has.
EVERYWHERE = ("[::]", "0.0.0.0")


class Waiting(grpc.ServerInterceptor):  # type: ignore[misc]
    """Tells clients that postgres has gone as if the proxy had, so that they wait for both."""

    def intercept_service(self, continuation: "Callable", details: "grpc.HandlerCallDetails") -> object:
        """Wrap the handler of a request."""
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._serve(handler.unary_unary, request, context),
            handler.request_deserializer, handler.response_serializer,
        )

    @staticmethod
    def _serve(serve: "Callable", request: object, context: "grpc.ServicerContext") -> object:
        try:
            return serve(request, context)
        except (StorageInternalError, DBAPIError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, DBAPIError) or not (cause.connection_invalidated or is_outage(cause)):
                raise
            return context.abort(grpc.StatusCode.UNAVAILABLE, "the server is away")


def is_outage(error: DBAPIError) -> bool:
    """Tell whether a connection could not be made, or was ended by a server that stops."""
    return isinstance(error, OperationalError) and (getattr(error.orig, "pgcode", None) or "57P0")[:4] == "57P0"


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
    storage = get_storage(RDBStorage(arguments.storage, engine_kwargs=pool))
    for study in storage.get_all_studies():
        # Optuna's cache refuses parameters of a trial that it does not know, such as one that began before a restart.
        storage.get_all_trials(study._study_id, deepcopy=False)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=arguments.connections),
        interceptors=[Waiting()],
        options=[
            ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0),
            # A connection that shows no certificate is not waited for.
            ("grpc.server_handshake_timeout_ms", 10000),
            # Clients ask whether the proxy is there while they wait for an answer.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000), ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    api_pb2_grpc.add_StorageServiceServicer_to_server(OptunaStorageProxyService(storage), server)
    for address in arguments.listen.split(","):
        listen(server, address.strip(), arguments.port, credentials)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
