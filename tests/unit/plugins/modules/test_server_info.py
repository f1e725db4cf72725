# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""server_info: the report made from rows; tests/integration queries a real server."""

import contextlib
import threading

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.modules import server_info


@pytest.fixture
def server(monkeypatch):
    """Answers for each database: its trials, None without tables, or the name of another program's."""
    server: dict[str, object] = {}

    def rows(database, query):
        if query == server_info.SETTINGS:
            return [(320, "17.10")]
        if query == server_info.SESSIONS:
            return [(4711, "", "alice", "mala", "idle", 0.1, 0.2)]
        if query == server_info.SIZES:
            return [(name, 100 + index) for index, name in enumerate(server)]
        if query == optuna_schema.HAS_SCHEMA:
            return [("version_info", "alembic_version") if isinstance(server[database], list) else (None, None)]
        assert isinstance(server[database], list), "column study_id does not exist"
        if server[database] == ["odd"]:
            raise _connection.Unreachable(f'database {database}: relation "studies" does not exist', "42P01")
        return server[database]

    monkeypatch.setattr(_connection, "connect", lambda params, database: contextlib.nullcontext(database))
    monkeypatch.setattr(_connection, "rows", rows)
    return server


@pytest.mark.parametrize("databases, studies", [
    ({}, []),
    ({"alice": None}, []),
    ({"other": "trials of another program", "mala": [("be", None, 0)]}, [("mala", "be", {})]),
    ({"mala": []}, []),
    ({"mala": [("be", None, 0)]}, [("mala", "be", {})]),
    ({"mala": [("al", "running", 2), ("be", "complete", 5), ("be", "fail", 1)], "x": [("be", "waiting", 1)]},
     [("mala", "al", {"running": 2}), ("mala", "be", {"complete": 5, "fail": 1}), ("x", "be", {"waiting": 1})]),
])
def test_studies_of_every_database(databases, studies, server):
    server.update(databases)

    held = server_info.read_server({"database": "alice", "idle_nodes": []})

    assert [tuple(study.values()) for study in held["studies"]] == studies
    assert [database["name"] for database in held["databases"]] == list(databases)
    assert held["version"] == "17.10"
    assert held["connections"] == {
        "used": 1, "max": 320, "clients": [{"host": "socket", "user": "alice", "count": 1}],
        "idle_in_transaction": [], "orphaned": [],
    }


def test_odd_database_hides_no_other(server):
    server.update({"alice": None, "mala": [("be", None, 0)], "odd": ["odd"], "zinc": [("zn", "running", 1)]})

    held = server_info.read_if_reached({"database": "alice", "idle_nodes": []})

    assert [study["name"] for study in held["studies"]] == ["be", "zn"]
    assert held["unreadable"] == ['database odd: relation "studies" does not exist']
    assert held["no_answer"] == ""


def test_connections_by_client(monkeypatch):
    hosts = {"10.0.0.1": "c1.cluster", "10.0.0.2": "c2"}

    def gethostbyaddr(address):
        if address not in hosts:
            raise OSError("unknown host")
        return hosts[address], [], [address]

    monkeypatch.setattr(server_info.socket, "gethostbyaddr", gethostbyaddr)
    sessions = [
        # PID, address, user, database, state, seconds of silence, seconds since it was opened
        (1, "10.0.0.1", "study", "mala", "idle", 50.0, 300.0),
        (2, "10.0.0.1", "study", "mala", "idle in transaction", 40.0, 300.0),
        (3, "10.0.0.1", "study", "mala", "idle in transaction", 0.2, 2.0),
        (4, "10.0.0.2", "study", "mala", "idle in transaction (aborted)", 70.5, 300.0),
        (5, "10.0.0.2", "study", "mala", "active", 0.0, 10.0),
        (6, "10.0.0.9", "study", "mala", "idle", 600.0, 600.0),
        (7, "", "alice", "alice", "idle", 600.0, 600.0),
    ]

    found = server_info.by_client(sessions, ["c1", "c3", "socket.x"])

    assert [tuple(client.values()) for client in found["clients"]] == [
        ("c1", "study", 3), ("c2", "study", 2), ("10.0.0.9", "study", 1), ("socket", "alice", 1),
    ]
    assert [(each["pid"], each["host"], each["seconds"]) for each in found["idle_in_transaction"]] == [
        (2, "c1", 40), (4, "c2", 70),
    ]
    # The connection opened 2 s ago may belong to a job that has started since the scheduler was queried.
    assert found["orphaned"] == [{"host": "c1", "user": "study", "count": 2, "seconds": 40}]


def test_name_server_that_does_not_answer_keeps_nobody(monkeypatch):
    answer = threading.Event()

    def gethostbyaddr(address):
        answer.wait(60)
        raise OSError("timed out")

    monkeypatch.setattr(server_info.socket, "gethostbyaddr", gethostbyaddr)
    monkeypatch.setattr(server_info, "LOOKUP_SECONDS", 0.1)

    assert server_info.names_of({"10.0.0.1", "10.0.0.2"}) == {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.2"}
    answer.set()


def test_server_that_does_not_answer_is_said(monkeypatch):
    """The server's node is dead without the scheduler's knowledge: not a reason to fail."""

    def connect(_params, _database):
        raise _connection.Unreachable("database alice: timeout expired")

    monkeypatch.setattr(_connection, "connect", connect)

    assert server_info.read_if_reached({"database": "alice"}) == {"no_answer": "database alice: timeout expired"}


def test_server_that_answers_is_reached(server):
    assert server_info.read_if_reached({"database": "alice", "idle_nodes": []})["no_answer"] == ""
