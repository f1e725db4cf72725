# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the workers' job script in real jobs; requeue the trials of dead workers while others continue."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import pytest
from mini_cluster import URL, MiniCluster, eventually, other_node

# Names are new in each run, since a cluster may stay up.
STUDY, ARRAY = (f"{name}_{time.time_ns()}" for name in ("held", "array"))
JOB = "/home/alice/hpc_db/hpc_db/workers/job.sh"
OPTIONS = {"partition": "work", "time": "00:10:00", "mem": "300M", "no-requeue": True, "comment": "it's a \"test\""}
PSQL = 'hpc_db/hpc_db/postgresql-17/bin/psql -XAt "service=hpc_db dbname=$2" -c "$1"'
NOTES = f"""
SELECT value_json FROM trial_system_attributes JOIN trials USING (trial_id) JOIN studies USING (study_id)
WHERE study_name = '{ARRAY}' AND state = 'COMPLETE' AND key = 'hpc_db:worker'
"""
# Lists the running trials that have all their parameters, with their jobs.
RUNNING = f"""
SELECT number, substring(value_json FROM 'hpc_db (\\d+)') FROM trials JOIN trial_params USING (trial_id)
JOIN studies USING (study_id) JOIN trial_system_attributes USING (trial_id)
WHERE study_name = '{STUDY}' AND state = 'RUNNING' AND param_name = 'layer_activation_00' AND key = 'hpc_db:worker'
"""
HANG_UP = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = 'second' AND application_name = '' AND backend_type = 'client backend'
"""
# A worker that is not tied to a job.
BY_HAND = f"""
HPC_DB_URL=postgresql+psycopg2:///second?service=hpc_db HPC_DB_STUDY={STUDY}
export HPC_DB_URL HPC_DB_STUDY
exec hpc_db/hpc_db/python/bin/python workers/held.py workers/late
"""
# Runs the waiting trials of a study without a job, then prints the study as Optuna reports it.
FINISH = """
import json, sys, optuna
study = optuna.load_study(storage=sys.argv[1], study_name=sys.argv[2])
names = "learning_rate", "ff_neurons_layer_00", "layer_activation_00"
def objective(trial):
    trial.suggest_float(names[0], 1e-7, 1e-2)
    trial.suggest_int(names[1], 10, 100)
    trial.suggest_categorical(names[2], ["ReLU", "Sigmoid", "LeakyReLU"])
    return trial.number
waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
if waiting:
    study.optimize(objective, n_trials=len(waiting))
marks = "failed_trial", "retry_history"
print(json.dumps([
    [trial.state.name for trial in study.trials],
    [sorted(trial.params.items()) for trial in study.trials],
    [[trial.system_attrs.get(mark) for mark in marks] for trial in study.trials],
]))
"""
Figure = Callable[[str, str], None]


@pytest.fixture
def no_workers_left(cluster: MiniCluster) -> Iterator[None]:
    yield
    cluster.run("scancel --name=hpc_db_workers")
    eventually(lambda: not cluster.jobs("hpc_db_workers"), 180, 0.5)


def running(cluster: MiniCluster, database: str) -> dict[int, str]:
    """Return the job of each running trial; empty for one that is not tied to a job."""
    lines = cluster.run(PSQL, RUNNING, database).splitlines()
    return {int(number): job for number, job in (line.split("|") for line in lines)}


def write_job(cluster: MiniCluster, **settings: object) -> None:
    """Write the job script; the playbook has Slurm check it."""
    played = cluster.playbooks.play("workers", {"workers_job_options": OPTIONS, **settings})
    assert played.returncode == 0, played.stdout
    assert re.search(rf"^\d+ workers: sbatch {JOB}$", played.stdout, re.MULTILINE)


def requeue(cluster: MiniCluster, *options: str) -> list[str]:
    """Run the playbook; return its lines about this run's trials. Workers without jobs count as alive."""
    played = cluster.playbooks.play("requeue", None, *options)
    assert played.returncode == 0, played.stdout
    said = re.findall(r"^(\w+/\w+: trial \d+ .*)", played.stdout, re.MULTILINE)
    others = [line for line in said if line.startswith("mala/beryllium")]
    alive = re.compile(r" is left alone: (a connection from|its worker sent a heartbeat) ")
    assert all(alive.search(line) for line in others), others
    return [line for line in said if STUDY in line]


def finish(cluster: MiniCluster, database: str) -> list[list]:
    """Run the waiting trials of the study; return states, parameters and marks of all its trials."""
    url = URL.replace("///", f"///{database}")
    python = 'hpc_db/hpc_db/python/bin/python -c "$1" "$2" "$3" 2>/dev/null'
    return json.loads(cluster.run(python, FINISH, url, STUDY))


def test_array_of_workers(cluster: MiniCluster) -> None:
    write_job(cluster, workers_number=2, workers_trials=10, workers_study=ARRAY)

    cluster.run('sbatch "$1"', JOB)
    eventually(lambda: not cluster.jobs("hpc_db_workers"), 300, 0.5)

    said = cluster.run("cat hpc_db/hpc_db/workers/log/*")
    names = cluster.run(PSQL, NOTES, "mala")
    jobs = {json.loads(line)["name"].split()[1] for line in names.splitlines()}
    assert len(names.splitlines()) >= 10, said
    assert len(jobs) in (1, 2) and all(re.fullmatch(r"\d+\.0", job) for job in jobs), said


@pytest.mark.usefixtures("no_workers_left")
def test_what_dead_workers_leave_is_requeued_once(cluster: MiniCluster, serving: dict, figure: Figure) -> None:
    node = other_node(serving)
    for name in ("go", "late"):
        (cluster.home / "workers" / name).unlink(missing_ok=True)
    write_job(
        cluster, workers_number=2, workers_python="~/hpc_db/hpc_db/python/bin/python",
        workers_program="~/workers/held.py", workers_study=STUDY,
    )
    alive = cluster.run('sbatch --parsable --nodelist="$1" --array=1 "$2"', serving["host"], JOB)
    cluster.run('sbatch --nodelist="$1" "$2"', node, JOB)
    untied = cluster.start("login", BY_HAND)
    eventually(lambda: len(running(cluster, "mala")) == 3 and running(cluster, "second") == {0: ""}, 300, 0.5)
    kept, = [number for number, job in running(cluster, "mala").items() if job == alive]
    doomed = sorted(set(range(3)) - {kept})
    cluster.verb("kill", node)
    cluster.run("scontrol update nodename=$1 state=down reason=killed", node, host="ctl", user="root")
    connected = f"SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^hpc_db .* {node} '"
    eventually(lambda: cluster.run(PSQL, connected, "mala") == "0", 180, 0.5)

    foreseen = requeue(cluster, "--check")
    # The worker is alive without any sign of it: as after a move of the server while it had no connection, and without
    # a job.
    cluster.run(PSQL, HANG_UP, "second")
    done = requeue(cluster)
    (cluster.home / "workers" / "go").touch()
    eventually(lambda: not cluster.jobs("hpc_db_workers"), 180, 0.5)
    again = requeue(cluster)
    (cluster.home / "workers" / "late").touch()
    refused = untied.communicate(timeout=180)[0]

    ended = r"job \d+ has ended and has no connection"
    for place, number in enumerate(doomed):
        assert re.fullmatch(f"mala/{STUDY}: trial {number} would be requeued: {ended}", foreseen[place])
        assert re.fullmatch(f"mala/{STUDY}: trial {number} is requeued as trial {3 + place}: {ended}", done[place])
    assert done[2:] == [
        f"mala/{STUDY}: trial {kept} is left alone: job {alive} has an open connection",
        f"second/{STUDY}: trial 0 is left alone: job {alive} (hpc_db_workers) may be its worker",
    ]
    assert foreseen[2] == done[2]
    assert re.fullmatch(f"second/{STUDY}: trial 0 is left alone: a connection from .* may be its worker's", foreseen[3])
    assert again == [
        f"second/{STUDY}: trial 0 is requeued as trial 1: "
        "no connection and no job from its start are left"
    ]
    assert untied.returncode == 1 and "ValueError: Cannot tell a FAIL trial." in refused

    states, params, marks = finish(cluster, "mala")
    assert [states[number] for number in (*doomed, kept, 3, 4)] == [*2 * ["FAIL"], *3 * ["COMPLETE"]]
    for new, number in zip((3, 4), doomed):
        assert (params[new], marks[new]) == (params[number], [number, [number]])
    states, params, _marks = finish(cluster, "second")
    assert (states, params[0]) == (["FAIL", "COMPLETE"], params[1])
    figure("Z1", "node killed: its 2 trials requeued once; those of the 9 workers that live left alone")
