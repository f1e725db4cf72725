# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run chromedriver here, for a selenium that may be in another network: chromedriver_door.py LISTENING_SOCKET.

The socket belongs to the network in which it was made; connections to it reach the chromedriver here. The program ends
when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading


def start() -> tuple[subprocess.Popen[str], int]:
    """Start chromedriver; return it and its port, which it cannot choose itself on a machine without IPv6."""
    said = ""
    for _each in range(5):  # another process may take the port before chromedriver does
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if f"started successfully on port {port}" in line:
                # otherwise chromedriver blocks when the pipe is full
                threading.Thread(target=process.stdout.read, daemon=True).start()
                return process, port
        process.wait()
    sys.exit(f"chromedriver does not start: {said}")


def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy all data from one socket to the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def serve(door: socket.socket, port: int) -> None:
    """Accept connections; each direction has a thread."""
    while True:
        caller, _address = door.accept()
        driver = socket.create_connection(("127.0.0.1", port))
        for pair in [(caller, driver), (driver, caller)]:
            threading.Thread(target=pump, args=pair, daemon=True).start()


def main() -> None:
    """Run until standard input is closed."""
    door = socket.socket(fileno=int(sys.argv[1]))
    process, port = start()
    threading.Thread(target=serve, args=(door, port), daemon=True).start()
    sys.stdin.read()
    process.send_signal(signal.SIGTERM)
    process.wait()


if __name__ == "__main__":
    main()
