# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna_study against a database and an Optuna in memory; the scenarios have the real ones."""

import contextlib
import copy
import json
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _workers
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.modules.optuna_study import Refused, ensure_databases, ensure_studies

PARAMS = {"host": "/tmp/hpc_db-x", "port": 5432, "user": "study", "passfile": "/home/a b/pgpass", "database": "mala"}
URL = "postgresql+psycopg2://study@/mala?host=%2Ftmp%2Fhpc_db-x&port=5432&passfile=%2Fhome%2Fa+b%2Fpgpass"
BERYLLIUM, ALUMINIUM = (
    {"name": "beryllium", "directions": ["minimize"]},
    {"name": "aluminium", "directions": ["minimize", "maximize"]},
)


NEW, OLD = "v3.2.0.a", "v3.0.0.d"


class FakeDatabase:
    """Tables and rows as Optuna creates them. ``studies`` is None without its schema."""

    def __init__(self, studies, version=NEW, workers=0, notes=True, attributes=None):
        self.studies, self.version, self.workers = studies, version, workers
        self.notes, self.attributes = notes and version == NEW and studies is not None, attributes or {}
        self.library = {NEW: "5.0.0", OLD: "3.1.1"}.get(version, "9.0.0")

    def rows(self, _connection, query):
        if "pg_trigger" in query:
            return [(_workers.NOTE,)] if self.notes else []
        if "to_regclass" in query:
            return [("version_info", "alembic_version")] if self.studies is not None else [(None, None)]
        if "alembic_version" in query:
            return [(self.library, self.version)] if self.version else []
        if "pg_stat_activity" in query:
            return [(self.workers,)]
        if "lag(" in query:
            return [("beryllium", 7200.0, 0, 0)]
        if "user_attributes" in query:
            rows = ((name, held) for name, held in self.attributes.items())
            return [(name, key, json.dumps(value)) for name, held in rows for key, value in held.items()]
        if "NULL" in query:
            return [(name, None) for name in self.studies]
        assert self.version == NEW, "an older schema has no such tables"
        return list(self.studies.items())

    def optuna(self):
        return SimpleNamespace(
            storages=SimpleNamespace(RDBStorage=self.open_storage), create_study=self.create_study,
            load_study=self.load_study,
        )

    @contextlib.contextmanager
    def connect(self, _params, _name):
        yield self

    @contextlib.contextmanager
    def cursor(self):
        yield self

    def execute(self, statement):
        assert statement == _workers.TAKE_NOTES and self.version == NEW
        self.notes = True

    def open_storage(self, url, skip_compatibility_check):
        assert url.startswith(URL)
        if self.studies is None or not self.version:
            self.studies, self.version, self.library = self.studies or {}, NEW, "5.0.0"
        assert self.version == NEW or skip_compatibility_check
        return self

    @property
    def engine(self):
        return SimpleNamespace(dispose=lambda: None)

    def upgrade(self):
        self.version, self.library = NEW, "5.0.0"

    def create_study(self, storage, study_name, directions):
        assert storage is self and study_name not in self.studies
        self.studies[study_name] = directions

    def load_study(self, storage, study_name):
        assert storage is self and study_name in self.studies
        return SimpleNamespace(set_user_attr=self.attributes.setdefault(study_name, {}).__setitem__)


@pytest.fixture
def use(monkeypatch):
    def use(database):
        monkeypatch.setattr(_connection, "connect", database.connect)
        monkeypatch.setattr(_connection, "rows", database.rows)
        monkeypatch.setattr(optuna_schema, "installed_optuna", lambda: optuna_schema.Optuna("5.0.0", [NEW, OLD]))
        monkeypatch.setitem(sys.modules, "optuna", database.optuna())
        return database

    return use


SCHEMA = "schema of Optuna 5.0.0, trials with their workers\n"


@pytest.mark.parametrize("found, version, wanted, created, before, after", [
    (None, None, [], [], "no schema\n", SCHEMA),
    (None, None, [BERYLLIUM], ["beryllium"], "no schema\n", f"{SCHEMA}beryllium: minimize\n"),
    ({}, None, [BERYLLIUM], ["beryllium"], "no schema\n", f"{SCHEMA}beryllium: minimize\n"),
    ({}, NEW, [BERYLLIUM], ["beryllium"], SCHEMA, f"{SCHEMA}beryllium: minimize\n"),
    ({"beryllium": ["minimize"]}, NEW, [BERYLLIUM, ALUMINIUM], ["aluminium"], f"{SCHEMA}beryllium: minimize\n",
     f"{SCHEMA}aluminium: minimize, maximize\nberyllium: minimize\n"),
    ({"beryllium": ["minimize"]}, NEW, [BERYLLIUM], [], f"{SCHEMA}beryllium: minimize\n",
     f"{SCHEMA}beryllium: minimize\n"),
    ({"other": ["maximize"]}, NEW, [], [], f"{SCHEMA}other: maximize\n", f"{SCHEMA}other: maximize\n"),
    ({"beryllium": ["minimize"]}, OLD, [BERYLLIUM, ALUMINIUM], ["aluminium"],
     "schema of Optuna 3.1.1\nberyllium: ?\n", f"{SCHEMA}aluminium: minimize, maximize\nberyllium: ?\n"),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_changes_only_what_differs(found, version, wanted, created, before, after, check_mode, use):
    database = use(FakeDatabase(copy.deepcopy(found), version))
    params = {**PARAMS, "studies": wanted, "upgrade": True}

    result = ensure_studies(params, check_mode)

    told = {key: result[key] for key in ("changed", "created", "upgraded", "schema", "diff")}
    assert told == {
        "changed": before != after, "created": created, "upgraded": version == OLD, "schema": "5.0.0",
        "diff": {"before": before, "after": after},
    }
    if check_mode:
        assert (database.studies, database.version) == (found, version)
    else:
        assert ensure_studies(params, check_mode)["changed"] is False


@pytest.mark.parametrize("check_mode", [False, True])
def test_older_schema_is_left_alone_with_a_warning_unless_asked(check_mode, use):
    database = use(FakeDatabase({"beryllium": ["minimize"]}, OLD, workers=3))

    result = ensure_studies({**PARAMS, "studies": [BERYLLIUM], "upgrade": False}, check_mode)

    assert (result["changed"], result["upgraded"], result["schema"], database.version) == (False, False, "3.1.1", OLD)
    assert len(result["warnings"]) == 1 and "set databases_upgrade_schema to true" in result["warnings"][0]


@pytest.mark.parametrize("version, workers, upgrade, says", [
    (OLD, 2, True, "databases_upgrade_schema: 2 connections to the database mala are open; end its workers first"),
    (OLD, 0, False, "by Optuna 3.1.1, but the installed Optuna 5.0.0 needs .*; the study aluminium is missing"),
    ("v9.9.9.a", 0, True, "Optuna 9.0.0, which is newer than the installed Optuna 5.0.0: set optuna==9.0.0 in"),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_schema_that_does_not_fit_is_refused_before_anything_changes(version, workers, upgrade, says, check_mode, use):
    database = use(FakeDatabase({"beryllium": ["minimize"]}, version, workers))

    with pytest.raises(Refused, match=says):
        ensure_studies({**PARAMS, "studies": [BERYLLIUM, ALUMINIUM], "upgrade": upgrade}, check_mode)
    assert (database.studies, database.version) == ({"beryllium": ["minimize"]}, version)


@pytest.mark.parametrize("studies, attributes", [
    ({}, {}),
    ({"beryllium": ["minimize"]}, {}),
    ({"beryllium": ["minimize"]}, {"beryllium": {"snapshots": 3, "by": "a"}}),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_user_attributes_are_set_and_others_left(studies, attributes, check_mode, use):
    database = use(FakeDatabase(dict(studies), attributes=copy.deepcopy(attributes)))
    params = {**PARAMS, "studies": [{**BERYLLIUM, "user_attributes": {"snapshots": 4}}], "upgrade": False}

    result = ensure_studies(params, check_mode)

    assert (result["changed"], result["attributed"]) == (True, ["beryllium"])
    assert "  snapshots = 4\n" in result["diff"]["after"]
    if check_mode:
        assert database.attributes == attributes
    else:
        assert database.attributes["beryllium"] == {**attributes.get("beryllium", {}), "snapshots": 4}
        assert ensure_studies(params, check_mode)["changed"] is False


@pytest.mark.parametrize("check_mode", [False, True])
def test_trials_of_an_older_installation_are_noted_from_now_on(check_mode, use):
    database = use(FakeDatabase({"beryllium": ["minimize"]}, notes=False))
    params = {**PARAMS, "studies": [BERYLLIUM], "upgrade": False}

    result = ensure_studies(params, check_mode)

    assert (result["changed"], database.notes) == (True, not check_mode)
    assert result["diff"] == {
        "before": "schema of Optuna 5.0.0\nberyllium: minimize\n", "after": f"{SCHEMA}beryllium: minimize\n"
    }
    assert ensure_studies(params, check_mode)["changed"] is check_mode


def test_what_optuna_says_is_told_in_one_line(use, monkeypatch):
    def fail(self, **_given):
        raise RuntimeError("no longer\ncompatible")

    monkeypatch.setattr(FakeDatabase, "create_study", fail)
    use(FakeDatabase({}))

    with pytest.raises(Refused, match="^database mala: Optuna reports: no longer compatible$"):
        ensure_studies({**PARAMS, "studies": [BERYLLIUM], "upgrade": False}, False)


def test_missing_optuna_is_told_by_its_setting(use, monkeypatch):
    use(FakeDatabase({}))
    monkeypatch.setattr(optuna_schema, "installed_optuna", lambda: None)

    with pytest.raises(Refused, match="^postgres_python_packages: .* cannot import optuna: .*; name the package"):
        ensure_studies({**PARAMS, "studies": [], "upgrade": False}, False)


def test_optuna_is_imported_only_if_something_is_missing(use, monkeypatch):
    use(FakeDatabase({"beryllium": ["minimize"]}))
    monkeypatch.setitem(sys.modules, "optuna", None)  # an import would fail

    assert ensure_studies({**PARAMS, "studies": [BERYLLIUM], "upgrade": False}, False)["changed"] is False
    with pytest.raises(Refused, match="cannot import optuna"):
        ensure_studies({**PARAMS, "studies": [ALUMINIUM], "upgrade": False}, False)


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_study_with_other_directions_is_refused_before_anything_is_made(directions, use):
    database = use(FakeDatabase({"beryllium": directions}))

    with pytest.raises(Refused, match="the study beryllium in mala has the directions .* choose another name"):
        ensure_studies({**PARAMS, "studies": [ALUMINIUM, BERYLLIUM], "upgrade": False}, False)
    assert database.studies == {"beryllium": directions}


def test_url_takes_any_path():
    assert _connection.storage_url(PARAMS, "mala").startswith(URL)


@pytest.mark.parametrize("check_mode", [False, True])
def test_what_is_refused_in_one_database_is_made_in_the_others(check_mode, use, monkeypatch):
    first, second = FakeDatabase({"beryllium": ["maximize"]}), FakeDatabase({}, OLD)
    monkeypatch.setattr(FakeDatabase, "open_storage", lambda database, *_given, **_options: database)
    use(second)
    both = {"mala": first, "next": second}
    monkeypatch.setattr(_connection, "connect", lambda params, name: both[name].connect(params, name))
    monkeypatch.setattr(_connection, "rows", lambda database, query: database.rows(None, query))
    databases = [{"name": name, "studies": [BERYLLIUM]} for name in ("mala", "next")]
    params = {**PARAMS, "databases": databases, "upgrade": True}

    with pytest.raises(Refused, match="^databases_studies: the study beryllium in mala has .*; choose another name$"):
        ensure_databases(params, check_mode)
    assert second.studies == ({} if check_mode else {"beryllium": ["minimize"]})

    result = ensure_databases({**params, "databases": databases[1:]}, check_mode)
    (about,) = result["databases"]
    assert (about["name"], about["schema"]) == ("next", "5.0.0")
    assert (about["created"], about["upgraded"]) == ((["beryllium"], True) if check_mode else ([], False))
    assert [diff["after_header"] for diff in result["diff"]] == (["next"] if check_mode else [])
