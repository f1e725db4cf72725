# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers die, walltimes expire and jobs are cancelled; the workers' URL and their trials remain."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable

import pytest
from mini_cluster import MiniCluster, Watch, eventually

Figure = Callable[[str, str], None]

# Each way to end a job, and whether it leaves the job time to stop.
TAKEN = {
    "scancel": ("scancel $1", True),
    "kill -9 of the batch script": ("scancel --signal=KILL --batch $1", False),
    "requeue": ("scontrol update jobid=$1 requeue=1 && scontrol requeue $1", True),
    "preemption": ("sbatch --partition=urgent --exclusive --nodelist=$2 --output=/dev/null --wrap 'sleep 10'", True),
}


def test_postmaster_is_killed(cluster: MiniCluster, watch: Watch, figure: Figure, soak: bool) -> None:
    outages: list[float] = []
    for turn in range(20 if soak else 5):
        before = cluster.said("endpoint")
        if turn % 5 == 0 and turn:  # a job restarts PostgreSQL five times
            cluster.run("scancel $1", before["job"])
            cluster.wait_for_another(before, 60)
            before = cluster.said("endpoint")
        (postmaster,) = cluster.postmasters()
        killed = time.monotonic()
        os.kill(postmaster.pid, signal.SIGKILL)
        cluster.wait_for_another(before, 60)
        watch.wait_for_acknowledgement(60)
        outages.append(watch.gap(killed))
        assert cluster.said("endpoint")["job"] == before["job"]

    p95 = statistics.quantiles(outages, n=20, method="inclusive")[-1]
    figure("L1", f"killed {len(outages)} times: p95 {p95:.1f} s, longest {max(outages):.1f} s without a result")
    assert p95 <= 10


def test_walltime(cluster: MiniCluster, watch: Watch, figure: Figure, soak: bool) -> None:
    outages = []
    for _turn in range(5 if soak else 2):
        before, log = cluster.said("endpoint"), len(cluster.log())
        # The job asks for notice two minutes before its end; Slurm checks that every 30 s.
        elapsed = int(cluster.run("squeue --noheader --jobs=$1 --format=%M", before["job"]).split(":")[-2])
        began = time.monotonic()
        cluster.run("scontrol update jobid=$1 timelimit=$2", before["job"], str(elapsed + 3))
        cluster.wait_for_another(before, 150)
        watch.wait_for_acknowledgement(60)

        assert "ended: stopped by SIGUSR1" in cluster.log()[log:]
        assert cluster.said("endpoint")["job"] != before["job"]
        outages.append(watch.gap(began))
    figure("L3", f"{len(outages)} clean hand-overs of {len(outages)}, at most {max(outages):.1f} s without a result")
    assert max(outages) <= 30


@pytest.mark.parametrize("way", TAKEN)
def test_job_is_taken_away(
    way: str, cluster: MiniCluster, serving: dict, watch: Watch, figure: Figure
) -> None:
    command, clean = TAKEN[way]
    log = len(cluster.log())
    began = time.monotonic()
    cluster.run(command, serving["job"], serving["host"])
    back = cluster.wait_for_another(serving, 90)
    watch.wait_for_acknowledgement(60)

    figure("L4", f"{way}: back after {back:.1f} s, {watch.gap(began):.1f} s without a result, "
                 f"service entry stale for {watch.stale:.1f} s")
    assert ("ended: stopped by SIGTERM" in cluster.log()[log:]) is clean
    assert watch.stale <= (0.5 if clean else cluster.settings()["lease_ttl"] + 5)


def test_stop(cluster: MiniCluster, watch: Watch, figure: Figure) -> None:
    played = cluster.playbooks.play("stop")

    assert played.returncode == 0, played.stdout
    assert cluster.jobs() == {}
    assert not cluster.service() and not cluster.said("endpoint")
    assert (cluster.said("state")["state"], cluster.postmasters()) == ("ended", [])
    time.sleep(5)
    assert cluster.jobs() == {}
    figure("L4", f"stop.yml: no job left, service entry stale for {watch.stale:.1f} s")
    assert watch.stale <= 0.5
    eventually(lambda: not cluster.host_programs(), 5)
