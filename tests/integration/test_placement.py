# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The server in the workers' jobs, with a real Slurm: it moves from job to job, and no trial is lost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from mini_cluster import COMPARE, PLUGIN_URL, URL, MiniCluster, Watch, Workers, eventually, hosting
from target import Target

TTL = 15
SETTINGS = {
    "server_placement": "workers", "server_lease_ttl": TTL, "server_stop_notice": 20, "server_dump_minutes": 0,
    "databases_workers": 20,
}
# MessageTimeout affects the time until Slurm gives up a node.
SLURM = ("--slurm=KillWait=10", "--slurm=MessageTimeout=3")
NAME = "train"
# A user's own job script with the one line, and two workers.
JOB = """#!/bin/bash
date +%s.%N > workers/begun.$SLURM_JOB_ID
. ~/hpc_db/hpc_db/workers/environment
for number in 1 2; do
    ~/hpc_db/hpc_db/python/bin/python workers/worker.py "$1" beryllium "$2" workers/log.$SLURM_JOB_ID.$number \\
        --seconds=$((5 + RANDOM % 6)) --random &
done
wait
"""


class Study:
    """Jobs of workers that follow one another."""

    def __init__(self, cluster: MiniCluster) -> None:
        self.cluster = cluster
        self.submitted = 0
        (cluster.home / "train.sh").write_text(JOB)

    def submit(self, minutes: int = 3, trials: int = 100000, *options: str) -> str:
        """Submit a job, which ends after so many trials or at its walltime, and is queued again if its node dies."""
        self.submitted += 1
        said = self.cluster.run(
            'name=$1 time=$2 url=$3 trials=$4; shift 4; '
            'sbatch --parsable -J $name --time=$time --mem=900M --output=workers/output.%j "$@" train.sh $url $trials',
            NAME, str(minutes), PLUGIN_URL, str(trials), *options,
        )
        return said.split()[-1]

    def fill(self, count: int = 6) -> None:
        """Keep this number of jobs in the queue."""
        while len(self.cluster.jobs(NAME)) < count:
            array = ["--array=1-2"] if self.submitted % 4 == 2 else []
            self.submit(2 + self.submitted % 2, (5, 8, 100000)[self.submitted % 3], *array)

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.cluster.root / "log/events.jsonl").read_text().splitlines()]

    def servers(self) -> list[str]:
        """Return the jobs that have served, in this order."""
        served = [each["job"] for each in self.events() if each["state"] == "serving"]
        return [job for before, job in zip(["", *served], served) if job != before]

    def outage(self, job: str, since: float) -> float:
        """Return the seconds from the stop of the server in a job, or from ``since``, to the next server."""
        events = [each for each in self.events() if each["time"] > since]
        stopped = [each["time"] for each in events if (each["job"], each["reason"]) == (job, "postgres is stopping")]
        serving = next(each["time"] for each in events if each["state"] == "serving" and each["job"] != job)
        return serving - min([*stopped, serving] if stopped else [since])

    def check(self) -> None:
        """Check that no trial is lost, and that no worker has ended with an error."""
        compared = self.cluster.run(COMPARE, URL)
        assert re.search(r" lost=0 doubled=0 ", compared), compared
        for path in self.cluster.home.glob("workers/output.*"):
            assert not re.search("Error|no server within", path.read_text()), path.read_text()


@pytest.fixture
def study() -> Iterator[Study]:
    with hosting(SETTINGS, "--nodes=3", *SLURM) as cluster:
        assert cluster.playbooks.play("workers", SETTINGS).returncode == 0
        with Workers(cluster, "login", ()):
            yield Study(cluster)


def test_server_moves_between_the_workers_jobs(study: Study) -> None:
    cluster = study.cluster
    assert not cluster.jobs()
    first = study.submit()
    eventually(cluster.is_serving, 60)
    begun = float((cluster.home / f"workers/begun.{first}").read_text())
    up = next(each["time"] for each in study.events() if each["state"] == "serving") - begun
    assert up <= 5

    outages: dict[str, list[float]] = {"planned": [], "cancelled": [], "killed": []}
    faults = [(4, "cancelled"), (7, "killed"), (11, "killed"), (15, "cancelled"), (19, "killed"), (25, "")]
    with Watch(cluster) as watch:
        study.fill()
        watch.wait_for_acknowledgement(60)
        began = time.monotonic()
        while faults:
            before, kind, since = cluster.said("endpoint"), "planned", time.time()
            if len(study.servers()) >= faults[0][0]:
                kind = faults.pop(0)[1] or kind
            if kind == "cancelled":
                cluster.run("scancel $1", before["job"])
            if kind == "killed":
                cluster.verb("kill", before["host"])

            def has_moved(before: dict = before) -> bool:
                study.fill()
                return cluster.is_serving() and cluster.said("endpoint").get("job") not in (None, before["job"])

            eventually(has_moved, 240, 1)
            outages[kind].append(study.outage(before["job"], since))
            watch.wait_for_acknowledgement(60)
            if kind == "killed":
                cluster.mend(before["host"])
            assert not cluster.jobs()  # only the workers' jobs
        assert watch.most() == 1
        gap = watch.gap(began)
    study.check()
    words = (f"{kind}: {len(each)} times, at most {max(each):.1f} s without a server" for kind, each in outages.items())
    print(f"first server after {up:.1f} s; {', '.join(words)}; at most {gap:.1f} s without a result")
    assert max(outages["planned"]) <= 5
    assert max(outages["cancelled"]) <= 5
    assert max(outages["killed"]) <= TTL + 15


# Three workers of a step, each of which reads the file.
STEP = """#!/bin/bash
srun --ntasks=3 --cpus-per-task=1 --mem=0 sh -c '. ~/hpc_db/hpc_db/workers/environment; exec sleep 600'
"""


def test_placement_changes_while_workers_run() -> None:
    """Each job has one candidate, however its workers start, as long as the server belongs to the workers."""
    in_job = {**SETTINGS, "server_placement": "job", "server_job_options": {"partition": "work", "mem": "900M"}}
    others = {"workers_number": 2, "workers_program": "~/idle.py", "workers_job_options": {"mem": "300M", "time": "10"}}

    with hosting(in_job, "--nodes=3", *SLURM) as cluster:
        def play(playbook: str, **settings: object) -> None:
            played = cluster.playbooks.play(playbook, {**in_job, **settings})
            assert played.returncode == 0, played.stdout

        def candidates() -> list[str]:
            return cluster.run("squeue --noheader --me --steps --format='%j %i' | sed -n 's/^hpc_db //p'").split()

        def serves(placement: str) -> bool:
            return cluster.is_serving() and cluster.said("endpoint").get("placement") == placement

        play("workers", **others)
        (cluster.home / "idle.py").write_text("import time\ntime.sleep(600)\n")
        (cluster.home / "step.sh").write_text(STEP)
        with Watch(cluster) as watch, Workers(cluster, "login", Workers.CALM) as workers:
            watch.wait_for_acknowledgement(60)
            eventually(lambda: len(cluster.jobs()) == 2, 30)
            since = time.monotonic()

            play("hpc_db", server_placement="workers")
            assert list(cluster.jobs().values()) == ["RUNNING"] and serves("job")
            step = cluster.run("sbatch --parsable --ntasks=3 --mem=300M step.sh")
            eventually(lambda: serves("workers"), 60)
            assert cluster.said("endpoint")["job"] == step
            eventually(lambda: not cluster.jobs(), 30)
            assert cluster.run("sbatch hpc_db/hpc_db/workers/job.sh")
            eventually(lambda: len(candidates()) == 3, 60)
            time.sleep(5)
            assert len({each.partition(".")[0] for each in candidates()}) == len(candidates()) == 3

            play("hpc_db")
            eventually(lambda: serves("job"), 60)
            eventually(lambda: not candidates(), 60)
            watch.wait_for_acknowledgement(60)
            print(f"changed twice: {watch.gap(since):.1f} s without a result")
            assert watch.most() == 1
            workers.check()


# A program of a user, with trials that take a while.
PROGRAM = """
import os, sys, time
import optuna

def objective(trial):
    time.sleep(0.5)
    return trial.suggest_float("x", -1, 1) ** 2

study = optuna.create_study(storage=os.environ["HPC_DB_URL"], study_name="beside", load_if_exists=True)
while not os.path.exists("enough"):
    study.optimize(objective, n_trials=1)
print("done", len(study.trials))
"""


def test_server_beside_job_scripts_on_one_machine(here: Target, quick_settings: dict) -> None:
    """From the first job script to the last one, with a move of the server to a job of its own and back."""
    name = here.variables["instance_name"]
    folder = f"hpc_db/{name}"
    settings = {
        **quick_settings, "server_placement": "workers", "server_lease_ttl": 6, "databases_workers": 4,
        "workers_program": "~/program.py", "client_environment": f"~/{folder}/python",
    }

    def play(playbook: str, *options: str, **changes: object) -> str:
        played = here.play(playbook, {**settings, **changes}, *options)
        assert played.returncode == 0, played.stdout
        return played.stdout

    def said(name: str) -> dict:
        return json.loads(here.run(f"cat {folder}/run/{name}.json"))

    def serves(placement: str) -> bool:
        return said("state").get("state") == "serving" and said("endpoint").get("placement") == placement

    assert f"{name}: no server runs; the first worker's job that reads " in play("hpc_db", client_environment="")
    play("hpc_db")
    again = play("hpc_db")
    assert "nothing changed since the last full run, the next worker's job starts the server" in again
    assert "none; the next worker's job starts the server" in play("status")
    play("workers", workers_number=2)
    here.run(f"cat > program.py <<'END'\n{PROGRAM}END")

    scripts = [here.start(f"exec sh {folder}/workers/job.sh") for _script in range(2)]
    try:
        eventually(lambda: serves("workers"), 60)
        first = said("endpoint")["job"]
        assert f"{first} RUNNING, a worker's" in play("status")
        here.run(f"kill -9 {first}")
        eventually(lambda: serves("workers") and said("endpoint").get("job") not in (None, first), 20)

        play("hpc_db", server_placement="job")
        eventually(lambda: serves("job"), 60)
        play("hpc_db")
        own = f". {folder}/workers/environment && {folder}/python/bin/python program.py"
        scripts.append(here.start(f"({own}) > own.log 2>&1"))
        eventually(lambda: serves("workers"), 60)

        play("stop")
        assert "none; no worker may start the server before the playbook hpc_db.yml allows it" in play("status")
        play("hpc_db")
        eventually(lambda: serves("workers"), 60)
    finally:
        here.run("touch enough")
        codes = [script.wait(60) for script in scripts]

    assert codes == [0, 0, 0]
    logs = here.run(f"cat {folder}/workers/log/* own.log")
    assert len(re.findall("^done", logs, re.MULTILINE)) == 5 and "Error" not in logs, logs
    eventually(lambda: said("state")["state"] == "ended", 20)
    assert said("endpoint") == {}
    play("backup")
    assert "none; the next worker's job starts the server" in play("status")
