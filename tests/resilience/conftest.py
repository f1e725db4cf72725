# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""During every test, eight workers continue one study; afterwards, no acknowledged trial may be missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini_cluster import MiniCluster, Watch, Workers

FIGURES: list[tuple[str, str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="repeat as often as the targets say")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
    for row, measured, test in FIGURES:
        terminalreporter.write_line(f"{row:4} {measured} ({test})")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Record a measurement for a row of the targets."""
    return lambda row, measured: FIGURES.append((row, measured, request.node.name))


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak", default=False)


@pytest.fixture(scope="session")
def cluster() -> MiniCluster:
    state = os.environ.get("HPC_DB_CLUSTER", "/tmp/hpc-db-cluster")
    if not Path(state, "home/alice/hpc_db/hpc_db/host").exists():
        pytest.skip(f"no test cluster with a server is running in {state}")
    return MiniCluster(Path(state))


@pytest.fixture(scope="session")
def watch(cluster: MiniCluster) -> Iterator[Watch]:
    with Watch(cluster) as watch:
        yield watch


@pytest.fixture(scope="session")
def workers(cluster: MiniCluster) -> Iterator[Workers]:
    """Run eight workers on a node without the server until the last test has ended."""
    with Workers(cluster, "c3") as started:
        yield started
    started.check_ended()


@pytest.fixture(autouse=True)
def nothing_is_lost(cluster: MiniCluster, workers: Workers, watch: Watch) -> Iterator[None]:
    cluster.have_server()
    watch.wait_for_acknowledgement(60)
    watch.reset()
    yield
    for host in ("c1", "c2"):
        cluster.mend(host)
    cluster.have_server()
    watch.wait_for_acknowledgement(60)
    workers.check()
    assert watch.most() == 1


@pytest.fixture
def serving(cluster: MiniCluster) -> dict:
    """Return the server's endpoint at the start of the test."""
    return {**cluster.said("endpoint"), "at": time.monotonic()}
