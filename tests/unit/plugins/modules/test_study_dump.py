# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""study_dump against a server and programs in memory; tests/integration has the real ones."""

import contextlib
import json
import os
import re
import time

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules import study_dump
from ansible_collections.mala.hpc_db.plugins.modules.study_dump import (
    Failed,
    Refused,
    count_rows,
    ensure_dumped,
    ensure_restored,
)

NOW = "20260101T000000Z"
KEPT = f"studies-{NOW}"
ROW = "1\t0\t1\tCOMPLETE\tx\\.y\n"


class FakeServer:
    """Databases as (studies or tables, trials), None without any; and pg_dump and pg_restore on files of JSON."""

    def __init__(self, **databases):
        self.databases = {"postgres": None, **databases}
        self.asked = ""
        self.lost = 0
        self.commands = []

    @contextlib.contextmanager
    def connect(self, _params, database):
        if database not in self.databases:
            raise _connection.Unreachable(database)
        self.asked = database
        yield self

    def rows(self, _connection, query, values=()):
        if query == study_dump.EXISTS:
            return [(1,)] * (values[0] in self.databases)
        if query == study_dump.TABLES:
            return [((self.databases[self.asked] or (0,))[0],)]
        if "to_regclass" in query:
            return [(None if self.databases[self.asked] is None else "trials",)]
        return [self.databases[self.asked]] if query == study_dump.COUNTS else []

    def cursor(self):
        return contextlib.nullcontext(self)

    def execute(self, statements):
        for statement in statements.split("; "):
            first, *more = re.findall(r'"([^"]+)"', statement)
            if statement.startswith("DROP"):
                assert "IF EXISTS" in statement or first in self.databases
                self.databases.pop(first, None)
            elif statement.startswith("CREATE"):
                assert first not in self.databases and more == ["study"]
                self.databases[first] = None
            elif " SET " in statement:
                assert first in self.databases and "hpc_db.generation" in statement
            else:
                assert more[0] not in self.databases
                self.databases[more[0]] = self.databases.pop(first)

    def run(self, command):
        self.commands.append(command)
        dbname = re.search(r" dbname='([^']+)'", next((word for word in command if "--dbname=" in word), ""))
        if command[0].endswith("pg_dump"):
            with open(next(word[7:] for word in command if word.startswith("--file=")), "w") as stream:
                json.dump(self.databases[dbname[1]], stream)
            return ""
        with open(next(word for word in command[1:] if word.endswith((".dump", ".part")))) as stream:
            try:
                held = json.load(stream)
            except ValueError:
                raise Failed("pg_restore failed: end of file") from None
        if "--list" in command:
            # The format of pg_restore 15 for tables and rows; spatial_ref_sys has rows without a table, as in an
            # extension.
            tables = "215; 1259 17 TABLE public trials study\n3370; 0 17 TABLE DATA public trials study\n"
            extension = "3371; 0 18 TABLE DATA public spatial_ref_sys study\n"
            return f"; Archive\n{extension}" + tables * (held[0] if held else 0)
        if "--file=-" in command:
            return f"SET x;\nCOPY public.trials (a, b) FROM stdin;\n{ROW * held[1]}\\.\n\nSET y;\n"
        if dbname:
            self.databases[dbname[1]] = (held[0], held[1] - self.lost)
        return ""


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.setattr(study_dump.dumps, "stamp", lambda: NOW)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "settings.json").write_text('{"bindir": "/opt/bin"}')
    (tmp_path / "dumps").mkdir()
    given = {"host": "c1", "port": 5432, "user": "alice", "passfile": "/home/o'neill/pgpass", "owner": "study"}
    wanted = {"file": "newest", "replace": False, "tables": "optuna"}
    return {"root": str(tmp_path), "database": "studies", **wanted, **given}


@pytest.fixture
def use(monkeypatch):
    def use(server):
        monkeypatch.setattr(_connection, "connect", server.connect)
        monkeypatch.setattr(_connection, "rows", server.rows)
        return server

    return use


def dump(tmp_path, content=(1, 5), name="studies-20250101T000000Z.dump"):
    (tmp_path / "dumps" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(tmp_path / "dumps" / name)


def test_dump_has_its_name_only_once_it_is_whole(params, use, tmp_path):
    server = use(FakeServer(studies=(1, 5)))

    result = ensure_dumped(params, server.run, check_mode=False)

    path = tmp_path / "dumps" / f"studies-{NOW}.kept.dump"
    assert result == {
        "changed": True, "file": str(path), "trials": 5, "tables": None, "diff": {"before": "", "after": f"{path}\n"},
    }
    assert f"--file={tmp_path}/dumps/.studies-{NOW}.kept.dump.part" in server.commands[0]
    assert sorted(os.listdir(tmp_path / "dumps")) == [path.name, f"{path.name}.sha256"]
    assert study_dump.check_dump("/opt/bin", str(path), server.run) == 5


@pytest.mark.parametrize("check_mode", [False, True])
def test_dump_that_fails_or_is_not_made_leaves_nothing(check_mode, params, use, tmp_path):
    old, new = tmp_path / "dumps" / ".old.dump.part", tmp_path / "dumps" / ".new.dump.part"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 4000, time.time() - 4000))

    def run(_command):
        raise Failed("disk full")

    with contextlib.nullcontext() if check_mode else pytest.raises(Failed, match="disk full"):
        assert ensure_dumped(params, run, check_mode)["trials"] is None
    assert sorted(os.listdir(tmp_path / "dumps")) == [new.name, old.name][: 2 if check_mode else 1]


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("before, replace, kept, diff", [
    ({}, False, {}, ""),
    ({"studies": None}, False, {}, "studies: 0 trials\n"),
    ({"studies": (0, 0)}, False, {}, "studies: 0 trials\n"),
    ({"studies": (2, 9)}, True, {KEPT: (2, 9)}, "studies: 9 trials\n"),
    ({"studies": (1, 0), "studies-restoring": (1, 1)}, True, {KEPT: (1, 0)}, "studies: 0 trials\n"),
])
def test_dump_takes_the_place_of_what_was_there(before, replace, kept, diff, check_mode, params, use, tmp_path):
    path = dump(tmp_path)
    dump(tmp_path, (3, 3), "studies-20240101T000000Z.dump")
    server = use(FakeServer(**before))

    result = ensure_restored({**params, "replace": replace}, server.run, check_mode)

    assert result == {
        "changed": True, "file": path, "trials": 5, "tables": None, "kept": next(iter(kept), None),
        "diff": {"before": diff, "after": "studies: 5 trials\n"},
    }
    after = before if check_mode else {"studies": (1, 5), **kept}
    assert server.databases == {"postgres": None, **after}
    if not check_mode:
        assert {"--no-owner", "--role=study", "--single-transaction", "--exit-on-error"} < set(server.commands[-1])


@pytest.mark.parametrize("names, newest", [
    (["studies-20260101T000000Z.dump", "studies-20250101T000000Z.kept.dump"], "studies-20260101T000000Z.dump"),
    (["studies-20250101T000000Z.dump", "studies-20260101T000000Z.kept.dump"], "studies-20260101T000000Z.kept.dump"),
    (["studies-20250101T000000Z.dump", "studies-20260101T000000Z.kept.dump.sha256", "other-20260101T000000Z.dump"],
     "studies-20250101T000000Z.dump"),
])
def test_newest_dump_is_chosen_whoever_made_it(names, newest, tmp_path):
    for name in names:
        (tmp_path / name).touch()

    assert study_dump.newest_dump(str(tmp_path), "studies") == f"{tmp_path}/{newest}"


@pytest.mark.parametrize("content, checksum, message", [
    ((1, 5), "", r"restore_database: studies contains 2 studies with 9 trials; with restore_replace=true"),
    ("PGDMP", "", r"^restore_from: studies-\w+.dump is not a dump, or is damaged: pg_restore failed: end of file$"),
    ("null", "", r"^restore_from: .* something else: it has no table of Optuna's trials; .* with tables: none$"),
    ((1, 5), "0" * 64, r"^restore_from: studies-(\w+).dump is damaged: it does not fit studies-\1.dump.sha256$"),
    (None, "", r"dumps contains no dump of studies$"),
])
def test_refused_before_anything_changes(content, checksum, message, params, use, tmp_path):
    path = content and dump(tmp_path, content)
    if checksum:
        dump(tmp_path, checksum, os.path.basename(f"{path}.sha256"))
    server = use(FakeServer(studies=(2, 9)))

    with pytest.raises(Refused, match=message):
        ensure_restored(params, server.run, check_mode=False)
    assert server.databases == {"postgres": None, "studies": (2, 9)}


def test_restore_that_lost_trials_changes_nothing(params, use, tmp_path):
    dump(tmp_path)
    server = use(FakeServer(studies=(2, 9)))
    server.lost = 1

    with pytest.raises(Failed, match="contains 5 trials, but 4 were restored; nothing was changed"):
        ensure_restored({**params, "replace": True}, server.run, check_mode=False)
    assert server.databases == {"postgres": None, "studies": (2, 9)}


def test_dump_of_another_program_is_counted_by_its_tables(params, use, tmp_path):
    params = {**params, "tables": "none"}
    path = dump(tmp_path, (3, 9))
    server = use(FakeServer(studies=(2, 0)))

    assert ensure_dumped(params, server.run, check_mode=False)["tables"] == 2
    taken = "restore_database: studies contains 2 tables; with restore_replace=true the dump"
    with pytest.raises(Refused, match=taken):
        ensure_restored({**params, "file": path}, server.run, check_mode=False)
    result = ensure_restored({**params, "file": path, "replace": True}, server.run, check_mode=False)

    assert (result["trials"], result["tables"], result["kept"]) == (None, 3, KEPT)
    assert result["diff"] == {"before": "studies: 2 tables\n", "after": "studies: 3 tables\n"}


def test_instance_that_is_not_there_is_named(params, tmp_path):
    (tmp_path / "host" / "settings.json").unlink()

    for act in (ensure_dumped, ensure_restored):
        with pytest.raises(FileNotFoundError, match="settings.json is missing; run the playbook hpc_db.yml first"):
            act(params, lambda command: "", False)


@pytest.mark.parametrize("database", ["a", "x" * 63])
@pytest.mark.parametrize("what", ["restoring", NOW])
def test_names_beside_a_database_are_never_its_own(database, what):
    name = study_dump.beside(database, what)

    assert len(name) <= 63 and name.endswith(f"-{what}")


def test_names_beside_databases_that_begin_alike_differ():
    assert study_dump.beside("x" * 45 + "a", "restoring") != study_dump.beside("x" * 45 + "b", "restoring")


@pytest.mark.parametrize("script, rows", [
    ("", 0), ("COPY t (a) FROM stdin;\n\\.\n", 0), (f"SET\nCOPY t (a) FROM stdin;\n{ROW}{ROW}\\.\nSET\n", 2),
    ("COPY t (a) FROM stdin;\na\x0bb\u2028c\x1c\n\\.\n", 1),
])
def test_rows_of_a_script(script, rows):
    assert count_rows(script) == rows


def test_programs_are_told_where_but_no_password(params):
    told = _connection.conninfo(params, "studies")

    assert told.startswith("host='c1' port='5432' user='alice' passfile='/home/o\\'neill/pgpass' dbname='studies'")
    assert "channel_binding='require'" in told and "require_auth" not in told
