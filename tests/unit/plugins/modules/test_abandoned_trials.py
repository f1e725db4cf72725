# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""abandoned_trials: the order of its queries, and its report; tests/resilience has real workers and rows."""

import contextlib
import json
import os

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.module_utils.host.lease import Lease
from ansible_collections.mala.hpc_db.plugins.modules import abandoned_trials
from ansible_collections.mala.hpc_db.plugins.modules.abandoned_trials import Refused, ensure_requeued

PARAMS = {
    "host": "/tmp/hpc_db-x", "port": 5432, "user": "alice", "passfile": "pgpass", "database": "alice",
    "name": "hpc_db", "root": "/home/alice/hpc_db/hpc_db", "bin_dir": None, "scheduler": "slurm", "cluster": "mini",
    "studies": [], "other_jobs": ["notebook"], "clock_tolerance": 300,
}


class FakeCluster:
    """Two study databases, and a queue; ``looks`` records the queries."""

    def __init__(self, names, jobs=(), connections=(), revision="v3.2.0.a", others=()):
        self.names, self.connections, self.revision, self.others = names, connections, revision, others
        self.listed = ["1|0|RUNNING|900||hpc_db", *jobs]
        self.looks, self.running = [], set(range(len(names)))

    def rows(self, database, query, _values=()):
        if query == _connection.DATABASES:
            return [("alice",), ("mala",), *((name,) for name in self.others)]
        if query == optuna_schema.HAS_SCHEMA:
            return [(None, None) if database == "alice" else ("version_info", "alembic_version")]
        if query == optuna_schema.SCHEMA:
            return [("5.0.0", "v3.0.0.d" if database in self.others else self.revision)]
        if query == abandoned_trials.STUDIES:
            return [("beryllium",), ("aluminium",)]
        if query == abandoned_trials.TRIALS:
            self.looks.append("trials")
            notes = [json.dumps({"name": name, "since": 1000.0}) for name in self.names]
            return [
                ("beryllium", number, number, "then", 1000.0, note, None)
                for number, note in enumerate(notes) if number in self.running
            ]
        self.looks.append("connections")
        return [*self.connections, ("alice", "mala.hpc_db", "", 0.0)]

    def run(self, command):
        self.looks.append(command[0])
        assert command[0] in ("squeue", "scontrol")
        return "c1\n" if command[0] == "scontrol" else "".join(f"{line}|\n" for line in ["JOBID", *self.listed])

    def requeue(self, _params, trial):
        if trial.number not in self.running:
            return None
        self.running.remove(trial.number)
        return 100 + trial.number


@pytest.fixture
def use(monkeypatch):
    def use(cluster):
        monkeypatch.setattr(_connection, "connect", lambda params, database: contextlib.nullcontext(database))
        monkeypatch.setattr(_connection, "rows", cluster.rows)
        monkeypatch.setattr(abandoned_trials, "requeue", cluster.requeue)
        return cluster

    return use


TIED = ["hpc_db 12.0 mini c1 5", "hpc_db 13.0 mini c1 6"]


@pytest.mark.parametrize("check_mode", [False, True])
def test_what_is_gone_is_requeued_once_and_the_rest_left(check_mode, use):
    cluster = use(FakeCluster(TIED, ["13|0|RUNNING|900||train"]))

    first = ensure_requeued(PARAMS, cluster.run, check_mode)
    second = ensure_requeued(PARAMS, cluster.run, check_mode)

    told = {"study": "mala/beryllium", "number": 0, "why": "job 12 has ended and has no connection"}
    assert first["requeued"] == [{**told, "new_number": None if check_mode else 100}]
    assert [(trial["number"], trial["unknown"]) for trial in first["left"]] == [(1, False)]
    assert first["diff"]["before"] == "mala/beryllium 0: RUNNING\n"
    assert (first["changed"], second["changed"]) == (True, check_mode)


def test_jobs_are_looked_at_after_connections_and_these_after_trials(use):
    cluster = use(FakeCluster(TIED, ["13|0|RUNNING|900|c1|train"]))

    ensure_requeued(PARAMS, cluster.run, True)

    assert cluster.looks == ["trials", "connections", "squeue", "scontrol"]


def test_listing_without_the_hosting_job_says_nothing_of_workers(use):
    cluster = use(FakeCluster(TIED))
    cluster.listed = []

    with pytest.raises(Refused, match="does not list hpc_db, the job that hosts the server"):
        ensure_requeued(PARAMS, cluster.run, False)

    assert cluster.running == {0, 1}


@pytest.mark.parametrize("listed", [False, True])
def test_server_in_a_worker_s_job_is_listed_under_that_job(listed, use, tmp_path):
    (tmp_path / "run").mkdir()
    holder = {"host": "c1", "pid": os.getpid(), "job": "13", "kind": "slurm", "placement": "workers"}
    assert Lease(str(tmp_path / "run"), holder, lambda _holder: False).try_acquire()
    cluster = use(FakeCluster(TIED))
    cluster.listed = ["13|0|RUNNING|900|c1|train"] if listed else ["1|0|RUNNING|900||hpc_db"]
    params = {**PARAMS, "root": str(tmp_path)}

    if listed:
        assert [each["number"] for each in ensure_requeued(params, cluster.run, False)["requeued"]] == [0]
    else:
        with pytest.raises(Refused, match="does not list 13, the job that hosts the server"):
            ensure_requeued(params, cluster.run, False)


def test_trial_that_ends_meanwhile_is_left(use, monkeypatch):
    cluster = use(FakeCluster(TIED[:1]))
    monkeypatch.setattr(abandoned_trials, "requeue", lambda params, trial: None)

    result = ensure_requeued(PARAMS, cluster.run, False)

    assert (result["changed"], result["requeued"]) == (False, [])
    assert [trial["why"] for trial in result["left"]] == ["it has ended in the meantime"]


@pytest.mark.parametrize("sqlstate", ["55P03", None])
def test_study_that_is_locked_keeps_no_other_from_the_queue(sqlstate, use, monkeypatch):
    cluster = use(FakeCluster([*TIED, TIED[0]]))
    asked = []

    def requeue(params, trial):
        asked.append(trial.number)
        raise _connection.Unreachable("database mala: canceling statement due to lock timeout", sqlstate)

    monkeypatch.setattr(abandoned_trials, "requeue", requeue)
    if sqlstate is None:  # the connection itself failed
        with pytest.raises(_connection.Unreachable):
            ensure_requeued(PARAMS, cluster.run, False)
        return

    result = ensure_requeued(PARAMS, cluster.run, False)

    assert asked == [0]
    why = "it could not be requeued: database mala: canceling statement due to lock timeout"
    assert [(trial["number"], trial["why"]) for trial in result["left"]] == [(number, why) for number in range(3)]


def test_database_of_another_optuna_keeps_no_other_from_the_queue(use):
    cluster = use(FakeCluster(TIED, others=["older"]))

    result = ensure_requeued(PARAMS, cluster.run, False)

    assert [trial["number"] for trial in result["requeued"]] == [0, 1]
    (warning,) = result["warnings"]
    assert warning.startswith("database older: Optuna's schema v3.0.0.d there was made by Optuna 5.0.0, but ")
    with pytest.raises(Refused, match="^database older: "):
        ensure_requeued({**PARAMS, "studies": ["older/beryllium"]}, cluster.run, False)


@pytest.mark.parametrize("held, listed", [
    (None, []), ("[0, 3]", [0, 3]), ("{}", []), ("[0, \"x\"", []), ('[1, "\\u0000"]', [1]),
])
def test_history_that_optuna_has_not_written_keeps_no_trial_from_the_queue(held, listed):
    assert abandoned_trials.numbers(held) == listed


@pytest.mark.parametrize("name, left", [("hpc_db", 0), ("notebook", 0), ("train", 1)])
def test_jobs_without_workers_do_not_count(name, left, use):
    cluster = use(FakeCluster([""], [f"13|0|RUNNING|900||{name}"]))

    assert len(ensure_requeued(PARAMS, cluster.run, True)["left"]) == left


@pytest.mark.parametrize("connection, left", [
    (("mala", "psql", "10.0.0.1", 0.0), 0), (("mala", "hpc_db", "", 0.0), 0), (("mala", "python", "10.0.0.1", 0.0), 1),
])
def test_tools_are_no_workers(connection, left, use):
    cluster = use(FakeCluster([""], connections=[connection]))

    assert len(ensure_requeued(PARAMS, cluster.run, True)["left"]) == left


@pytest.mark.parametrize("studies, trials", [([], 2), (["mala/beryllium"], 2), (["mala/aluminium"], 0)])
def test_only_the_studies_that_are_named(studies, trials, use):
    cluster = use(FakeCluster(TIED))

    assert len(ensure_requeued({**PARAMS, "studies": studies}, cluster.run, False)["requeued"]) == trials


@pytest.mark.parametrize("settings, revision, says", [
    ({"studies": ["mala/lead"]}, "v3.2.0.a",
     "requeue_studies: mala/lead is not allowed; existing studies: mala/aluminium, mala/beryllium"),
    ({}, "v3.0.0.d", "database mala: Optuna's schema v3.0.0.d there was made by Optuna 5.0.0, but trials can be"),
])
def test_refused_before_anything_changes(settings, revision, says, use):
    cluster = use(FakeCluster(TIED, revision=revision))

    with pytest.raises(Refused, match=says):
        ensure_requeued({**PARAMS, **settings}, cluster.run, False)
    assert cluster.running == {0, 1}
