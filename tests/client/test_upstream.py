# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""SQLAlchemy's and Optuna's own tests: every test that passes without the plugin also passes with it.

Runs a part of them, or with --soak all that concern PostgreSQL.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from real_server import DRIVERS, Server
from test_storage_proxy import Instance

SOURCES = Path(__file__).resolve().parents[2] / ".cache" / "client" / "sources"
WITHOUT = "sslmode=disable&gssencmode=disable"
WITH = f"{WITHOUT}&plugin=hpc_db&hpc_db_patience=60"
SQLALCHEMY = ["test/dialect/postgresql", "test/dialect/test_suite.py", "test/orm", "test/sql", "test/engine"]
SQLALCHEMY_PART = ["test/dialect/test_suite.py", "test/engine/test_transaction.py"]
OPTUNA = [
    *(f"tests/storages_tests/{name}.py" for name in ("test_storages", "test_with_server", "test_heartbeat")),
    "tests/storages_tests/test_callbacks.py", "tests/study_tests", "tests/trial_tests",
    "--ignore=tests/study_tests/test_dataframe.py",  # needs pandas
    "-k", "not test_copy_study",  # needs a second storage
]
OPTUNA_PART = ["tests/storages_tests/test_storages.py", "-k", "not sqlite or cached_sqlite and (create or state)"]
# Tests that fail with the plugin only, and the reasons.
LISTED = {
    "EngineEventsTest::test_insert_connect_is_definitely_first[True-True]":
        "it puts another on_connect into the dialect after the engine was made; the plugin prepares connections itself",
}


class Suite(NamedTuple):
    """The source of a package, with its tests."""

    folder: Path

    def run(self, tests: list[str], report: Path, *options: str, **environment: str) -> tuple[set[str], set[str]]:
        """Return the passed and the failed tests."""
        command = [sys.executable, "-s", "-m", "pytest", *tests, f"--junitxml={report}", *options]
        command += ["-q", "-o", "addopts=", "-o", f"cache_dir={report.parent}/cache"]
        with open(report.with_suffix(".log"), "w") as log:
            env = {**os.environ, **environment}
            subprocess.run(command, cwd=self.folder, env=env, stdout=log, stderr=log, check=False)
        passed, failed = set(), set()
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                failed.add(name)
            elif "skipped" not in kinds:
                passed.add(name)
        return passed - failed, {name for name in failed if not name.endswith(tuple(LISTED))}


def source(name: str) -> Suite:
    (folder,) = (each for each in SOURCES.glob(f"{name}-*") if each.is_dir())
    return Suite(folder)


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    """The name of a database prepared for SQLAlchemy's tests."""
    server.ask("CREATE DATABASE upstream OWNER study")
    for statement in ("SCHEMA test_schema", "SCHEMA test_schema_2", "EXTENSION hstore", "EXTENSION citext"):
        server.ask(f"CREATE {statement}", "upstream")
    yield "upstream"
    for name, in server.ask("SELECT datname FROM pg_database WHERE datname LIKE '%upstream%'"):
        server.ask(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.parametrize("driver", DRIVERS)
def test_sqlalchemy_s_own(server: Server, database: str, driver: str, tmp_path: Path, soak: bool) -> None:
    sqlalchemy = source("sqlalchemy")
    tests = SQLALCHEMY if soak else SQLALCHEMY_PART
    if soak and driver != DRIVERS[0]:
        tests = [test for test in tests if "dialect" in test]
    parallel = ["--numprocesses=2"] if soak else []

    def run(query: str, *options: str) -> tuple[set[str], set[str]]:
        uri = f"--dburi=postgresql+{driver}://owner:any@127.0.0.1:{server.port}/{database}?{query}"
        return sqlalchemy.run(tests, tmp_path / f"{len(query)}.xml", uri, *parallel, *options)

    passed, failed = run(WITH)
    print(f"{len(passed)} passed")
    if failed:
        failed &= run(WITHOUT, "--last-failed")[0]
    assert not failed
    assert len(passed) > (8000 if soak else 500)


@pytest.mark.parametrize("way", ["direct", "pooled", "proxy"])
def test_optuna_s_own(
    server: Server, database: str, request: pytest.FixtureRequest, way: str, tmp_path: Path, soak: bool
) -> None:
    port = request.getfixturevalue("pooler").port if way == "pooled" else server.port
    url = f"postgresql+psycopg2://study@127.0.0.1:{port}/{database}?{WITH}"
    environment = {"TEST_DB_URL": url, "ELSEWHERE": url, "PYTHONPATH": str(Path(__file__).parent)}
    with ExitStack() as end:
        if way == "proxy":
            end.callback(Instance(tmp_path, server, database).stop)
            environment["ELSEWHERE"] = f"{tmp_path}/"
        tests = OPTUNA if soak else OPTUNA_PART
        passed, failed = source("optuna").run(tests, tmp_path / "report.xml", "-p", "optuna_elsewhere", **environment)

    print(f"{len(passed)} passed")
    assert not failed
    assert len(passed) > (300 if soak else 15)
