# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Successors of a real Slurm that fail: the predecessor serves on and is followed by another one, and no worker ends.

Each test decides when the successor begins: till then, no node takes a new job.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest
from mini_cluster import MiniCluster, Watch, Workers, eventually, hosting, other_node

SETTINGS = {
    "server_job_options": {"partition": "work", "time": "01:00:00", "mem": "1000M", "cpus-per-task": 1},
    "server_handover_after": "00:02:00", "server_lease_ttl": 15, "server_dump_minutes": 0,
}
# Seconds from the start of a server until its successor may begin, and Slurm has noticed that.
ELIGIBLE = 180
# Seconds until a server looks for its successor again.
LOOK = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    with hosting(SETTINGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def watch(cluster: MiniCluster) -> Iterator[Watch]:
    with Watch(cluster) as watch:
        yield watch


@pytest.fixture(scope="module")
def workers(cluster: MiniCluster) -> Iterator[Workers]:
    with Workers(cluster, "login", Workers.CALM) as workers:
        yield workers


@pytest.fixture
def serving(cluster: MiniCluster, watch: Watch, workers: Workers) -> Iterator[dict]:
    """Return the endpoint of a server whose successor cannot begin; afterwards, a successor takes over."""
    eventually(cluster.is_serving, 60)
    gate(cluster, "drain")
    watch.wait_for_acknowledgement(60)
    watch.reset()
    before = cluster.said("endpoint")
    eventually(lambda: follower(cluster), LOOK, 1)
    yield before
    gate(cluster, "resume")
    if cluster.said("endpoint").get("since") == before["since"]:
        cluster.wait_for_another(before, ELIGIBLE + LOOK)
    watch.wait_for_acknowledgement(60)
    workers.check()
    assert watch.most() == 1


def gate(cluster: MiniCluster, state: str, *nodes: str) -> None:
    """Let Slurm start jobs on these nodes (resume), or not (drain); running jobs continue."""
    for node in nodes or ("c1", "c2"):
        if state == "resume" and "drain" not in cluster.node(node):
            continue
        cluster.run('scontrol update nodename=$1 state=$2 reason=test', node, state, host="ctl", user="root")


def follower(cluster: MiniCluster) -> str:
    """Return the id of the job that follows, as the server says."""
    return (cluster.said("state").get("follows") or {}).get("id", "")


def wait_until_eligible(cluster: MiniCluster, job: str) -> None:
    """Wait until Slurm would start a job if a node took it."""
    eventually(lambda: "Dependency" not in cluster.run("squeue --noheader --jobs=$1 --format=%r", job), ELIGIBLE, 1)


def test_that_is_cancelled(cluster: MiniCluster, serving: dict) -> None:
    first = follower(cluster)
    cluster.run("scancel $1", first)

    eventually(lambda: follower(cluster) not in ("", first), ELIGIBLE + LOOK, 1)
    assert cluster.jobs() == {serving["job"]: "RUNNING", follower(cluster): "PENDING"}
    assert cluster.said("endpoint") == serving


def test_that_starts_on_a_node_without_the_file_system(cluster: MiniCluster, serving: dict) -> None:
    """An empty folder is where the home directories should be."""
    node, job = other_node(serving), follower(cluster)
    wait_until_eligible(cluster, job)
    cluster.run("mount -t tmpfs none /home", host=node, user="root")
    try:
        gate(cluster, "resume", node)
        eventually(lambda: job not in cluster.jobs(), 60, 1)
        gate(cluster, "drain")
        eventually(lambda: follower(cluster) not in ("", job), LOOK, 1)
    finally:
        cluster.run("umount /home", host=node, user="root")
    assert cluster.said("endpoint") == serving
    assert cluster.said("state")["state"] == "serving"


def test_that_dies_while_it_asks(cluster: MiniCluster, serving: dict) -> None:
    job = follower(cluster)
    wait_until_eligible(cluster, job)
    gate(cluster, "resume", other_node(serving))
    eventually(lambda: cluster.said("request").get("job") == job, 60, 0.01)
    for process in cluster.host_programs():
        if process.host == other_node(serving):
            os.kill(process.pid, signal.SIGKILL)
    gate(cluster, "drain")

    eventually(lambda: job not in cluster.jobs(), 60, 1)
    eventually(lambda: follower(cluster) not in ("", job), LOOK, 1)
    assert cluster.said("endpoint") == serving


def test_two_of_them(cluster: MiniCluster, serving: dict, watch: Watch) -> None:
    """The second one was submitted by hand."""
    job = follower(cluster)
    script = cluster.settings()["successor"]["script"]
    second = cluster.run(
        "sbatch --parsable --job-name=hpc_db --partition=work --mem=1000M --time=60 --output=by_hand.log $1", script)
    wait_until_eligible(cluster, job)
    gate(cluster, "resume", other_node(serving))

    cluster.wait_for_another(serving, 60)
    winner = cluster.said("endpoint")["job"]
    assert winner in (job, second)
    (other,) = {job, second} - {winner}
    eventually(lambda: not {other, serving["job"]} & cluster.jobs().keys(), 60, 1)
    eventually(lambda: sorted(cluster.jobs().values()) == ["PENDING", "RUNNING"], LOOK, 1)
    assert cluster.said("endpoint")["job"] == winner
    assert watch.most() == 1


def test_that_does_not_start(cluster: MiniCluster, serving: dict, watch: Watch, workers: Workers) -> None:
    """At its walltime the server stops, and the workers wait for the successor, although nothing runs for a while."""
    job = follower(cluster)
    wait_until_eligible(cluster, job)
    assert cluster.said("endpoint") == serving
    # The job asks for notice two minutes before its end; Slurm checks that every 30 s.
    spent = cluster.run("squeue --noheader --jobs=$1 --format=%M", serving["job"]).split(":")
    cluster.run("scontrol update jobid=$1 timelimit=$2", serving["job"], str(int(spent[-2]) + 3))
    eventually(lambda: serving["job"] not in cluster.jobs(), 180, 1)
    said = cluster.said("state")
    assert (said["state"], said["reason"]) == ("ended", "stopped by SIGUSR1")
    assert (said["follows"]["id"], said["follows"]["state"]) == (job, "PENDING")
    time.sleep(20)
    assert not cluster.service() and cluster.postmasters() == []

    gate(cluster, "resume")
    cluster.wait_for_another(serving, 120)
    watch.wait_for_acknowledgement(60)
    assert cluster.said("endpoint")["job"] == job
    assert any(re.search(rf"queued as job {job} since \d\d:\d\d", line) for line in workers.said())
