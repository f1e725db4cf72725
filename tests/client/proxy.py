# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A proxy that knows as much of PostgreSQL's protocol as it takes to cut a connection at a chosen request.

A request is what the server answers with one ReadyForQuery: a statement, or a driver's own BEGIN or COMMIT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable

# What becomes of the chosen request, and of its connection.
REQUEST_LOST = "request lost"  # the server never sees it
ANSWER_LOST = "answer lost"
SESSION_LEFT = "session left"  # the same, and the server does not notice that the client has gone
TERMINATED = "terminated"  # by the server, which says so, before the request
KILLED = "killed before"  # the server's process, and by that all others as well
ANSWERED_AND_KILLED = "killed after"
WAYS = (REQUEST_LOST, ANSWER_LOST, SESSION_LEFT, TERMINATED)
CRASHES = (KILLED, ANSWERED_AND_KILLED)


class Proxy:
    """Listens on ``port``; ``requests`` were made since the last ``cut``."""

    def __init__(self, server: int, terminate: Callable[[int], object]) -> None:
        self._server = server
        self._terminate = terminate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._chosen: dict[int, str] = {}
        self.requests: list[bytes] = []
        self.opened = 0

    def cut(self, chosen: dict[int, str]) -> None:
        """Cut these requests, numbered by one from now on, in these ways."""
        with self._lock:
            self._chosen = dict(chosen)
            self.requests = []

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._listener.close()
        for each in self._sockets:
            each.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._listener.accept()
                self._sockets.append(client)
                self.opened += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        with contextlib.suppress(OSError, EOFError):
            server = socket.create_connection(("127.0.0.1", self._server))
            self._sockets.append(server)
            if self._talk(client, server):
                server = None  # it stays open
        for each in (client, server):
            if each:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def _talk(self, client: socket.socket, server: socket.socket) -> bool:
        """Pass on until the end; return whether the server's side is left open."""
        (length,) = struct.unpack("!I", head := read(client, 4))
        server.sendall(head + read(client, length - 4))
        greeting = answer(server)
        client.sendall(greeting)
        key = greeting.find(b"K\0\0\0")
        if key < 0:  # refused
            return False
        (pid,) = struct.unpack("!I", greeting[key + 5:key + 9])
        while True:
            request, kind = b"", b""
            while kind not in (b"Q", b"S", b"X"):
                kind, whole = message(client)
                request += whole
            with self._lock:
                self.requests.append(request)
                way = self._chosen.pop(len(self.requests), None) if kind != b"X" else None
            if way in (ANSWER_LOST, SESSION_LEFT, ANSWERED_AND_KILLED, None):
                server.sendall(request)
                answered = answer(server)
            if way is None:
                client.sendall(answered)
                continue
            if way in CRASHES:
                os.kill(pid, signal.SIGKILL)
            if way == TERMINATED:
                self._terminate(pid)
                client.sendall(message(server)[1])
            return way == SESSION_LEFT


def read(stream: socket.socket, size: int) -> bytes:
    """Read exactly so many bytes."""
    data = b""
    while len(data) < size:
        data += (some := stream.recv(size - len(data)))
        if not some:
            raise EOFError
    return data


def message(stream: socket.socket) -> tuple[bytes, bytes]:
    """Read one message; return its kind and the whole."""
    head = read(stream, 5)
    return head[:1], head + read(stream, struct.unpack("!I", head[1:])[0] - 4)


def answer(server: socket.socket) -> bytes:
    """Read up to ReadyForQuery, or what there is if the server hangs up."""
    data, kind = b"", b""
    while kind != b"Z":
        try:
            kind, whole = message(server)
        except (EOFError, OSError):
            if data:
                return data
            raise
        data += whole
    return data
