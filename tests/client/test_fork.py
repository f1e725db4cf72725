# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs that open a study and then fork the workers that share it, as multiprocessing does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hpc_db_client import patience
from real_server import Ask, Server

WORKERS, TRIALS = 4, 10
SECONDS = 120
# The parent runs the first and the last trials.
PROGRAM = """
import json, multiprocessing, sys
import optuna

url, name, workers, trials = *sys.argv[1:3], *map(int, sys.argv[3:])
study = optuna.create_study(storage=url, study_name=name)

def optimize(number):
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=number)

optimize(2)
fork = multiprocessing.get_context("fork")
forked = [fork.Process(target=optimize, args=(trials,)) for _number in range(workers)]
for each in forked:
    each.start()
for each in forked:
    each.join()
optimize(2)
print(json.dumps([each.exitcode for each in forked]))
"""


class Encrypted:
    """Listens on ``port`` with TLS, which the packaged PostgreSQL lacks, and forwards everything to the server."""

    def __init__(self, folder: Path, server: int) -> None:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=hpc-db",
             "-keyout", "server.key", "-out", "server.crt"], cwd=folder, check=True, stderr=subprocess.DEVNULL,
        )
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, asking: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            asking.recv(8)  # the request for TLS
            asking.sendall(b"S")
            client = stack.enter_context(self._context.wrap_socket(asking, server_side=True))
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self._server)))
            while True:
                for each in [client] if client.pending() else select.select([client, server], [], [])[0]:
                    some = each.recv(65536)
                    if not some:
                        return
                    (server if each is client else client).sendall(some)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(params=["disable", "require"])
def address(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[str]:
    """The server's address without and with TLS, and libpq's sslmode for that."""
    if request.param == "disable":
        yield f"127.0.0.1:{server.port}/study?sslmode=disable"
        return
    encrypted = Encrypted(tmp_path, server.port)
    yield f"127.0.0.1:{encrypted.port}/study?sslmode=require"
    encrypted.stop()


def run(program: str, *arguments: str) -> str:
    """Return the last line that a program printed; the time limit also ends the processes that it forks."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as running:
        try:
            said = running.communicate(timeout=SECONDS)[0]
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    assert running.returncode == 0, said
    return said.splitlines()[-1]


def test_children_work_on_a_study_that_was_opened_before(driver: str, address: str, database: Ask) -> None:
    name = f"fork {uuid.uuid4()}"
    url = f"postgresql+{driver}://study@{address}&gssencmode=disable&plugin=hpc_db&hpc_db_patience=60"

    ended = json.loads(run(PROGRAM, url, name, str(WORKERS), str(TRIALS)))

    assert ended == [0] * WORKERS
    assert database(
        "SELECT number, state::text, count(trial_value_id) FROM trials JOIN studies USING (study_id)"
        f" LEFT JOIN trial_values USING (trial_id) WHERE study_name = '{name}' GROUP BY 1, 2 ORDER BY 1"
    ) == [(number, "COMPLETE", 1) for number in range(2 + WORKERS * TRIALS + 2)]


def test_children_wait_each_for_another_time() -> None:
    reading, writing = os.pipe()
    for _child in range(2):
        if not os.fork():
            os.write(writing, f"{patience._random.random()}\n".encode())
            os._exit(0)
        os.wait()
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert len(set(stream.read().split())) == 2
