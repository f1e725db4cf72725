# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna_import with storages in memory; tests/integration has Optuna's own."""

import contextlib
import copy
import datetime
import json
import math
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.modules import optuna_import
from ansible_collections.mala.hpc_db.plugins.modules.optuna_import import Refused, ensure_imported

STARTED = datetime.datetime(2026, 11, 23, 4, 10)
LATER = STARTED + datetime.timedelta(minutes=5)
STATES = {name: SimpleNamespace(name=name) for name in ("COMPLETE", "FAIL", "RUNNING", "WAITING")}


class Kind(str):
    """A distribution in which each number is stored as itself."""

    low = 0.0

    def to_internal_repr(self, value):
        return value

    def to_external_repr(self, value):
        return int(value) if value == int(value) else value


class Choices(str):
    """A choice among values, in which True equals 1."""

    to_internal_repr, to_external_repr = Kind.to_internal_repr, Kind.to_external_repr


def check_compatible(old, new):
    if old != new:
        raise ValueError("no dynamic value space.")


def create_trial(params, **_held):
    """Reject values outside of 0..1, like Optuna."""
    if any(not 0 <= value <= 1 for value in params.values()):
        raise ValueError("isn't contained")


def trial(number, state="COMPLETE", **held):
    return SimpleNamespace(**{
        "number": number, "state": STATES[state], "values": [1.0] if state == "COMPLETE" else None,
        "params": {"x": 0.5}, "distributions": {"x": Kind("0..1")},
        "user_attrs": {}, "system_attrs": {}, "intermediate_values": {1: math.nan},
        "datetime_start": STARTED, "datetime_complete": LATER if state == "COMPLETE" else None, **held,
    })


class FakeStorage:
    """Studies by name: directions, attributes and trials. ``breaks`` is called before each trial that is added."""

    def __init__(self, **studies):
        self.studies = {name: [["minimize"], {"by": "alice"}, {}, trials] for name, trials in studies.items()}
        self.breaks = lambda: None

    def create_new_study(self, directions, name):
        assert name not in self.studies
        self.studies[name] = [directions, {}, {}, []]
        return name

    def create_new_trial(self, study, template_trial):
        self.breaks()
        added = copy.deepcopy(template_trial)
        added.system_attrs["hpc_db:worker"] = "mine"  # like the worker-tracking trigger
        self.studies[study][3].append(added)

    def get_study_id_from_name(self, name):
        return name

    def get_study_directions(self, study):
        return self.studies[study][0]

    def get_study_user_attrs(self, study):
        return self.studies[study][1]

    def get_study_system_attrs(self, study):
        return self.studies[study][2]

    def get_all_trials(self, study, deepcopy):
        return self.studies[study][3]

    def set_study_user_attr(self, study, key, value):
        self.studies[study][1][key] = value

    def load_study(self, study_name, storage):
        directions, attributes, _system, trials = storage.studies[study_name]
        return SimpleNamespace(
            study_name=study_name, directions=directions, user_attrs=attributes, get_trials=lambda deepcopy: trials
        )


class FakeDatabase(FakeStorage):
    """A database with that storage."""

    locked = False

    @contextlib.contextmanager
    def connect(self, _params, _name):
        yield self

    cursor = contextlib.contextmanager(lambda self: (yield self))

    def rows(self, _connection, query):
        if "advisory" in query:
            return [(not self.locked,)]
        if "to_regclass" in query:
            return [("version_info", "alembic_version")]
        if query == optuna_schema.SCHEMA:
            return [("5.0.0", "new")]
        return [] if query == _optuna.CLOCKS else [(name,) for name in self.studies]

    def execute(self, statement, values):
        assert statement == optuna_import.FINISH
        for old, new in zip(values["unfinished"], values["names"]):
            self.studies[new] = self.studies.pop(old)


@pytest.fixture
def import_(tmp_path, monkeypatch):
    """Import a file with these studies; return the database with the result."""
    file = tmp_path / "study.log"
    file.write_text('{"op_code": 0, "worker_id": "a"}\n')
    (tmp_path / "dumps").mkdir()

    def import_(source, database, check_mode=False, **params):
        fake = SimpleNamespace(
            get_all_study_names=lambda storage: list(storage.studies), load_study=source.load_study,
            delete_study=lambda study_name, storage: storage.studies.pop(study_name),
        )
        monkeypatch.setitem(sys.modules, "optuna", fake)
        fake_trial = SimpleNamespace(TrialState=SimpleNamespace(**STATES), create_trial=create_trial)
        monkeypatch.setitem(sys.modules, "optuna.trial", fake_trial)
        monkeypatch.setitem(sys.modules, "optuna.distributions", SimpleNamespace(
            distribution_to_json=str, check_distribution_compatibility=check_compatible))
        monkeypatch.setattr(optuna_schema, "installed_optuna", lambda: optuna_schema.Optuna("5.0.0", ["new", "old"]))
        monkeypatch.setattr(_connection, "connect", database.connect)
        monkeypatch.setattr(_connection, "rows", database.rows)
        monkeypatch.setattr(optuna_import, "open_database", lambda params: database)
        monkeypatch.setattr(optuna_import, "open_copy", lambda *_given: source)
        given = {"file": str(file), "database": "mala", "root": str(tmp_path), "studies": [], "name": None,
                 "repair": False}
        try:
            return ensure_imported({**given, **params}, check_mode)
        finally:
            assert list((tmp_path / "dumps").iterdir()) == []

    import_.file = file
    return import_


@pytest.mark.parametrize("check_mode", [False, True])
def test_brings_what_is_missing_once(check_mode, import_):
    source = FakeStorage(be=[trial(0), trial(1, "RUNNING"), trial(2, "WAITING")], al=[])
    database = FakeDatabase(other=[trial(0)])

    result = import_(source, database, check_mode)

    assert result["changed"] is True
    assert [(study["name"], study["trials"], study["ended"]) for study in result["studies"]] == [
        ("al", {}, 0), ("be", {"COMPLETE": 1, "FAIL": 1, "WAITING": 1}, 1)
    ]
    assert sorted(database.studies) == (["other"] if check_mode else ["al", "be", "other"])
    if not check_mode:
        ended = database.studies["be"][3][1]
        assert (ended.state.name, ended.datetime_complete) == ("FAIL", LATER)
        database.studies["be"][3].append(trial(3))  # a worker continues
        again = import_(source, database)
        assert again["changed"] is False and [study["imported"] for study in again["studies"]] == [False, False]


@pytest.mark.parametrize("params, says", [
    ({"studies": ["be", "nope"]}, "^import_studies: study.log contains no study nope, but al, be$"),
    ({"name": "x"}, "^import_as: x is one name for 2 studies; set import_studies$"),
    ({"studies": ["be"], "name": "other"}, r"^import_as: mala already contains .* other, .* \(the params of trial 0\)"),
])
def test_what_contradicts_is_refused(params, says, import_):
    database = FakeDatabase(other=[trial(0, params={"x": 0.25})])

    with pytest.raises(Refused, match=says):
        import_(FakeStorage(al=[], be=[trial(0)]), database, **params)
    assert list(database.studies) == ["other"]


def test_study_with_fewer_trials_is_another_one(import_):
    with pytest.raises(Refused, match=r"\(1 trials instead of 2\)"):
        import_(FakeStorage(be=[trial(0), trial(1)]), FakeDatabase(be=[trial(0)]))


def test_failure_leaves_nothing_and_what_was_killed_is_removed(import_):
    source, database = FakeStorage(al=[trial(0)], be=[trial(0)]), FakeDatabase()
    database.create_new_study([], f"{optuna_import.UNFINISHED}7")

    def break_at_the_second():
        if "1" in "".join(database.studies):
            raise RuntimeError("invalid data in the commit") from ConnectionError("server closed\nthe connection")

    database.breaks = break_at_the_second
    with pytest.raises(Refused, match="^database mala: ConnectionError: server closed the connection$"):
        import_(source, database)
    assert database.studies == {}


@pytest.mark.parametrize("field, value", [
    ("values", [2.0]), ("state", STATES["FAIL"]), ("intermediate_values", {1: 0.5}), ("user_attrs", {"a": 1}),
    ("datetime_start", LATER), ("distributions", {"x": Kind("0..2")}), ("params", {"x": True}),
])
def test_every_trial_is_compared(field, value, import_):
    database = FakeDatabase()
    add = database.create_new_trial

    def add_another(study, template_trial):
        add(study, SimpleNamespace(**{**vars(template_trial), field: value}))

    database.create_new_trial = add_another
    with pytest.raises(Refused, match="study be: the database and the file differ in the .* of trial 0; nothing"):
        import_(FakeStorage(be=[trial(0, params={"x": 1}, distributions={"x": Choices("1")})]), database)
    assert database.studies == {}


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("trials, says", [
    ([trial(0, params={"p" * 600: 0.5}, distributions={"p" * 600: Kind("0..1")})],
     "trial 0: its parameter pp+… has 600 characters, but PostgreSQL stores at most 512"),
    ([trial(0), trial(1, user_attrs={"a\0": 1}), trial(2, user_attrs={"a\0": 1})],
     r"trial 1: its attribute a\0 has a character that PostgreSQL cannot store \(and so on, in 2 trials\)"),
    ([trial(0, system_attrs={"\ud800": 1})], "trial 0: its attribute .* has a character that PostgreSQL cannot store"),
    ([trial(0, intermediate_values={2**31: 0.5})], "trial 0: its step 2147483648, .* does not fit into 32 bits"),
    ([trial(0, values=[10**400])], "trial 0: its value 100+… is not a 64-bit integer"),
    ([trial(0, intermediate_values={0: None})], "trial 0: its intermediate value None is not a 64-bit integer"),
    ([trial(0), trial(1, distributions={"x": Kind("0..2")})],
     "trial 1: its parameter x differs from trial 0 in its distribution: no dynamic value space$"),
    ([trial(0, params={"x": True}, distributions={"x": Choices("1, True")})],
     "trial 0: its parameter x is True, which would become 1"),
    ([trial(0), trial(2)], "trial 1 is missing, .*; import_repair=true renumbers the trials"),
    ([trial(0), trial(1), trial(1)], "two trials have number 1; import_repair=true renumbers the trials"),
])
def test_what_the_database_cannot_hold_is_named_before_anything_is_copied(trials, says, check_mode, import_):
    database = FakeDatabase()
    database.breaks = lambda: pytest.fail("it was copied")

    with pytest.raises(Refused, match=f"^import_from: study.log: study be: {says}"):
        import_(FakeStorage(be=trials), database, check_mode)
    assert database.studies == {}


@pytest.mark.parametrize("attribute", ["k" * 513, "k\0"])
def test_other_studies_are_named_as_a_way_out(attribute, import_):
    source = FakeStorage(al=[trial(0)], be=[trial(0)])
    source.studies["be"][1] = {attribute: 1}

    with pytest.raises(Refused, match=r"study be: its attribute k.*; import_studies can name the others \(al\)$"):
        import_(source, FakeDatabase())
    assert import_(source, FakeDatabase(), studies=["al"])["changed"]


@pytest.mark.parametrize("name", ["n" * 513, "n\udc80"])
def test_study_with_an_unfit_name_can_get_another(name, import_):
    source = FakeStorage(**{name: [trial(0)]})

    with pytest.raises(Refused, match=r"study n.*: its name n.* PostgreSQL .* \(import_as gives it another\)$"):
        import_(source, FakeDatabase())
    assert import_(source, FakeDatabase(), name="be")["changed"]


def test_study_that_cannot_be_read_leaves_the_others_as_a_way_out(import_):
    source = FakeStorage(al=[trial(0)], be=[trial(0)])
    source.studies["be"][3] = None

    with pytest.raises(Refused, match=r"study be cannot be read: TypeError.*; import_studies can name .* \(al\)$"):
        import_(source, FakeDatabase())
    assert import_(source, FakeDatabase(), studies=["al"])["changed"]


@pytest.mark.parametrize("numbers", [[0, 2, 5], [0, 1, 1], [1, 2, 3]])
def test_gap_is_mended_on_request(numbers, import_):
    database = FakeDatabase()
    source = FakeStorage(be=[trial(number, user_attrs={"was": place}) for place, number in enumerate(numbers)])

    first = import_(source, database, repair=True)
    again = import_(source, database, repair=True)

    brought = [(each.number, each.user_attrs["was"]) for each in database.studies["be"][3]]
    assert brought == [(0, 0), (1, 1), (2, 2)]
    assert (first["changed"], again["changed"]) == (True, False)


def test_odd_trials_are_brought_and_named(import_):
    database = FakeDatabase()
    odd = [trial(0, params={"x": 2.0}), trial(1, "FAIL"), trial(2, "FAIL"), trial(3, "RUNNING", datetime_start=None),
           trial(4, values=[math.nan])]

    result = import_(FakeStorage(be=odd), database)

    assert result["warnings"] == [
        "study be: trial 0 has x = 2.0 outside of 0..1; imported unchanged",
        "study be: trial 4 is COMPLETE with 0 of 1 values; imported unchanged",
        "study be: trial 1 is FAIL without an end time (and so on, in 2 trials); imported unchanged",
    ]
    assert database.studies["be"][3][3].datetime_complete == LATER


def test_running_trial_of_a_study_without_a_time_ended_when_the_file_did(import_):
    database = FakeDatabase()

    import_(FakeStorage(be=[trial(0, "RUNNING", datetime_start=None)]), database)

    ended = datetime.datetime.fromtimestamp(import_.file.stat().st_mtime)
    assert database.studies["be"][3][0].datetime_complete == ended


LINES = [b'{"op_code": %d, "worker_id": "a"}' % number for number in range(6)]
DAMAGE = {
    "cut": (3, [LINES[3][:20]]), "joined": (3, [LINES[3][:20] + LINES[4]]), "blank": (2, [b"", LINES[2]]),
    "nul": (1, [b"\0" * 4096, LINES[1]]), "foreign": (0, [b"Traceback (most recent call last):", LINES[0]]),
    "other": (2, [b'{"event": "step"}']), "deep": (4, [b"[" * 100000]), "last": (5, [LINES[5][:9]]),
    "text": (1, [b"\xff\xfe"]),
}
REPAIRED = {"blank": [0, 1, 2, 3, 4, 5], "last": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_line_of_a_journal_is_named(case, repair, tmp_path):
    place, instead = DAMAGE[case]
    path = tmp_path / "study.log"
    path.write_bytes(b"\n".join([*LINES[:place], *instead, *LINES[place + 1:]]) + b"\n" * (case != "last"))
    lines = len(LINES) + len(instead) - 1

    assert optuna_import.kind_of(str(path)) == "journal"
    if repair and case in REPAIRED:
        journal = optuna_import.Journal(str(path), "study.log", True)
        assert [each["op_code"] for each in journal.read_logs(0)] == REPAIRED[case]
        assert list(journal.read_logs(6)) == []
        return
    with pytest.raises(Refused, match=f"^import_from: study.log: line {place + 1} of {lines} is ") as refused:
        optuna_import.Journal(str(path), "study.log", repair)
    assert ("import_repair=true leaves out" in str(refused.value)) is (case in REPAIRED)


def test_last_line_without_its_end_is_whole(tmp_path):
    (tmp_path / "study.log").write_bytes(b"\n".join(LINES))

    journal = optuna_import.Journal(str(tmp_path / "study.log"), "study.log", False)

    assert [each["op_code"] for each in journal.read_logs(0)] == [0, 1, 2, 3, 4, 5]


def test_damaged_sqlite_file_is_named(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.executescript("CREATE TABLE version_info (library_version); CREATE TABLE alembic_version (v)")
        connection.executemany("INSERT INTO version_info VALUES (?)", [("5.0.0" * 500,)] * 20)
        connection.commit()
    whole = (tmp_path / "a.db").read_bytes()
    (tmp_path / "a.db").write_bytes(whole[:len(whole) // 2])

    with pytest.raises(Refused, match=r"^import_from: a.db is damaged: SQLite reports: .*; its command .recover pr"):
        optuna_import.look_at_schema(str(tmp_path / "a.db"), "a.db", optuna_schema.Optuna("5.0.0", ["new", "old"]))


def test_two_at_once_are_refused(import_):
    database = FakeDatabase()
    database.locked = True

    with pytest.raises(Refused, match="^another import into the database mala is running"):
        import_(FakeStorage(be=[trial(0)]), database)


@pytest.mark.parametrize("beside", ["-wal", "-journal", ".lock"])
def test_file_in_use_is_refused(beside, import_):
    path = import_.file.with_name(import_.file.name + beside)
    if beside == ".lock":
        path.symlink_to("/no/such")
    else:
        path.write_text("x")

    with pytest.raises(Refused, match=f"^import_from: study.log is in use, .*: study.log{beside} ex"):
        import_(FakeStorage(be=[trial(0)]), FakeDatabase())


def test_file_that_changes_meanwhile_is_refused(import_):
    database = FakeDatabase()
    database.breaks = lambda: import_.file.write_text("more")

    with pytest.raises(Refused, match="study.log is in use, .*: it changed during the import"):
        import_(FakeStorage(be=[trial(0)]), database)
    assert database.studies == {}


@pytest.mark.parametrize("content", [b"", b"text", b"[1]\n", b'{"a": 1}\n', b"\x80\x04", b"PGDMP"])
def test_other_files_are_refused(content, import_):
    import_.file.write_bytes(content)

    with pytest.raises(Refused, match="^import_from: study.log is not an SQLite file, nor one of Optuna's J"):
        import_(FakeStorage(be=[trial(0)]), FakeDatabase())


@pytest.mark.parametrize("tables, rows, says", [
    ("t (i)", "", "contains no Optuna studies: SQLite reports: no such table"),
    ("version_info (library_version); CREATE TABLE alembic_version (version_num)", "", "contains no Optuna studies$"),
    ("version_info (library_version); CREATE TABLE alembic_version (version_num)", "9.0.0 newest",
     "was made by Optuna 9.0.0, which is newer than the installed Optuna 5.0.0: set optuna==9.0.0 in postgres_python"),
])
def test_tables_that_optuna_cannot_read_are_refused(tables, rows, says, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.executescript(f"CREATE TABLE {tables}")
        for table, row in zip(("version_info", "alembic_version"), rows.split()):
            connection.execute(f"INSERT INTO {table} VALUES (?)", (row,))
        connection.commit()

    with pytest.raises(Refused, match=f"^import_from: a.db {says}"):
        optuna_import.look_at_schema(str(tmp_path / "a.db"), "a.db", optuna_schema.Optuna("5.0.0", ["new", "old"]))


@pytest.mark.parametrize("revision, old", [("new", False), ("old", True)])
def test_older_tables_are_upgraded(revision, old, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        for table, column in (("version_info", "library_version"), ("alembic_version", "version_num")):
            connection.execute(f"CREATE TABLE {table} ({column})")
        connection.execute("INSERT INTO version_info VALUES ('3.1.1')")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        connection.commit()

    installed = optuna_schema.Optuna("5.0.0", ["new", "old"])
    assert optuna_import.look_at_schema(str(tmp_path / "a.db"), "a.db", installed) is old


def test_fields_tell_apart_what_python_does_not():
    fake = SimpleNamespace(distribution_to_json=json.dumps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optuna.distributions", fake)
        one, other = (optuna_import.fields_of(trial(0, params={"c": value})) for value in (True, 1))

    assert one["params"] != other["params"] and one["intermediate values"] == other["intermediate values"]


def test_minus_zero_is_zero_in_the_database():
    assert optuna_import.text_of(optuna_import.as_number(-0.0)) == "0.0"
