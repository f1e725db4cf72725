# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""study_trials with studies in memory; tests/integration has Optuna's own."""

import contextlib
import datetime
import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.modules import study_trials

STARTED = datetime.datetime(2026, 11, 23, 4, 10)


class Distribution:
    def __init__(self, *choices):
        self.choices = choices

    def __str__(self):
        return f"<{', '.join(self.choices)}>"

    def to_internal_repr(self, value):
        return float(self.choices.index(value))


class FakeStorage:
    """Studies by name. Those in ``broken`` have a trial that Optuna cannot read, so it cannot read any of them."""

    def __init__(self, studies):
        self.studies, self.broken, self.lost = studies, {}, None
        self.engine = self

    def get_study_id_from_name(self, name):
        return list(self.studies).index(name)

    def get_all_trials(self, study_id, deepcopy):
        if study_id in self.broken:
            raise IndexError("tuple index out of range") from self.lost
        return list(self.studies.values())[study_id].trials

    def get_trial(self, trial_id):
        if trial_id == 1:
            raise IndexError("tuple index\nout of range")
        return list(self.studies.values())[0].trials[trial_id]

    connect = contextlib.contextmanager(lambda self: (yield self))

    def exec_driver_sql(self, query):
        assert query == "SELECT trial_id, number FROM trials WHERE study_id = 0 ORDER BY trial_id"
        return SimpleNamespace(fetchall=lambda: [(0, 0), (1, 1), (2, 2)])


class Lost(Exception):
    """An error of SQLAlchemy, from which Optuna raises its own."""

    def __init__(self, code, invalidated):
        super().__init__("(psycopg2.OperationalError) server closed")
        self.connection_invalidated = invalidated
        self.__cause__ = Driver("server closed\nthe connection")
        self.__cause__.pgcode = code


class Driver(Exception):
    pass


def trial(number, state="COMPLETE", **held):
    return SimpleNamespace(**{
        "number": number, "state": SimpleNamespace(name=state), "datetime_start": STARTED, "datetime_complete": None,
        "values": None, "params": {}, "distributions": {}, "intermediate_values": {}, "user_attrs": {},
        "system_attrs": {}, **held,
    })


@pytest.fixture
def optuna(monkeypatch):
    """A fake Optuna with two studies."""
    kind = Distribution("a", "b")
    trials = [
        trial(0, values=[float("inf")], params={"k": "b", "l": "a"}, distributions={"k": kind, "l": kind}),
        trial(1, "RUNNING", system_attrs={"constraints": (0.5, -1)}, intermediate_values={3: 0.5}),
        trial(2, "WAITING", datetime_start=None, constraints={"size": 2.0}),
    ]
    studies = {
        name: SimpleNamespace(
            study_name=name, directions=[SimpleNamespace(name="MINIMIZE")], user_attrs={"by": "alice"},
            trials=trials,
        )
        for name in ("al", "be")
    }
    storage = FakeStorage(studies)
    fake = SimpleNamespace(
        storages=SimpleNamespace(RDBStorage=lambda url: storage),
        load_study=lambda study_name, storage: studies[study_name],
    )
    monkeypatch.setitem(sys.modules, "optuna", fake)
    monkeypatch.setitem(sys.modules, "optuna.trial", SimpleNamespace(create_trial=create_trial))
    monkeypatch.setitem(
        sys.modules, "optuna.distributions",
        SimpleNamespace(distribution_to_json=lambda distribution: json.dumps(distribution.choices)),
    )
    return storage


def create_trial(params, **_held):
    """Reject an "a", as Optuna rejects values outside a distribution."""
    if "a" in params.values():
        raise ValueError("isn't contained")


@pytest.fixture
def server(monkeypatch, optuna):
    """Databases with the versions of their schemas, and their studies."""
    databases = {"alice": (None, []), "mala": ("new", ["al", "be"]), "newer": ("newest", ["x"])}

    def rows(database, query):
        schema, studies = databases[database]
        if query == _connection.DATABASES:
            return [(name,) for name in databases]
        if query == optuna_schema.HAS_SCHEMA:
            return [("version_info", "alembic_version") if schema else (None, None)]
        if query == optuna_schema.SCHEMA:
            return [("5.0.0", schema)]
        assert schema, "there is no such table"
        return [(name,) for name in studies]

    monkeypatch.setattr(_connection, "connect", lambda params, database: contextlib.nullcontext(database))
    monkeypatch.setattr(_connection, "rows", rows)
    monkeypatch.setattr(optuna_schema, "installed_optuna", lambda: optuna_schema.Optuna("5.0.0", ["new"]))
    return databases


PARAMS = {"host": "c1", "port": 5432, "user": "alice", "passfile": "/pgpass", "database": "alice"}


@pytest.mark.parametrize("check_mode", [False, True])
def test_file_is_written_only_if_something_has_changed(check_mode, server, tmp_path):
    params = {**PARAMS, "path": str(tmp_path / "trials.json.gz")}

    first = study_trials.ensure_exported(params, check_mode)
    again = study_trials.ensure_exported(params, check_mode)

    assert (first["changed"], again["changed"]) == (True, check_mode)
    assert (first["studies"], first["trials"]) == (2, 6)
    assert (tmp_path / "trials.json.gz").exists() is not check_mode


def test_what_a_newer_optuna_has_made_is_named(server):
    (problem,) = study_trials.read_all(PARAMS)["problems"]

    assert problem.startswith("database newer: Optuna's schema newest there")
    assert problem.endswith("; its studies are not shown: x")


def test_trials_as_json_has_them(server, tmp_path):
    params = {**PARAMS, "path": str(tmp_path / "trials.json.gz")}
    study_trials.ensure_exported(params, False)

    study = json.loads(gzip.decompress((tmp_path / "trials.json.gz").read_bytes()))["studies"][1]

    begun = STARTED.timestamp()
    common = {"complete": None, "values": None, "params": {}, "intermediate": [], "attributes": {}, "constraints": {}}
    assert study == {
        "database": "mala", "name": "be", "directions": ["minimize"], "metrics": None, "attributes": {"by": "alice"},
        "distributions": ['["a", "b"]'], "odd": [
            "trial 0 has l = a outside of <a, b>", "trial 0 is COMPLETE without an end time",
        ],
        "trials": [
            {**common, "number": 0, "state": "COMPLETE", "start": begun, "values": [float("inf")],
             "params": {"k": [0, 1.0], "l": [0, 0.0]}},
            {**common, "number": 1, "state": "RUNNING", "start": begun, "intermediate": [[3, 0.5]],
             "constraints": {"0": 0.5, "1": -1}},
            {**common, "number": 2, "state": "WAITING", "start": None, "constraints": {"size": 2.0}},
        ],
    }


def test_trial_that_cannot_be_read_costs_itself_only(server, optuna):
    optuna.broken = {0}

    held = study_trials.read_all(PARAMS)

    assert [study["name"] for study in held["studies"]] == ["al", "be"]
    assert [trial["number"] for trial in held["studies"][0]["trials"]] == [0, 2]
    assert held["studies"][0]["odd"][0] == "trial 1 cannot be read: IndexError: tuple index out of range"


def test_study_that_cannot_be_read_costs_itself_only(server, optuna):
    del optuna.studies["al"].user_attrs

    held = study_trials.read_all(PARAMS)

    assert [study["name"] for study in held["studies"]] == ["be"]
    assert held["problems"][0].startswith("study mala/al cannot be read and is not shown: AttributeError: ")


@pytest.mark.parametrize("lost", [Lost("57P01", True), Lost(None, False)])
def test_server_that_goes_away_is_no_odd_row(lost, server, optuna):
    optuna.broken, optuna.lost = {0}, lost

    with pytest.raises(_connection.Unreachable, match="^database mala: Driver: server closed the connection$"):
        study_trials.read_all(PARAMS)


@pytest.mark.parametrize("held, constraints", [
    ((0.5, float("nan"), "x", None), {"0": 0.5}), ({"size": 1, "shape": "round"}, {"size": 1}), (None, {}),
    ((10**400, -(10**400)), {"0": float("inf"), "1": float("-inf")}),
])
def test_constraints_that_are_no_numbers_are_left_out(held, constraints):
    assert study_trials.constraints_of(trial(0, system_attrs={"constraints": held})) == constraints


@pytest.mark.parametrize("year", [1, 2026, 9999])
def test_every_time_can_be_exported(year):
    assert isinstance(study_trials.seconds(datetime.datetime(year, 1, 1)), (float, type(None)))


def test_without_optuna_the_setting_is_named(server, monkeypatch):
    monkeypatch.setattr(optuna_schema, "installed_optuna", lambda: None)

    with pytest.raises(_connection.Unreachable, match="^postgres_python_packages: .* cannot import optuna"):
        study_trials.read_all(PARAMS)
