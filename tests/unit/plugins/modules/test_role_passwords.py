# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""role_passwords against a server that keeps verifiers; tests/integration has the real one."""

import base64
import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules.role_passwords import (
    ensure_passwords,
    matches,
    read_passwords,
    scram_verifier,
    write_passwords,
)

# RFC 7677's example, as PostgreSQL stores it.
VERIFIER = (
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
    "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
)
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")


def test_verifier_is_the_one_that_postgres_makes():
    assert scram_verifier("pencil", SALT, 4096) == VERIFIER


@pytest.mark.parametrize("password, verifier, expected", [
    ("pencil", VERIFIER, True),
    ("pencil", scram_verifier("pencil", b"another salt", 10000), True),
    ("Pencil", VERIFIER, False),
    ("pencil", VERIFIER[:-2], False),
    ("pencil", "md5" + "0" * 32, False),
    ("pencil", "", False),
    ("pencil", None, False),
])
def test_matches(password, verifier, expected):
    assert matches(password, verifier) is expected


class FakeServer:
    """Keeps a verifier for each role, and all statements that it has received."""

    def __init__(self, *roles):
        self.verifiers = dict.fromkeys(roles)
        self.sent = []

    @contextlib.contextmanager
    def connect(self, params, database):
        yield self

    def cursor(self):
        return contextlib.nullcontext(self)

    def execute(self, statement):
        self.sent.append(statement)
        each = re.compile(r"""ALTER ROLE "(.+)" PASSWORD '(\S+)'""")
        given = dict(each.fullmatch(one).groups() for one in statement.split("; "))
        assert given.keys() <= self.verifiers.keys()
        self.verifiers.update(given)


@pytest.fixture
def server(monkeypatch):
    server = FakeServer("alice", "study")
    sql = SimpleNamespace(SQL=str, Identifier='"{}"'.format, Literal="'{}'".format)
    monkeypatch.setitem(sys.modules, "psycopg2", SimpleNamespace(sql=sql))
    monkeypatch.setattr(_connection, "connect", server.connect)
    monkeypatch.setattr(_connection, "rows", lambda connection, query: list(server.verifiers.items()))
    return server


@pytest.fixture
def params(tmp_path):
    return {"passfile": str(tmp_path / "pgpass"), "database": "postgres", "roles": ["alice", "study"], "rotate": False}


def test_first_run_makes_different_passwords_and_the_second_nothing(server, params, tmp_path):
    passfile = params["passfile"]
    assert ensure_passwords(params, False) == {
        "changed": True, "changed_roles": ["alice", "study"], "passfile": passfile,
    }

    passwords = read_passwords(params["passfile"])
    assert sorted(passwords) == ["alice", "study"]
    assert all(matches(passwords[role], server.verifiers[role]) for role in passwords)
    assert len(set(passwords.values())) == 2
    assert all(len(password) >= 43 for password in passwords.values())
    assert (tmp_path / "pgpass").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["pgpass"]

    sent = list(server.sent)
    assert ensure_passwords(params, False) == {"changed": False, "changed_roles": [], "passfile": passfile}
    assert server.sent == sent


def test_no_password_is_sent(server, params):
    ensure_passwords(params, False)

    assert not any(password in "".join(server.sent) for password in read_passwords(params["passfile"]).values())


@pytest.mark.parametrize("file, stored, changed_roles", [
    ({}, None, ["study"]),
    ({}, "pencil", ["study"]),
    ({"study": "pencil"}, None, ["study"]),
    ({"study": "pencil"}, "paper", ["study"]),
    ({"study": "pencil"}, "pencil", []),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_changes_only_what_differs(file, stored, changed_roles, check_mode, server, params):
    write_passwords(params["passfile"], file)
    server.verifiers["study"] = stored and scram_verifier(stored, SALT, 4096)
    before = dict(server.verifiers)

    result = ensure_passwords({**params, "roles": ["study"]}, check_mode)

    after = read_passwords(params["passfile"])
    assert (result["changed"], result["changed_roles"]) == (bool(changed_roles), changed_roles)
    if check_mode:
        assert (server.verifiers, after) == (before, file)
    else:
        assert {**after, **file} == after
        assert matches(after["study"], server.verifiers["study"])


@pytest.mark.parametrize("role, line", [("study", "*:*:*:study:"), ("a:b\\c", "*:*:*:a\\:b\\\\c:")])
def test_password_file_is_libpq_s(role, line, server, params, tmp_path):
    server.verifiers = {role: None}
    ensure_passwords({**params, "roles": [role]}, False)

    text = (tmp_path / "pgpass").read_text()
    assert text.startswith(line) and text.count("\n") == 1
    with contextlib.suppress(ValueError):
        ensure_passwords({**params, "roles": [role]}, False)
    assert (tmp_path / "pgpass").read_text() == text


def test_nothing_is_written_for_a_server_that_cannot_be_reached(server, params, monkeypatch, tmp_path):
    def refuse(_params, _database):
        raise _connection.Unreachable("gone")

    monkeypatch.setattr(_connection, "connect", refuse)
    with pytest.raises(_connection.Unreachable):
        ensure_passwords(params, False)

    assert list(tmp_path.iterdir()) == []


def test_rotation_gives_file_and_server_the_same_new_passwords(server, params):
    ensure_passwords(params, False)
    old = read_passwords(params["passfile"])

    assert ensure_passwords({**params, "rotate": True}, False)["changed_roles"] == ["alice", "study"]

    new = read_passwords(params["passfile"])
    assert all(new[role] != old[role] and matches(new[role], server.verifiers[role]) for role in old)


def test_rotation_that_fails_between_two_roles_leaves_passwords_that_work(server, params):
    ensure_passwords(params, False)
    del server.verifiers["study"]

    with pytest.raises(AssertionError):
        ensure_passwords({**params, "rotate": True}, False)

    kept = read_passwords(params["passfile"])
    assert matches(kept["alice"], server.verifiers["alice"])
