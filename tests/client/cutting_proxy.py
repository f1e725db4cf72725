# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A proxy that parses just enough of PostgreSQL's protocol to cut a connection at a chosen request.

A request is the unit that the server answers with one ReadyForQuery: a statement, or a driver's own BEGIN or COMMIT.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable

# The fates of the chosen request and its connection.
REQUEST_LOST = "request lost"  # the server never sees it
ANSWER_LOST = "answer lost"
SESSION_LEFT = "session left"  # the same, and the server does not notice that the client has gone
TERMINATED = "terminated"  # by the server, with a message, before the request
KILLED = "killed before"  # the server's process, which also ends all others
ANSWERED_AND_KILLED = "killed after"
WAYS = (REQUEST_LOST, ANSWER_LOST, SESSION_LEFT, TERMINATED)
CRASHES = (KILLED, ANSWERED_AND_KILLED)


class Proxy:
    """Listens on ``port``; ``requests`` holds the requests since the last ``cut``."""

    def __init__(self, server: int, terminate: Callable[[int], object]) -> None:
        self.server = server
        self._terminate = terminate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._then: Callable[[], object] = lambda: None
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._chosen: dict[int, str] = {}
        self._text = (b"", "")
        self._after = b""
        self.requests: list[bytes] = []

    def cut(self, chosen: dict[int, str], then: Callable[[], object] = lambda: None) -> None:
        """Cut the requests with these numbers, counted from one starting now; call ``then`` before a cut is noticed."""
        with self._lock:
            self._chosen, self._then = dict(chosen), then
            self._text, self._after = (b"", ""), b""
            self.requests = []

    def cut_at(
        self, text: bytes, way: str, then: Callable[[], object] = lambda: None, after: bytes = b""
    ) -> None:
        """Cut the next request with this text, perhaps after another; call ``then`` before the cut is noticed."""
        self.cut({}, then)
        self._text, self._after = (text, way), after

    @property
    def due(self) -> bool:
        """Return whether the chosen text has not appeared yet."""
        return bool(self._text[0])

    def __enter__(self) -> Proxy:
        self._start(self._listen)
        return self

    def __exit__(self, *_unused: object) -> None:
        # Closing a socket that a thread reads from would give its number to another test's socket.
        for each in (self._listener, *list(self._sockets)):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, target: Callable, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._listener.accept()
                self._sockets.add(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        self._sockets.add(server)
        ends = [client, server]
        try:
            server.connect(("127.0.0.1", self.server))
            if self._talk(client, server):
                ends.remove(server)  # it stays open
        except (OSError, EOFError):
            pass
        finally:
            for each in ends:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                self._sockets.discard(each)
                each.close()

    def _talk(self, client: socket.socket, server: socket.socket) -> bool:
        """Forward data until the end; return whether the server's side is left open."""
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
                pass_on_farewell(server, client)
                kind, whole = message(client)
                request += whole
            with self._lock:
                self.requests.append(request)
                way = self._chosen.pop(len(self.requests), None) if kind != b"X" else None
                if self._after and self._after in request:
                    self._after = b""
                elif self._text[0] and not self._after and self._text[0] in request:
                    way, self._text = self._text[1], (b"", "")
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
            if way == REQUEST_LOST:
                server.shutdown(socket.SHUT_RDWR)
            self._then()
            return way == SESSION_LEFT


def read(stream: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes."""
    data = b""
    while len(data) < size:
        data += (some := stream.recv(size - len(data)))
        if not some:
            raise EOFError
    return data


def message(stream: socket.socket) -> tuple[bytes, bytes]:
    """Read one message; return its type and all its bytes."""
    head = read(stream, 5)
    return head[:1], head + read(stream, struct.unpack("!I", head[1:])[0] - 4)


def pass_on_farewell(server: socket.socket, client: socket.socket) -> None:
    """Wait until the client sends data; meanwhile the server may end the session."""
    both = select.poll()
    both.register(client, select.POLLIN)
    both.register(server, select.POLLIN)
    while server.fileno() in dict(both.poll()):
        client.sendall(read(server, 1))


def answer(server: socket.socket) -> bytes:
    """Read up to ReadyForQuery, or to the end of the stream if the server hangs up."""
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
