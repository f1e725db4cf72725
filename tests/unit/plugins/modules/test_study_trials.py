# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""study_trials with studies that remember; tests/integration has Optuna's own."""

import contextlib
import datetime
import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna
from ansible_collections.mala.hpc_db.plugins.modules import study_trials

STARTED = datetime.datetime(2026, 11, 23, 4, 10)


class Distribution:
    def __init__(self, *choices):
        self.choices = choices

    def to_internal_repr(self, value):
        return float(self.choices.index(value))


def trial(number, state="COMPLETE", **held):
    return SimpleNamespace(**{
        "number": number, "state": SimpleNamespace(name=state), "datetime_start": STARTED, "datetime_complete": None,
        "values": None, "params": {}, "distributions": {}, "intermediate_values": {}, "user_attrs": {},
        "system_attrs": {}, **held,
    })


@pytest.fixture
def optuna(monkeypatch):
    """Optuna, with two studies."""
    kind = Distribution("a", "b")
    trials = [
        trial(0, values=[float("inf")], params={"k": "b", "l": "a"}, distributions={"k": kind, "l": kind}),
        trial(1, "RUNNING", system_attrs={"constraints": (0.5, -1)}, intermediate_values={3: 0.5}),
        trial(2, "WAITING", datetime_start=None, constraints={"size": 2.0}),
    ]
    studies = {
        name: SimpleNamespace(
            study_name=name, directions=[SimpleNamespace(name="MINIMIZE")], user_attrs={"by": "alice"},
            get_trials=lambda deepcopy: trials,
        )
        for name in ("al", "be")
    }
    fake = SimpleNamespace(
        storages=SimpleNamespace(RDBStorage=lambda url: url), load_study=lambda study_name, storage: studies[study_name]
    )
    monkeypatch.setitem(sys.modules, "optuna", fake)
    monkeypatch.setitem(
        sys.modules, "optuna.distributions",
        SimpleNamespace(distribution_to_json=lambda distribution: json.dumps(distribution.choices)),
    )
    return studies


@pytest.fixture
def server(monkeypatch, optuna):
    """Databases with the version of their schema, and their studies."""
    databases = {"alice": (None, []), "mala": ("new", ["al", "be"]), "newer": ("newest", ["x"])}

    def rows(database, query):
        schema, studies = databases[database]
        if query == study_trials.DATABASES:
            return [(name,) for name in databases]
        if query == _optuna.HAS_SCHEMA:
            return [("version_info", "alembic_version") if schema else (None, None)]
        if query == _optuna.SCHEMA:
            return [("5.0.0", schema)]
        assert schema, "there is no such table"
        return [(name,) for name in studies]

    monkeypatch.setattr(_connection, "connect", lambda params, database: contextlib.nullcontext(database))
    monkeypatch.setattr(_connection, "rows", rows)
    monkeypatch.setattr(_optuna, "installed_optuna", lambda: _optuna.Optuna("5.0.0", ["new"]))
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
        "distributions": ['["a", "b"]'],
        "trials": [
            {**common, "number": 0, "state": "COMPLETE", "start": begun, "values": [float("inf")],
             "params": {"k": [0, 1.0], "l": [0, 0.0]}},
            {**common, "number": 1, "state": "RUNNING", "start": begun, "intermediate": [[3, 0.5]],
             "constraints": {"0": 0.5, "1": -1}},
            {**common, "number": 2, "state": "WAITING", "start": None, "constraints": {"size": 2.0}},
        ],
    }


def test_without_optuna_the_setting_is_named(server, monkeypatch):
    monkeypatch.setattr(_optuna, "installed_optuna", lambda: None)

    with pytest.raises(_connection.Unreachable, match="^postgres_python_packages: .* cannot import optuna"):
        study_trials.read_all(PARAMS)
