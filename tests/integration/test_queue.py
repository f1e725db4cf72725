# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""On a busy cluster, and on one where a user may run one job only, the server moves and no worker ends.

Slurm counts in minutes, so each hand-over takes minutes, in which this machine has little to do.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mini_cluster import MiniCluster, Watch, Workers, eventually, started

# The first job does not wait; its successors do, in the partition of all others.
SETTINGS: dict[str, Any] = {
    "server_job_options": {"partition": "urgent", "time": "00:25:00", "mem": "1000M", "cpus-per-task": 1},
    "server_successor_options": {"partition": "work"},
    "server_handover_after": "00:01:00", "server_lease_ttl": 15, "server_wait_timeout": 900, "server_dump_minutes": 0,
}


@pytest.fixture
def start() -> Iterator[Callable[..., MiniCluster]]:
    """Start a cluster with alice's server on it."""
    with contextlib.ExitStack() as clusters:
        def up(*options: str, **settings: object) -> MiniCluster:
            cluster = clusters.enter_context(started(*options))
            played = cluster.playbooks.play("hpc_db", {**SETTINGS, **settings})
            assert played.returncode == 0, played.stdout
            return cluster

        yield up


def seconds_in_queue(cluster: MiniCluster) -> float:
    """Return how long a new job of a whole node would wait, as Slurm expects."""
    said = cluster.run("sbatch --test-only --partition=work --nodes=1 --time=10 --wrap=: 2>&1; date +%s")
    begins = re.findall(r"to start at (\S+) ", said)[0]
    return float(cluster.run("date -d $1 +%s", begins)) - float(said.split()[-1])


def overlap(cluster: MiniCluster) -> float:
    """Return the share of the jobs' time in which two of them ran."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    for line in (cluster.root / "log/events.jsonl").read_text().splitlines():
        event = json.loads(line)
        begun.setdefault(event["job"], event["time"])
        ended[event["job"]] = event["time"]
    jobs = sorted(begun, key=lambda job: begun[job])
    both = sum(max(ended[one] - begun[other], 0) for one, other in zip(jobs, jobs[1:]))
    return both / sum(ended[job] - begun[job] for job in jobs)


def test_hand_overs_on_a_busy_cluster(start: Callable[..., MiniCluster], soak: bool) -> None:
    """The successor has aged while its predecessor served, so nobody waits for the queue."""
    turns, minutes = (10, 30) if soak else (3, 12)
    options = {**SETTINGS["server_job_options"], "time": "01:00:00" if soak else "00:25:00"}
    cluster = start(f"--busy={minutes}", server_job_options=options)
    gaps = []
    with Watch(cluster) as watch, Workers(cluster, "login", Workers.CALM) as workers:
        watch.wait_for_acknowledgement(60)
        for _turn in range(turns):
            before, began = cluster.said("endpoint"), time.monotonic()
            assert seconds_in_queue(cluster) >= 600
            cluster.wait_for_another(before, 120 * minutes)
            watch.wait_for_acknowledgement(60)

            gaps.append(watch.gap(began))
            assert time.monotonic() - began > 30 * minutes  # the queue was real
            eventually(lambda: before["job"] not in cluster.jobs(), 30)  # noqa: B023
        assert watch.most() == 1
        workers.check()
    share = overlap(cluster)
    print(f"L12: {turns} hand-overs, {max(gaps):.1f} s without a result, two jobs for {share:.1%} of the time")
    assert max(gaps) <= 10
    assert share <= (0.02 if soak else 0.05)


def test_where_one_job_may_run_workers_wait_for_the_queue(start: Callable[..., MiniCluster]) -> None:
    """The job ends at its walltime; its successor could not start before."""
    options = {"partition": "work", "time": "00:08:00", "mem": "1000M", "account": "k80", "qos": "single"}
    cluster = start("--accounting", server_job_options=options, server_successor_options={}, server_stop_notice=60)
    with Watch(cluster) as watch, Workers(cluster, "login", Workers.CALM) as workers:
        watch.wait_for_acknowledgement(60)
        before = cluster.said("endpoint")
        limited = "QOSMaxJobsPerUserLimit"
        eventually(lambda: limited in ((cluster.said("state").get("follows") or {}).get("late", "")), 240, 1)

        status = cluster.playbooks.play("status")
        announced = rf"outage +from .* \(end of job {before['job']}\) until job \d+ starts, which cannot start earlier"
        assert re.search(rf"{announced} \({limited}\)", status.stdout), status.stdout

        cluster.wait_for_another(before, 700)
        watch.wait_for_acknowledgement(60)
        assert watch.most() == 1
        workers.check()
        assert any("queued as job" in line for line in workers.said())


def test_account_and_qos_are_judged_by_slurm(start: Callable[..., MiniCluster]) -> None:
    options = {"partition": "work", "time": "00:10:00", "mem": "1000M"}
    cluster = start("--accounting", server_job_options={**options, "account": "k80", "qos": "normal"})

    for wrong in ({"account": "nope"}, {"qos": "nope"}):
        played = cluster.playbooks.play("stop")
        assert played.returncode == 0, played.stdout
        played = cluster.playbooks.play("hpc_db", {**SETTINGS, "server_job_options": {**options, **wrong}})
        assert played.returncode != 0
        said = " ".join(played.stdout.split())
        assert re.search(r"server_job_options: sbatch says: .*[Ii]nvalid (account|qos)", said), played.stdout
        assert cluster.jobs() == {}
