# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The same playbooks on a cluster with Grid Engine: server, workers, trials left by a kill, walltime, and removal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from target import CLUSTER, ROOT, Target

HOSTS = ("c1", "c2")
JOB = "hpc_db/hpc_db/workers/job.sh"
WORKER = "/srv/workers/held.py"
PSQL = "psql 'service=hpc_db dbname=mala' -XAtc "
RUNNING = PSQL + "\"SELECT count(*) FROM trials WHERE state = 'RUNNING'\""
CONNECTED = PSQL + "\"SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'hpc_db {job}.%'\""
STATES = PSQL + '"SELECT state FROM trials ORDER BY number"'


class GridEngine:
    """The cluster, with alice's server."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.root = state / "home/alice/hpc_db/hpc_db"
        self.target = Target(
            [ROOT / "molecule" / "default" / "inventory"], ["ssh", "-F", f"{state}/ssh_config", "login"],
            {"HPC_DB_CLUSTER": str(state)},
        )

    def play(self, name: str, settings: dict, *options: str) -> str:
        played = self.target.play(name, settings, *options)
        assert played.returncode == 0, played.stdout
        return played.stdout

    def jobs(self, name: str = "hpc_db") -> dict[str, str]:
        """Return the state of each job of this name."""
        listed = ElementTree.fromstring(self.target.run("qstat -u alice -g d -xml")).iter("job_list")
        told = [[job.findtext(key) for key in ("JB_name", "JB_job_number", "tasks", "state")] for job in listed]
        return {f"{job}.{task}" if task else job: state for each, job, task, state in told if each == name}

    def endpoint(self) -> dict:
        """Return the endpoint; empty while there is none."""
        path = self.root / "run" / "endpoint.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def wait_for_another(self, before: dict) -> dict:
        """Wait until another job runs the server, and has queued its successor."""
        wait(lambda: self.endpoint().get("job") not in (None, before["job"]))
        wait(lambda: len(self.jobs()) == 2)
        return self.endpoint()

    def log(self) -> str:
        return (self.root / "log" / "job.log").read_text()


def wait(condition: Callable[[], object], seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.3)


@pytest.fixture(scope="module")
def grid_engine() -> Iterator[GridEngine]:
    state = Path(f"/tmp/hpc-db-ge-{os.getpid()}")
    mounts = [f"--mount={ROOT / '.cache/wheels'}:/srv/wheels", f"--mount={ROOT / 'tests/workers'}:/srv/workers"]
    up = [str(CLUSTER), "up", "--state", str(state), "--scheduler=gridengine", "--nodes=2", *mounts]
    subprocess.run(up, check=True)
    yield GridEngine(state)
    subprocess.run([str(CLUSTER), "down", "--state", str(state)], check=True)


@pytest.fixture(scope="module")
def settings(bindir: Path) -> dict:
    return {
        "server_scheduler": "gridengine", "server_job_options": {"q": "all.q", "l": {"h_rt": "00:30:00"}},
        "instance_memory": "500M", "server_stop_notice": 60, "server_lease_ttl": 5, "databases_workers": 4,
        "postgres_provider": "system", "postgres_major": int(bindir.parts[-2]), "postgres_bindir": str(bindir),
        "databases_studies": [{"name": "mala", "studies": [{"name": "beryllium"}]}], "server_look_closely": False,
        "server_dump_minutes": 0, "workers_study": "beryllium", "workers_program": WORKER, "workers_number": 2,
        "workers_job_options": {"l": {"h_rt": "00:20:00", "mem_free": "100M"}, "ac": "note='it $HOME'"},
    }


def test_what_can_never_start_is_refused(grid_engine: GridEngine, settings: dict) -> None:
    too_long = {"server_job_options": {"q": "all.q", "l": {"h_rt": "05:00:00"}}}

    played = grid_engine.target.play("hpc_db", {**settings, **too_long})

    assert played.returncode != 0
    assert "server_job_options: qsub says: " in played.stdout and "no suitable queues" in played.stdout, played.stdout
    assert not grid_engine.root.exists()


def test_server_from_nothing(grid_engine: GridEngine, settings: dict) -> None:
    played = grid_engine.play("hpc_db", settings)
    asked = grid_engine.target.run("qstat -u alice -r -xml")
    again = grid_engine.play("hpc_db", settings)
    status = grid_engine.play("status", settings)
    doctor = grid_engine.play("doctor", settings)

    assert re.search(r"hpc_db: serving on c[12]:\d+", played)
    assert 'name="h_rt" resource_contribution="0.000000">1800<' in asked
    assert 'name="s_rt" resource_contribution="0.000000">1740<' in asked
    assert "nothing changed since the last full run" in again
    assert re.search(r"job +\d+ RUNNING\n +node +c[12]\n +time left +00:\d\d h of 00:30 h", status)
    assert re.search(r"compute node c[12]\n +ok +service", doctor)
    assert sorted(grid_engine.jobs().values()) == ["hqw", "r"]
    modes = grid_engine.target.run("find hpc_db/hpc_db/log -perm /077")
    assert modes == ""


def test_what_a_killed_worker_leaves_is_requeued(grid_engine: GridEngine, settings: dict) -> None:
    said = grid_engine.play("workers", settings)
    array = grid_engine.target.run(f"qsub -terse {JOB}").partition(".")[0]
    wait(lambda: grid_engine.target.run(RUNNING) == "2")

    grid_engine.target.run(f"qdel {array}.1")
    wait(lambda: list(grid_engine.jobs("hpc_db_workers")) == [f"{array}.2"])
    wait(lambda: grid_engine.target.run(CONNECTED.format(job=f"{array}.1")) == "0")
    done = grid_engine.play("requeue", settings)
    grid_engine.target.run(f"qdel {array}")
    wait(lambda: not grid_engine.jobs("hpc_db_workers"))

    assert f"2 workers: qsub /home/alice/{JOB}" in said
    assert re.search(rf"trial \d is requeued as trial 2: job {array}\.1 has ended and has no connection", done), done
    assert re.search(rf"trial \d is left alone: job {array}\.2 has an open connection", done), done
    assert sorted(grid_engine.target.run(STATES).split()) == ["FAIL", "RUNNING", "WAITING"]


def test_successor_goes_on_after_a_kill_and_before_the_walltime(grid_engine: GridEngine, settings: dict) -> None:
    first = grid_engine.endpoint()
    grid_engine.target.run(f"qdel {first['job']}")
    second = grid_engine.wait_for_another(first)
    (third,) = set(grid_engine.jobs()) - {second["job"]}

    # The walltime ends 20 s after the job has begun, by Grid Engine's clock.
    grid_engine.target.run(f"qalter -l h_rt=600,s_rt=20,mem_free=500M {third}")
    log = len(grid_engine.log())
    grid_engine.target.run(f"qdel {second['job']}")
    assert grid_engine.wait_for_another(second)["job"] == third
    last = grid_engine.wait_for_another({"job": third})

    said = grid_engine.log()[log:]
    assert "ended: stopped by SIGUSR1" in said
    assert "waiting: the data directory is held" not in said.partition("SIGUSR1")[2]  # the third job released it
    assert last["host"] in HOSTS
    assert sorted(grid_engine.target.run(STATES).split()) == ["FAIL", "RUNNING", "WAITING"]


def test_stop_leaves_no_job(grid_engine: GridEngine, settings: dict) -> None:
    grid_engine.play("stop", settings)

    assert grid_engine.jobs() == {}
    assert grid_engine.endpoint() == {}
    assert re.search(r"ended: stopped by .*/run/stop\.\d+\n", grid_engine.log())
    assert list(grid_engine.root.glob("run/stop.*")) == []
