# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""reading_role against a stateful fake server; tests/integration has the real one."""

import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules.reading_role import (
    MAINTENANCE,
    OPEN,
    ROLE,
    SETTINGS,
    ensure_reader,
    for_database,
)

PARAMS = {"role": "reader", "writer": "study", "user": "alice", "databases": ["mala", "second"]}
ATTRIBUTES = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 10"
GRANTED = [
    'REVOKE TEMPORARY ON DATABASE "mala" FROM PUBLIC, "reader"',
    'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "reader"',
    'GRANT EXECUTE ON FUNCTION pg_catalog.lo_create(oid) TO "study"',
    'REVOKE EXECUTE ON FUNCTION pg_catalog.lo_create(oid) FROM PUBLIC, "reader"',
    'ALTER DEFAULT PRIVILEGES FOR ROLE "alice" IN SCHEMA public GRANT SELECT ON TABLES TO "reader"',
    'ALTER DEFAULT PRIVILEGES FOR ROLE "study" IN SCHEMA public GRANT SELECT ON TABLES TO "reader"',
]
MADE = ['CREATE ROLE "reader"', f'ALTER ROLE "reader" {ATTRIBUTES}',
        *(f"ALTER ROLE \"reader\" SET {name} = '{value}'" for name, value in SETTINGS.items())]


class FakeServer:
    """Keeps a role, and its privileges in each database, which has tables."""

    def __init__(self, *databases, role=None):
        self.role = role and {**role, "settings": [*role["settings"]], "databases": [*role["databases"]]}
        self.rights = {
            name: {"temporary": True, "lacks": True, "makers": {"alice", "study"}, "open": "pg_catalog.lo_create(oid)"}
            for name in databases
        }
        self.sent = []

    @contextlib.contextmanager
    def connect(self, _params, database):
        self.database = database
        yield self

    def rows(self, _connection, query, _values):
        if query == OPEN:
            return [(self.rights[self.database]["open"],)]
        if self.role is None:
            return []
        if query == ROLE:
            return [tuple(self.role[key] for key in ("harmless", "limit", "settings", "databases"))]
        rights = self.rights[self.database]
        return [(True, rights["temporary"], True, False, rights["lacks"], sorted(rights["makers"]))]

    def cursor(self):
        return contextlib.nullcontext(self)

    def execute(self, statement):
        self.sent.append(statement)
        if statement.startswith("CREATE ROLE"):
            self.role = {"harmless": False, "limit": -1, "settings": [], "databases": []}
        elif statement.endswith(ATTRIBUTES):
            self.role.update(harmless=True, limit=10)
        elif statement.endswith("RESET ALL"):
            self.role["databases" if " IN DATABASE " in statement else "settings"].clear()
        elif " SET " in statement:
            self.role["settings"].append(re.sub(r".* SET (\w+) = '(\w+)'", r"\1=\2", statement))
        elif statement.startswith("REVOKE TEMPORARY"):
            self.rights[self.database]["temporary"] = False
        elif " ON FUNCTION " in statement:
            self.rights[self.database]["open"] = None
        elif "ON ALL TABLES" in statement:
            self.rights[self.database]["lacks"] = False
        else:
            self.rights[self.database]["makers"].remove(re.search(r'FOR ROLE "(\w+)"', statement).group(1))


@pytest.fixture
def serve(monkeypatch):
    sql = SimpleNamespace(SQL=str, Identifier='"{}"'.format)
    monkeypatch.setitem(sys.modules, "psycopg2", SimpleNamespace(sql=sql))

    def serve(server):
        monkeypatch.setattr(_connection, "connect", server.connect)
        monkeypatch.setattr(_connection, "rows", server.rows)
        return server

    return serve


def harmless(**changes):
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    return {"harmless": True, "limit": 10, "settings": settings, "databases": [], **changes}


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("role, says", [
    (None, MADE),
    (harmless(harmless=False), MADE[1:2]),
    (harmless(limit=-1), MADE[1:2]),
    (harmless(settings=[]), MADE[2:]),
    (harmless(settings=[*harmless()["settings"][1:], "default_transaction_read_only=off"]), MADE[2:3]),
    (harmless(settings=[*harmless()["settings"], "work_mem=1TB"]), ['ALTER ROLE "reader" RESET ALL', *MADE[2:]]),
    (harmless(databases=["mala"]), ['ALTER ROLE "reader" IN DATABASE "mala" RESET ALL']),
    (harmless(), []),
])
def test_role_is_harmless(role, says, check_mode, serve):
    server = serve(FakeServer(role=role))

    done = ensure_reader({**PARAMS, "databases": []}, check_mode)

    assert done["statements"] == [f"{MAINTENANCE}: {statement}" for statement in says]
    assert done["changed"] is bool(says)
    assert server.sent == ([] if check_mode else says)


def test_each_database_is_opened_once(serve):
    server = serve(FakeServer("mala", "second"))

    planned = ensure_reader(PARAMS, check_mode=True)
    assert server.sent == []
    done = ensure_reader(PARAMS, check_mode=False)
    again = ensure_reader(PARAMS, check_mode=False)

    assert planned == done
    assert server.sent == MADE + GRANTED + [each.replace("mala", "second") for each in GRANTED]
    assert (again["changed"], again["statements"], again["diff"]["after"]) == (False, [], "")


def test_what_others_have_taken_or_left_open_is_mended():
    assert for_database(PARAMS, "mala", [(False, False, False, True, False, [])], None) == [
        ("GRANT CONNECT ON DATABASE {} TO {}", ["mala", "reader"]),
        ("GRANT USAGE ON SCHEMA public TO {}", ["reader"]),
        # PostgreSQL 14 lets every role create tables there; the study role must keep that right.
        ("GRANT USAGE, CREATE ON SCHEMA public TO {}", ["study"]),
        ("REVOKE CREATE ON SCHEMA public FROM PUBLIC, {}", ["reader"]),
    ]
