# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Under every test, eight workers go on with one study; after it, nothing that they were promised is missing."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini_cluster import COMPARE, URL, MiniCluster, Watch
from target import ROOT

WORKER = "exec hpc_db/hpc_db/python/bin/python workers/worker.py --retry --seconds=1 $1 beryllium 100000 workers/log.$2"
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
    """Write down what was measured for a row of the targets."""
    return lambda row, measured: FIGURES.append((row, measured, request.node.name))


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak", default=False)


@pytest.fixture(scope="session")
def cluster() -> MiniCluster:
    state = os.environ.get("HPC_DB_CLUSTER", "/tmp/hpc-db-cluster")
    if not Path(state, "home/alice/hpc_db/hpc_db/host").exists():
        pytest.skip(f"no mini cluster with a server is up in {state}")
    return MiniCluster(Path(state))


@pytest.fixture(scope="session")
def watch(cluster: MiniCluster) -> Iterator[Watch]:
    with Watch(cluster) as watch:
        yield watch


@pytest.fixture(scope="session")
def workers(cluster: MiniCluster) -> Iterator[list]:
    """Eight workers on a node without the server, until the last test has ended."""
    folder = cluster.home / "workers"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests" / "workers", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, 20001, 20001)
    outputs = [f"workers/output.{number}" for number in range(8)]
    started = [
        cluster.start("c3", f"exec >{output} 2>&1; {WORKER}", URL, str(number)) for number, output in enumerate(outputs)
    ]
    yield started
    for process in cluster.processes("python3"):
        if "workers/worker.py" in process.command:
            os.kill(process.pid, 15)
    for worker in started:
        worker.communicate(timeout=20)


@pytest.fixture(autouse=True)
def nothing_is_lost(cluster: MiniCluster, workers: list, watch: Watch) -> Iterator[None]:
    cluster.have_server()
    watch.wait_for_acknowledgement(60)
    watch.reset()
    yield
    for host in ("c1", "c2"):
        cluster.mend(host)
    cluster.have_server()
    watch.wait_for_acknowledgement(60)
    compared = cluster.run(COMPARE, URL)
    assert re.search(r" lost=0 doubled=0 ", compared), compared
    assert all(worker.poll() is None for worker in workers)
    assert watch.most() == 1


@pytest.fixture
def serving(cluster: MiniCluster) -> dict:
    """Where the server is when the test begins."""
    return {**cluster.said("endpoint"), "at": time.monotonic()}
