# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""server_info: what is made of the rows; tests/integration asks a real server."""

import contextlib

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules import server_info


@pytest.fixture
def server(monkeypatch):
    """Answers for each database: its trials, or None without Optuna's schema."""
    server: dict[str, object] = {}

    def rows(database, query):
        if query == server_info.CONNECTIONS:
            return [(3, 320, "17.10")]
        if query == server_info.DATABASES:
            return [(name, 100 + index) for index, name in enumerate(server)]
        if "to_regclass" in query:
            return [(None if server[database] is None else "trials",)]
        return server[database]

    monkeypatch.setattr(_connection, "connect", lambda params, database: contextlib.nullcontext(database))
    monkeypatch.setattr(_connection, "rows", rows)
    return server


@pytest.mark.parametrize("databases, studies", [
    ({}, []),
    ({"alice": None}, []),
    ({"mala": []}, []),
    ({"mala": [("be", None, 0)]}, [("mala", "be", {})]),
    ({"mala": [("al", "running", 2), ("be", "complete", 5), ("be", "fail", 1)], "x": [("be", "waiting", 1)]},
     [("mala", "al", {"running": 2}), ("mala", "be", {"complete": 5, "fail": 1}), ("x", "be", {"waiting": 1})]),
])
def test_studies_of_every_database(databases, studies, server):
    server.update(databases)

    held = server_info.read_server({"database": "alice"})

    assert [tuple(study.values()) for study in held["studies"]] == studies
    assert [database["name"] for database in held["databases"]] == list(databases)
    assert (held["version"], held["connections"]) == ("17.10", {"used": 3, "max": 320})
