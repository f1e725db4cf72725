# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""During every test, eight workers continue one study; afterwards, no acknowledged trial may be missing."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini_cluster import COMPARE, PLUGIN_URL, URL, WORKER, MiniCluster, Watch
from target import ROOT

# Plain Optuna, configured by the URL alone. When the server goes away, six workers are in their objective and two
# between trials, so that their next call is tell or ask. Heartbeats are compared by the database's clock, so a worker
# must not be taken for dead, whatever its time zone.
# Two have Optuna's default sampler, which reads all trials; eight of them would take the whole machine.
WORKERS = [*["--seconds=1 --random"] * 4, *["--pause=1 --random"] * 2, *["--seconds=1 --heartbeat"] * 2]
ZONES = ["UTC"] * 6 + ["Asia/Tokyo", "America/New_York"]
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
def workers(cluster: MiniCluster) -> Iterator[list]:
    """Run eight workers on a node without the server until the last test has ended."""
    folder = cluster.home / "workers"
    shutil.rmtree(folder, ignore_errors=True)
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests" / "workers", folder, ignore=without)
    # The same layout as pip installs.
    shutil.copytree(ROOT / "client/src/hpc_db_client", folder / "hpc_db_client", ignore=without)
    about = folder / "hpc_db_client-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hpc-db-client\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[sqlalchemy.plugins]\nhpc_db = hpc_db_client.plugin:HpcDb\n")
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, 20001, 20001)
    started = [
        cluster.start(
            "c3", f"exec >workers/output.{number} 2>&1; export PGTZ={zone}; exec {WORKER}", PLUGIN_URL, "100000",
            str(number), *options.split(),
        )
        for number, (options, zone) in enumerate(zip(WORKERS, ZONES))
    ]
    yield started
    for process in cluster.processes("python3"):
        if "workers/worker.py" in process.command:
            os.kill(process.pid, 15)
    for worker in started:
        worker.communicate(timeout=20)
    # Only the trials that the workers were running when they were ended may be unfinished, or finished without an
    # acknowledgement.
    left = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", cluster.run(COMPARE, URL))}
    assert left["failed"] == 0
    assert left["running"] + left["complete"] - left["acknowledged"] <= len(started), left


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
    ended = [f"workers/output.{number}" for number, worker in enumerate(workers) if worker.poll() is not None]
    assert not ended, cluster.run('tail -v -n 40 "$@"', *ended)
    assert watch.most() == 1


@pytest.fixture
def serving(cluster: MiniCluster) -> dict:
    """Return the server's endpoint at the start of the test."""
    return {**cluster.said("endpoint"), "at": time.monotonic()}
