# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage through the proxy of an instance (``server_proxy``): no connections of one's own.

    study = optuna.load_study(study_name="beryllium", storage=hpc_db_client.proxy.storage("hpc_db"))

It finds the proxy in the instance directory and shows the certificate there, which nobody else can read. Needs
Optuna 4.2 or newer and grpcio. While the proxy is away it waits, as the engine plugin does. A request that was cut
is sent again, though it may have been served: a value that is set twice is the same, but where the request was for
a new trial, an empty one may be left RUNNING.
"""

from __future__ import annotations

import json
import os
from typing import Any

import grpc
from optuna.storages import GrpcStorageProxy
from optuna.storages._grpc.auto_generated import api_pb2

from .patience import GaveUp, Outage, Patience

PATIENCE_SECONDS = 600.0
# What the certificate is for, on whatever host the proxy runs.
NAME = "hpc-db"
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
    root = os.path.expanduser(instance if os.sep in instance else f"~/hpc_db/{instance}")
    if not os.path.isdir(os.path.join(root, "run")):
        raise ValueError(f"{root} is no instance directory; give its path, as instance_root has it")
    return InstanceStorage(root, patience)


class _Channel:
    """The channel to wherever the proxy is now."""

    def __init__(self, root: str, patience: float, stub: type) -> None:
        self._root = root
        self.patience = Patience(patience, f"storage proxy of {root}")
        self._make_stub = stub
        self._address = ""
        self._channel: Any = None
        self._stub: Any = None

    def stub(self) -> Any:
        """Return Optuna's stub; raise LookupError if no proxy is published."""
        try:
            with open(os.path.join(self._root, "run", "endpoint.json"), encoding="utf-8") as stream:
                proxy = json.load(stream)["proxy"]
        except (OSError, ValueError, KeyError) as error:
            raise LookupError("no proxy is published (server_proxy)") from error
        address = f"{proxy['host']}:{proxy['port']}"
        if self._stub is None or address != self._address:
            self.close()
            self._channel = grpc.secure_channel(address, self._credentials(), options=OPTIONS)
            self._address, self._stub = address, self._make_stub(self._channel)
        return self._stub

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._stub = None

    def _credentials(self) -> grpc.ChannelCredentials:
        certificate, key = (self._read(f"proxy.{kind}") for kind in ("crt", "key"))
        return grpc.ssl_channel_credentials(certificate, key, certificate)

    def _read(self, name: str) -> bytes:
        with open(os.path.join(self._root, "secrets", name), "rb") as stream:
            return stream.read()


class _Stub:
    """Optuna's stub, whose requests wait for the proxy."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._stub: Any = None

    def __getattr__(self, name: str) -> Any:
        return lambda request: self._send(name, request)

    def _send(self, name: str, request: Any) -> Any:
        outage: Outage | None = None
        while True:
            try:
                self._stub = self._stub or self._channel.stub()
                answer = getattr(self._stub, name)(request)
                self._channel.patience.is_over()
                return answer
            except (LookupError, grpc.RpcError) as error:
                if outage and _code(error) == grpc.StatusCode.FAILED_PRECONDITION and self._is_so(name, request):
                    return _Finished()  # by us, before the answer was cut
                if not _is_away(error):
                    raise
                outage = outage or Outage(self._channel.patience)
                try:
                    outage.pause(_Said(error))
                except GaveUp as gave_up:
                    raise ConnectionError(str(gave_up)) from error
                self._stub = None  # it may be elsewhere now

    def _is_so(self, name: str, request: Any) -> bool:
        """Tell whether a trial has ended just as the request wants it to."""
        if name != "SetTrialStateValues":
            return False
        trial = self._send("GetTrial", api_pb2.GetTrialRequest(trial_id=request.trial_id)).trial
        return (trial.state, list(trial.values)) == (request.state, list(request.values))


def _code(error: BaseException) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE


def _is_away(error: BaseException) -> bool:
    """Tell whether the proxy has gone, or postgres behind it."""
    if _code(error) == grpc.StatusCode.UNKNOWN:
        return "Stream removed" in str(error)  # of a process that was killed, as grpcio said it once
    return _code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class _Finished:
    """Optuna's answer to a trial's end."""

    trial_updated = True


class _Said(Exception):
    """What went wrong, in gRPC's one line instead of its twelve."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error.details() if isinstance(error, grpc.RpcError) else str(error))
