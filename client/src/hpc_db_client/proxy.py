# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Optuna's storage through an instance's storage proxy (``server_proxy``), without database connections of its own.

    study = optuna.load_study(study_name="beryllium", storage=hpc_db_client.proxy.storage("hpc_db"))

The storage reads the proxy's address and certificate from the instance directory, where only the owner can read them.
It needs Optuna 4.2 or newer and grpcio. During an outage of the proxy it waits, like the engine plugin. A request whose
answer was lost is sent again, although it may have been served: setting a trial's value twice has no further effect,
and requests that must run only once (to create or delete a study, set its attributes, create a trial, or begin or end
a trial) have an id that the proxy recognises. If the database was restored meanwhile, an error is raised that says so.
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

from .outlook import Outlook
from .patience import GaveUp, Outage, Patience

PATIENCE_SECONDS = 600.0
MAX_WAIT_SECONDS = 12 * 3600.0
# Must be shorter than 90 days, when the proxy deletes its records of requests.
MOST_SECONDS = 30 * 86400.0
# The name in the certificate, independent of the proxy's host.
NAME = "hpc-db"
# Metadata as in roles/server/files/storage_proxy.py: the id of a request, whether it is a repetition, the ids
# of earlier requests that were answered and will not be repeated, and the identity of the data.
REQUEST, AGAIN, ANSWERED, DATA = "hpc-db-request", "hpc-db-again", "hpc-db-answered", "hpc-db-data"
# ONCE: requests that the proxy runs only once. TWICE: requests that may run twice, since only the worker that runs a
# trial sends them. Of all others, only those that read are repeated.
ONCE = {
    "CreateNewStudy", "DeleteStudy", "SetStudyUserAttribute", "SetStudySystemAttribute", "CreateNewTrial",
    "SetTrialStateValues",
}
TWICE = {"SetTrialParameter", "SetTrialIntermediateValue", "SetTrialUserAttribute", "SetTrialSystemAttribute"}
MOST_ANSWERED = 50  # in one request
OPTIONS = [
    ("grpc.ssl_target_name_override", NAME),
    ("grpc.max_receive_message_length", -1),
    # A node that has failed sends no error: send keepalive pings while waiting for an answer.
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 10000),
]


class InstanceStorage(GrpcStorageProxy):  # type: ignore[misc]
    """Optuna's client on a channel that is encrypted and authenticated, and that follows the server."""

    # from Optuna's client
    _channel: Any
    _stub: Any
    _cache: Any

    def __init__(self, root: str, patience: float, max_wait: float) -> None:
        self._root = root
        self._limits = patience, max_wait
        super().__init__(host="", port=0)

    def _setup(self) -> None:
        super()._setup()
        self._channel.close()  # Optuna's own, which has not connected yet
        self._channel = _Channel(self._root, *self._limits, type(self._stub))
        self._stub = _Stub(self._channel)
        self._cache = type(self._cache)(self._stub)

    def wait_server_ready(self, timeout: float | None = None) -> None:
        """Return at once, since every request waits."""


def storage(
    instance: str = "hpc_db", patience: float = PATIENCE_SECONDS, max_wait: float = MAX_WAIT_SECONDS
) -> InstanceStorage:
    """Return the storage of an instance, given by name or directory.

    ``patience`` (seconds) counts from the last moment at which a server job was queued or running, ``max_wait`` from
    the start of the outage.
    """
    for name, seconds in (("patience", patience), ("max_wait", max_wait)):
        if not 0 <= seconds <= MOST_SECONDS:  # guard: longest patience
            raise ValueError(f"{name}: {seconds:g} is not allowed; 0 to {MOST_SECONDS:.0f} seconds")
    root = os.path.expanduser(instance if os.sep in instance else f"~/hpc_db/{instance}")
    if not os.path.isdir(os.path.join(root, "run")):
        raise ValueError(f"{root} is not an instance directory; give the path in instance_root")
    return InstanceStorage(root, patience, max_wait)


class _Channel:
    """The channel to the proxy's current address, for all threads. ``data`` is the identity of its data, once known."""

    def __init__(self, root: str, patience: float, max_wait: float, stub: type) -> None:
        self._root = root
        self.patience = Patience(patience, f"storage proxy of {root}", max_wait, Outlook(root))
        self._make_stub = stub
        self._made_for: tuple[str, bytes, bytes] | None = None  # address, certificate, key
        self._channel: Any = None
        self._stub: Any = None
        self._lock = threading.Lock()
        self.data = ""

    def stub(self, look: bool) -> Any:
        """Return Optuna's stub; with ``look``, for the current address. Raise LookupError if none is published."""
        with self._lock:
            if self._stub is not None and not look:
                return self._stub
        # Workers cannot ask the scheduler whether the endpoint's job still runs. They need not: a proxy that has ended
        # does not answer, and any other program lacks the certificate.
        try:
            with open(os.path.join(self._root, "run", "endpoint.json"), encoding="utf-8") as stream:
                proxy = json.load(stream)["proxy"]
        except (OSError, ValueError, KeyError) as error:
            raise LookupError("no proxy is published (server_proxy)") from error
        address = f"{proxy['host']}:{proxy['port']}"
        try:
            certificate, key = (self._read(f"proxy.{kind}") for kind in ("crt", "key"))
        except FileNotFoundError as error:  # guard: certificate that is missing
            raise LookupError(f"{error.filename} is missing until hpc_db.yml creates another one") from error
        with self._lock:
            if self._stub is None or (address, certificate, key) != self._made_for:
                # The old channel closes after its last request, which may be another thread's.
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
        if not found:  # not written yet; gRPC would abort the process
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
                if name in ONCE and AGAIN not in said:  # else the first attempt may still reach the proxy
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
        with contextlib.suppress(IndexError):  # other threads also take some
            while len(taken) < MOST_ANSWERED:
                taken.append(self._answered.popleft())
        return taken


def _code(error: BaseException) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE


def _is_away(error: BaseException) -> bool:
    """Return whether the proxy, or postgres behind it, is not available."""
    if _code(error) == grpc.StatusCode.UNKNOWN:
        return "Stream removed" in str(error)  # older versions of grpcio report a killed process so
    return _code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class _Said(Exception):
    """An error with gRPC's one-line details instead of its text of twelve lines."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error.details() if isinstance(error, grpc.RpcError) else str(error))
