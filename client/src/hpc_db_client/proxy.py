# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Optuna's storage through the proxy of an instance (``server_proxy``): no connections of one's own.

    study = optuna.load_study(study_name="beryllium", storage=hpc_db_client.proxy.storage("hpc_db"))

It finds the proxy in the instance directory and shows the certificate there, which nobody else can read. Needs
Optuna 4.2 or newer and grpcio. While the proxy is away it waits, as the engine plugin does. A request that was cut
is sent again, though it may have been served: a value of a trial that is set twice is the same, and what must be done
once (a study's making, attributes and end, a new trial, a trial's begin and end) has an id that the proxy knows again.
If the database was restored meanwhile, an error says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import uuid
from collections import deque
from typing import Any

import grpc
from optuna.exceptions import StorageInternalError
from optuna.storages import GrpcStorageProxy

from .patience import GaveUp, Outage, Patience

PATIENCE_SECONDS = 600.0
# The proxy forgets what it has done after 90 days.
MOST_SECONDS = 30 * 86400.0
# What the certificate is for, on whatever host the proxy runs.
NAME = "hpc-db"
# As in plugins/module_utils/host/storage_proxy.py: the id of a request, whether it is sent again, the ids of
# earlier ones that were answered and will not be, and whose data it is about.
REQUEST, AGAIN, ANSWERED, DATA = "hpc-db-request", "hpc-db-again", "hpc-db-answered", "hpc-db-data"
# Requests that the proxy does once, and those that may be done twice: only the worker that runs a trial sends them. Of
# the others only those that read are sent again.
ONCE = {
    "CreateNewStudy", "DeleteStudy", "SetStudyUserAttribute", "SetStudySystemAttribute", "CreateNewTrial",
    "SetTrialStateValues",
}
TWICE = {"SetTrialParameter", "SetTrialIntermediateValue", "SetTrialUserAttribute", "SetTrialSystemAttribute"}
MOST_ANSWERED = 50  # in one request
OPTIONS = [
    ("grpc.ssl_target_name_override", NAME),
    ("grpc.max_receive_message_length", -1),
    # A node that vanished says nothing: ask whether it is there while a request is under way.
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 10000),
]


class InstanceStorage(GrpcStorageProxy):  # type: ignore[misc]
    """Optuna's client on a channel that is encrypted, shows who it is, and follows the server."""

    # from Optuna's client
    _channel: Any
    _stub: Any
    _cache: Any

    def __init__(self, root: str, patience: float) -> None:
        self._root = root
        self._patience = patience
        super().__init__(host="", port=0)

    def _setup(self) -> None:
        super()._setup()
        self._channel.close()  # Optuna's own, which has not connected yet
        self._channel = _Channel(self._root, self._patience, type(self._stub))
        self._stub = _Stub(self._channel)
        self._cache = type(self._cache)(self._stub)

    def wait_server_ready(self, timeout: float | None = None) -> None:
        """Nothing to do: every request waits."""


def storage(instance: str = "hpc_db", patience: float = PATIENCE_SECONDS) -> InstanceStorage:
    """Return the storage of an instance, by its name or by its directory, that waits ``patience`` seconds."""
    if not 0 <= patience <= MOST_SECONDS:  # guard: longest patience
        raise ValueError(f"patience is {patience:g}; it may be 0 to {MOST_SECONDS:.0f} seconds")
    root = os.path.expanduser(instance if os.sep in instance else f"~/hpc_db/{instance}")
    if not os.path.isdir(os.path.join(root, "run")):
        raise ValueError(f"{root} is no instance directory; give its path, as instance_root has it")
    return InstanceStorage(root, patience)


class _Channel:
    """The channel to wherever the proxy is now, for all threads. ``data`` is whose data it serves, once known."""

    def __init__(self, root: str, patience: float, stub: type) -> None:
        self._root = root
        self.patience = Patience(patience, f"storage proxy of {root}")
        self._make_stub = stub
        self._made_for: tuple[str, bytes, bytes] | None = None  # address, certificate, key
        self._channel: Any = None
        self._stub: Any = None
        self._lock = threading.Lock()
        self.data = ""

    def stub(self, look: bool) -> Any:
        """Return Optuna's stub, if wanted after a look where the proxy is; raise LookupError if none is published."""
        with self._lock:
            if self._stub is not None and not look:
                return self._stub
        try:
            with open(os.path.join(self._root, "run", "endpoint.json"), encoding="utf-8") as stream:
                proxy = json.load(stream)["proxy"]
        except (OSError, ValueError, KeyError) as error:
            raise LookupError("no proxy is published (server_proxy)") from error
        address = f"{proxy['host']}:{proxy['port']}"
        try:
            certificate, key = (self._read(f"proxy.{kind}") for kind in ("crt", "key"))
        except FileNotFoundError as error:  # guard: certificate that is missing
            raise LookupError(f"{error.filename} is missing until hpc_db.yml makes another one") from error
        with self._lock:
            if self._stub is None or (address, certificate, key) != self._made_for:
                # The former channel is closed with its last request, that of another thread, say.
                credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
                self._channel = grpc.secure_channel(address, credentials, options=OPTIONS)
                self._made_for, self._stub = (address, certificate, key), self._make_stub(self._channel)
            return self._stub

    def close(self) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = self._stub = None

    def _read(self, name: str) -> bytes:
        path = os.path.join(self._root, "secrets", name)
        with open(path, "rb") as stream:
            found = stream.read()
        if not found:  # not yet written, and nothing to give to gRPC, which would end the process
            raise FileNotFoundError(errno.ENOENT, "it is empty", path)
        return found


class _Stub:
    """Optuna's stub, whose requests wait for the proxy."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._answered: deque[str] = deque()

    def __getattr__(self, name: str) -> Any:
        return lambda request: self._send(name, request)

    def _send(self, name: str, request: Any) -> Any:
        outage: Outage | None = None
        said = {REQUEST: str(uuid.uuid4())} if name in ONCE | TWICE else {}
        if name in ONCE:
            said[ANSWERED] = " ".join(self._take_answered())
        while True:
            try:
                stub = self._channel.stub(look=outage is not None)
                if self._channel.data:
                    said[DATA] = self._channel.data
                answer, call = getattr(stub, name).with_call(request, metadata=tuple(said.items()))
                self._channel.data = self._channel.data or dict(call.initial_metadata()).get(DATA, "")
                self._channel.patience.is_over()
                if name in ONCE and AGAIN not in said:  # else the proxy may have the first one still before it
                    self._answered.append(said[REQUEST])  # guard: notes that nobody needs
                return answer
            except (LookupError, grpc.RpcError) as error:
                if _code(error) == grpc.StatusCode.ABORTED:
                    raise StorageInternalError(f"hpc_db: {_Said(error)}") from error
                if not _is_away(error):
                    raise
                if name not in ONCE | TWICE and not name.startswith("Get"):  # guard: requests that nobody knows
                    raise
                outage = outage or Outage(self._channel.patience)
                try:
                    outage.pause(_Said(error))
                except GaveUp as gave_up:
                    raise ConnectionError(str(gave_up)) from error
                said[AGAIN] = "1"

    def _take_answered(self) -> list[str]:
        taken: list[str] = []
        with contextlib.suppress(IndexError):  # other threads take some, too
            while len(taken) < MOST_ANSWERED:
                taken.append(self._answered.popleft())
        return taken


def _code(error: BaseException) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE


def _is_away(error: BaseException) -> bool:
    """Tell whether the proxy has gone, or postgres behind it."""
    if _code(error) == grpc.StatusCode.UNKNOWN:
        return "Stream removed" in str(error)  # of a process that was killed, as grpcio said it once
    return _code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class _Said(Exception):
    """What went wrong, in gRPC's one line instead of its twelve."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error.details() if isinstance(error, grpc.RpcError) else str(error))
