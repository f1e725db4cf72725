# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna_study against a database and an Optuna that remember; the scenarios have the real ones."""

import contextlib
import copy
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules.optuna_study import Refused, ensure_studies, storage_url

PARAMS = {"host": "/tmp/hpc_db-x", "port": 5432, "user": "study", "passfile": "/home/a b/pgpass", "database": "mala"}
URL = "postgresql+psycopg2://study@/mala?host=%2Ftmp%2Fhpc_db-x&port=5432&passfile=%2Fhome%2Fa+b%2Fpgpass"
BERYLLIUM, ALUMINIUM = (
    {"name": "beryllium", "directions": ["minimize"]},
    {"name": "aluminium", "directions": ["minimize", "maximize"]},
)


class FakeDatabase:
    """Tables and rows as Optuna makes them. ``studies`` is None without its schema."""

    def __init__(self, studies, version=True):
        self.studies, self.version = studies, version

    def rows(self, _connection, query):
        if "to_regclass" in query:
            return [("version_info", "alembic_version")] if self.studies is not None else [(None, None)]
        if "alembic_version" in query:
            return [(1,)] if self.version else []
        return list(self.studies.items())

    def optuna(self):
        return SimpleNamespace(
            storages=SimpleNamespace(RDBStorage=self.make_schema), create_study=self.create_study
        )

    def make_schema(self, url):
        assert url == URL
        self.studies, self.version = {} if self.studies is None else self.studies, True
        return self

    def create_study(self, storage, study_name, directions):
        assert storage is self and study_name not in self.studies
        self.studies[study_name] = directions


@pytest.fixture
def use(monkeypatch):
    def use(database):
        monkeypatch.setattr(_connection, "connect", lambda params, name: contextlib.nullcontext())
        monkeypatch.setattr(_connection, "rows", database.rows)
        monkeypatch.setitem(sys.modules, "optuna", database.optuna())
        return database

    return use


@pytest.mark.parametrize("found, version, wanted, created, before, after", [
    (None, False, [], [], "no schema\n", ""),
    (None, False, [BERYLLIUM], ["beryllium"], "no schema\n", "beryllium: minimize\n"),
    ({}, False, [BERYLLIUM], ["beryllium"], "no schema\n", "beryllium: minimize\n"),
    ({}, True, [BERYLLIUM], ["beryllium"], "", "beryllium: minimize\n"),
    ({"beryllium": ["minimize"]}, True, [BERYLLIUM, ALUMINIUM], ["aluminium"], "beryllium: minimize\n",
     "aluminium: minimize, maximize\nberyllium: minimize\n"),
    ({"beryllium": ["minimize"]}, True, [BERYLLIUM], [], "beryllium: minimize\n", "beryllium: minimize\n"),
    ({"other": ["maximize"]}, True, [], [], "other: maximize\n", "other: maximize\n"),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_changes_only_what_differs(found, version, wanted, created, before, after, check_mode, use):
    database = use(FakeDatabase(copy.deepcopy(found), version))

    result = ensure_studies({**PARAMS, "studies": wanted}, check_mode)

    assert result == {"changed": before != after, "created": created, "diff": {"before": before, "after": after}}
    if check_mode:
        assert (database.studies, database.version) == (found, version)
    else:
        assert ensure_studies({**PARAMS, "studies": wanted}, check_mode)["changed"] is False


def test_optuna_is_imported_only_if_something_is_missing(use, monkeypatch):
    use(FakeDatabase({"beryllium": ["minimize"]}))
    monkeypatch.setitem(sys.modules, "optuna", None)  # an import would fail

    assert ensure_studies({**PARAMS, "studies": [BERYLLIUM]}, False)["changed"] is False


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_study_with_other_directions_is_refused_before_anything_is_made(directions, use):
    database = use(FakeDatabase({"beryllium": directions}))

    with pytest.raises(Refused, match="the study beryllium in mala has the directions .* choose another name"):
        ensure_studies({**PARAMS, "studies": [ALUMINIUM, BERYLLIUM]}, False)
    assert database.studies == {"beryllium": directions}


def test_url_takes_any_path():
    assert storage_url(PARAMS) == URL
