# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""MALA itself searches for hyperparameters in two jobs, while the server moves to another node."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mini_cluster import CLUSTER, URL, MiniCluster, eventually
from target import ROOT

TRIALS = 300
SETTINGS = {
    "workers_kind": "mala", "workers_python": "/srv/mala/bin/python", "workers_url": f"{URL}&plugin=hpc_db",
    "workers_number": 2, "workers_trials": TRIALS, "workers_study": "search",
    "workers_job_options": {"partition": "work", "time": "00:30:00", "mem": "1500M", "export": "ALL,OMP_NUM_THREADS=1"},
}
STATES = """
SELECT state, count(*) FROM trials JOIN studies USING (study_id) WHERE study_name = 'search' GROUP BY state
"""


@pytest.fixture
def cluster() -> Iterator[MiniCluster]:
    """A test cluster with MALA on it, and a server."""
    state = f"/tmp/hpc-db-mala-{os.getpid()}"
    folders = {name: ROOT / ".cache" / name for name in ("wheels", "channel", "mala")}
    mounts = [f"--mount={folder}:/srv/{name}" for name, folder in folders.items()]
    subprocess.run([str(CLUSTER), "up", "--state", state, *mounts], check=True)
    try:
        yield MiniCluster(Path(state))
    finally:
        subprocess.run([str(CLUSTER), "down", "--state", state], check=True)


def play(cluster: MiniCluster, name: str, settings: dict) -> None:
    played = cluster.playbooks.play(name, settings)
    assert played.returncode == 0, played.stdout


def states(cluster: MiniCluster) -> dict[str, int]:
    """Return the number of trials of the search in each state; none before the study exists."""
    psql = 'hpc_db/hpc_db/postgresql-17/bin/psql -XAt service=hpc_db -c "$1"'
    return {state: int(count) for state, count in (line.split("|") for line in cluster.run(psql, STATES).splitlines())}


def test_search_goes_on_where_the_server_moves(cluster: MiniCluster) -> None:
    play(cluster, "hpc_db", {})
    play(cluster, "workers", SETTINGS)
    shutil.copy(ROOT / "tests" / "mala" / "snapshots.py", cluster.home)
    cluster.run("mkdir search && /srv/mala/bin/python snapshots.py search")
    cluster.run("cd search && sbatch ../hpc_db/hpc_db/workers/job.sh")

    eventually(lambda: states(cluster).get("COMPLETE", 0) >= TRIALS / 10, 300, 1)
    before = cluster.said("endpoint")
    cluster.run("scontrol update nodename=$1 state=drain reason=test", before["host"], host="ctl", user="root")
    cluster.run("scancel $1", before["job"])
    cluster.wait_for_another(before, 120)
    done = states(cluster)["COMPLETE"]
    eventually(lambda: not cluster.jobs("hpc_db_workers"), 900, 1)

    log = cluster.run("cat hpc_db/hpc_db/workers/log/*")
    assert cluster.said("endpoint")["host"] != before["host"]
    assert done < TRIALS, "the search was over before the server had moved"
    assert "Traceback" not in log, log
    assert set(states(cluster)) == {"COMPLETE"} and states(cluster)["COMPLETE"] >= TRIALS
