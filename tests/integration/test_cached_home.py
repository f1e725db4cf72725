# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""On hosts that cache names, absent names and attributes of the home directories for a minute, a move is seen at once.

Opening a file asks the server, as on NFS; asking whether a file exists does not.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator

import pytest
from mini_cluster import NAME, MiniCluster, eventually, started

# Seconds within which another host has to notice, although it caches for 60.
SOON = 10
SETTINGS = {
    "server_job_options": {"partition": "work", "time": "00:30:00", "mem": "1000M", "cpus-per-task": 1},
    "server_handover_after": "00:01:00", "server_lease_ttl": 90, "server_dump_minutes": 0,
}
LOOK = f"""
import psycopg2, time
while True:
    try:
        psycopg2.connect("service={NAME}").close()
        print(time.time(), "up", flush=True)
    except psycopg2.Error:
        print(time.time(), "away", flush=True)
    time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    with started("--cached") as cluster:
        yield cluster


def events(cluster: MiniCluster, state: str) -> list[float]:
    """Return the times at which a server job reported this state, read behind the caches."""
    lines = (cluster.root / "log/events.jsonl").read_text().splitlines()
    return [each["time"] for each in map(json.loads, lines) if each["state"] == state]


def test_absent_names_are_cached(cluster: MiniCluster) -> None:
    """Otherwise the tests below show nothing."""
    cluster.run("ls late 2>/dev/null || true")
    cluster.run("touch late", host="c1")

    assert cluster.run("test -e late && echo there || echo absent") == "absent"


def test_playbook_sees_a_new_server(cluster: MiniCluster) -> None:
    played = cluster.playbooks.play("hpc_db", SETTINGS)
    returned = time.time()

    assert played.returncode == 0, played.stdout
    assert returned - events(cluster, "serving")[0] < SOON


def test_worker_sees_each_move(cluster: MiniCluster) -> None:
    """A worker on the other node, through a hand-over and a cancelled job."""
    before = cluster.said("endpoint")
    other = {"c1": "c2", "c2": "c1"}[before["host"]]
    (cluster.home / "look.py").write_text(LOOK)
    (cluster.home / "looked").touch()
    (cluster.home / "looked").chmod(0o666)
    looking = cluster.start(other, f"hpc_db/{NAME}/python/bin/python look.py >> looked 2>&1")
    eventually(lambda: "up" in (cluster.home / "looked").read_text(), 60)

    cluster.wait_for_another(before, 300)  # the successor takes over
    seen = seconds_away(cluster)
    assert 0 < seen < SOON, seen

    before = cluster.said("endpoint")
    cancelled = time.time()
    cluster.run("scancel $1", before["job"])
    cluster.wait_for_another(before, 300)
    time.sleep(SOON)
    away, back = last_away(cluster)
    assert away > cancelled
    late = back - events(cluster, "serving")[-1]
    assert late < SOON, late
    looking.kill()
    for process in cluster.processes("python3"):
        if "look.py" in process.command:
            os.kill(process.pid, 15)
    looking.communicate(timeout=20)


def seconds_away(cluster: MiniCluster) -> float:
    """Wait until the server is seen again; return how long the worker has not seen it."""
    looked: list[tuple[float, str]] = []

    def is_back() -> bool:
        nonlocal looked
        lines = (cluster.home / "looked").read_text().splitlines()
        looked = [(float(line.split()[0]), line.split()[1]) for line in lines if len(line.split()) == 2]
        states = [state for _time, state in looked]
        return "away" in states and states[-1] == "up"

    eventually(is_back, 120)
    away = [moment for moment, state in looked if state == "away"]
    back = next(moment for moment, state in looked if moment > away[-1] and state == "up")
    return back - away[0]


def last_away(cluster: MiniCluster) -> tuple[float, float]:
    """Return when the worker last saw that the server was away, and that it was back."""
    lines = [line.split() for line in (cluster.home / "looked").read_text().splitlines()]
    last = max(number for number, (_time, state) in enumerate(lines) if state == "away")
    return float(lines[last][0]), float(lines[last + 1][0])


def test_stop_is_seen(cluster: MiniCluster) -> None:
    played = cluster.playbooks.play("stop", SETTINGS)

    assert played.returncode == 0, played.stdout
    assert cluster.jobs() == {} and not cluster.service()
    status = cluster.playbooks.play("status", SETTINGS)
    assert re.search(r"state +ended: stopped by SIGTERM", status.stdout), status.stdout
