# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A PostgreSQL server, and a proxy before it that cuts connections where a test wants it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from cutting_proxy import CRASHES, WAYS, Proxy
from real_server import Server

DRIVERS = ["psycopg2", *(["psycopg"] if find_spec("psycopg") else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="every cut by itself, and crashes")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ways" in metafunc.fixturenames:
        soak = metafunc.config.getoption("--soak")
        ways = [[way] for way in WAYS + CRASHES] if soak else [[*WAYS]]
        metafunc.parametrize("ways", ways, ids=" ".join)


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
