# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A PostgreSQL server, and a proxy in front of it that cuts connections on a test's request."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import sqlalchemy
from cutting_proxy import CRASHES, WAYS, Proxy
from real_server import DRIVERS, PGBOUNCER, Ask, Make, Pooler, Server

# Optuna has had a storage proxy since 4.2.
collect_ignore = [] if find_spec("grpc") else ["test_storage_proxy.py"]
# The sources tested there are those of the newest versions.
collect_ignore += [] if find_spec("fakeredis") else ["test_upstream.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="every cut by itself, and crashes; a long history")
    parser.addoption("--history-seed", type=int, default=1, help="of the transactions and faults in test_history.py")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def history_seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--history-seed")


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
    """Query the database with the role study."""
    return lambda statement: server.ask(statement, "study")


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port, lambda pid: server.ask(f"SELECT pg_terminate_backend({pid})")) as proxy:
        yield proxy


@pytest.fixture
def pooler(server: Server) -> Iterator[Pooler]:
    """A PgBouncer in transaction mode."""
    if not PGBOUNCER:
        pytest.skip("pgbouncer is not installed")
    pooler = Pooler(server.data.parent / "pooler")
    pooler.start(server.port)
    yield pooler
    pooler.kill()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(driver: str, proxy: Proxy) -> str:
    """The URL with the plugin, through the proxy."""
    where = f"study@127.0.0.1:{proxy.port}/study"
    return f"postgresql+{driver}://{where}?plugin=hpc_db&hpc_db_patience=60&sslmode=disable&gssencmode=disable"


@pytest.fixture
def engine(url: str, database: Callable[[str], list]) -> Iterator[sqlalchemy.engine.Engine]:
    """An engine with one idle connection, and the table t with the rows 1 and 2."""
    database("DROP TABLE IF EXISTS t")
    database("CREATE TABLE t (n int PRIMARY KEY, word text); ALTER TABLE t OWNER TO study")
    database("INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    engine = sqlalchemy.create_engine(url, future=True)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))
    yield engine
    engine.dispose()


@pytest.fixture
def rows(database: Callable[[str], list]) -> Callable[[], list]:
    return lambda: database("SELECT n, word FROM t ORDER BY n")


@pytest.fixture
def make(url: str) -> Iterator[Make]:
    """Return an engine; all engines are disposed of at the end."""
    made = []

    def engine(**options: object) -> sqlalchemy.engine.Engine:
        made.append(sqlalchemy.create_engine(options.pop("url", url), future=True, **options))
        return made[-1]

    yield engine
    for each in made:
        each.dispose()


@pytest.fixture
def cut(database: Ask) -> Callable[[], object]:
    """End the workers' sessions, like a server that moves."""
    return lambda: database("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'study'")


@pytest.fixture
def schema(database: Ask) -> Iterator[Callable[[str], None]]:
    """Create the schema f, with the objects that a test wants in it."""

    def make(definitions: str) -> None:
        database("DROP SCHEMA IF EXISTS f CASCADE; CREATE SCHEMA f AUTHORIZATION study; SET search_path = f, public;"
                 f"SET ROLE study; {definitions}")

    yield make
    database("DROP SCHEMA IF EXISTS f CASCADE")
