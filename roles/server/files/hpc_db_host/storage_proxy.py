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

import grpc
from optuna.storages import RDBStorage, get_storage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService

# Everybody: both families, or the one that this host has.
EVERYWHERE = ("[::]", "0.0.0.0")


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
    server = grpc.server(
        ThreadPoolExecutor(max_workers=arguments.connections),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    api_pb2_grpc.add_StorageServiceServicer_to_server(OptunaStorageProxyService(storage), server)
    for address in arguments.listen.split(","):
        listen(server, address.strip(), arguments.port, credentials)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
