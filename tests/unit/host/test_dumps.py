# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps with programs that behave like pg_dump and pg_restore; tests/integration has the real ones."""

import hashlib
import os
import re
import time
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.modules import study_dump
from hpc_db_host import dumps as module
from hpc_db_host.dumps import Dumps
from hpc_db_host.settings import complete

NOTHING = {"pg_dump": "echo $* > $file", "pg_restore": ""}
# Names have a resolution of seconds; a test is faster than that.
NAMES = iter(f"20260101T{number:06d}Z" for number in range(1, 999999))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "strftime", lambda *_unused: next(NAMES))
    (tmp_path / "bin").mkdir()

    def make(programs=(), pause=0.0, **settings):
        for name, script in {**NOTHING, **dict(programs)}.items():
            file = 'for word; do case $word in --file=*) file=${word#--file=};; esac; last=$word; done'
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{file}\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        given = {"root": str(tmp_path), "bindir": str(tmp_path / "bin"), "databases": ["a", "a_b"], **settings}
        postgres = SimpleNamespace(socket=str(tmp_path), port=5433)
        return Dumps(complete({"dump_minutes": "60", "dump_keep": "2", **given}), postgres, pause)

    return make


def names(tmp_path):
    return sorted(path.name.partition("-")[0] + path.suffix for path in (tmp_path / "dumps").iterdir())


def finish(dumps, seconds=10):
    limit = time.monotonic() + seconds
    dumps.poll()
    while dumps._round is not None:
        assert time.monotonic() < limit
        dumps.poll()
        time.sleep(0.01)


def test_round_dumps_every_database_and_keeps_the_newest(make, tmp_path):
    dumps = make(dump_minutes="0")

    made = []
    for _round in range(3):
        assert dumps.now(10, lambda: None) is True
        made.append(sorted(path.name for path in (tmp_path / "dumps").glob("*.dump")))

    assert names(tmp_path) == sorted(2 * ["a.dump", "a.sha256", "a_b.dump", "a_b.sha256"])
    assert set(made[1]) - set(made[0]) < set(made[2])
    for path in (tmp_path / "dumps").glob("*.dump"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert f"--host={tmp_path} --port=5433" in path.read_text()
        said = (tmp_path / "dumps" / f"{path.name}.sha256").read_text()
        assert said == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def test_dumps_that_a_user_asked_for_outlive_every_round(make, tmp_path):
    dumps = make(dump_minutes="0", databases=["a"])
    assert dumps.now(10, lambda: None, kept=True) is True
    asked_for = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert [re.sub("[0-9]+T[0-9]+Z", "TIME", name) for name in asked_for] == [
        "a-TIME.kept.dump", "a-TIME.kept.dump.sha256",
    ]

    for _round in range(6):
        assert dumps.now(10, lambda: None) is True

    left = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert left[:2] == asked_for
    assert len(left) == 2 + 2 * 2


def test_dump_of_a_playbook_outlives_every_round(make, tmp_path):
    dumps = make(dump_minutes="0", databases=["a"])
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "settings.json").write_text('{"bindir": "/bin"}')
    params = {"root": str(tmp_path), "database": "a", "tables": "optuna"}
    file = study_dump.ensure_dumped(params, lambda _command: "", True)["file"]
    for path in (file, file + ".sha256"):
        with open(path, "w", encoding="utf-8") as stream:
            stream.write("mine")

    for _round in range(6):
        assert dumps.now(10, lambda: None) is True

    assert {os.path.basename(file), os.path.basename(file) + ".sha256"} < set(os.listdir(tmp_path / "dumps"))


def test_dump_that_a_user_asked_for_removes_none(make, tmp_path):
    dumps = make(dump_minutes="0", databases=["a"])
    for kept in (False, False, True, True, True):
        assert dumps.now(10, lambda: None, kept) is True

    assert names(tmp_path) == sorted(5 * ["a.dump", "a.sha256"])


def test_poll_never_waits_and_children_are_nice(make, tmp_path):
    go = tmp_path / "go"
    wait = f"for _ in $(seq 1000); do [ ! -e {go} ] || exit 0; sleep 0.01; done; exit 1"
    dumps = make({"pg_dump": f"nice > $file; {wait}"})
    dumps.poll()

    go.touch()  # a program that had waited for pg_dump would have seen it fail
    finish(dumps)
    assert dumps.told == ""
    nice = {path.read_text() for path in (tmp_path / "dumps").glob("*.dump")}
    assert nice == {f"{min(os.nice(0) + 10, 19)}\n"}


@pytest.mark.parametrize("programs, told", [
    ({"pg_dump": "echo half > $file; echo 'pg_dump: error: disk full' >&2; exit 1"}, "pg_dump: error: disk full"),
    ({"pg_dump": "echo half > $file; kill -9 $$"}, "pg_dump ended with -9"),
    ({"pg_restore": "echo 'pg_restore: error: end of file' >&2; exit 1"}, "pg_restore: error: end of file"),
])
def test_dump_that_fails_leaves_the_older_ones_and_is_told(programs, told, make, tmp_path):
    make().now(10, lambda: None)
    older = names(tmp_path)

    dumps = make(programs)
    assert dumps.now(10, lambda: None) is False

    assert dumps.told == f"cannot dump a: {told}; cannot dump a_b: {told}"
    assert names(tmp_path) == older
    dumps = make()
    dumps.told = told
    assert dumps.now(10, lambda: None) is True and dumps.told == ""


def test_program_that_is_missing_is_told(make, tmp_path):
    dumps = make(databases=["a"], bindir=str(tmp_path / "gone"))

    assert dumps.now(10, lambda: None) is False
    assert dumps.told.startswith("cannot dump a: ") and "/gone/pg_dump" in dumps.told


def test_round_is_given_up_in_time_and_nothing_is_left(make, tmp_path):
    dumps = make({"pg_dump": "echo half > $file; echo $$ > ../pid; exec sleep 60"})
    beats = []
    began = time.monotonic()

    assert dumps.now(2, lambda: beats.append(1)) is False

    assert time.monotonic() - began < 60 and beats
    assert dumps.told == "no dump within 2 s" and names(tmp_path) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("minutes, age, due", [
    ("60", None, True), ("60", 3700, True), ("60", 3000, False), ("60", -3700, False), ("0", None, False),
])
def test_first_round_is_due_when_the_newest_dump_is_old(minutes, age, due, make, tmp_path):
    if age is not None:
        make().now(10, lambda: None)
        for path in (tmp_path / "dumps").glob("a_b-*"):
            os.utime(path, (time.time() - age, time.time() - age))

    dumps = make(dump_minutes=minutes)
    dumps.poll()

    assert (dumps._round is not None) is due
    dumps.cancel()
    later = make(dump_minutes=minutes, pause=60)
    later.poll()
    assert later._round is None


def test_leftovers_of_earlier_lives_are_removed(make, tmp_path):
    (tmp_path / "dumps").mkdir()
    for name in (
        "a-20260101T000000Z.dump.part", "a-20260101T000000Z.kept.dump.part", "thesis.part",
        ".a-20260101T000000Z.kept.dump.part",
    ):
        (tmp_path / "dumps" / name).touch()

    make()

    # the first belongs to a playbook that is running, the second to the user: neither is removed
    assert sorted(os.listdir(tmp_path / "dumps")) == [".a-20260101T000000Z.kept.dump.part", "thesis.part"]


CHILD = """
import sys, time, types
from hpc_db_host.dumps import Dumps
root = sys.argv[1]
settings = {"root": root, "bindir": root + "/bin", "databases": ["a"], "dump_minutes": 60, "dump_keep": 1}
dumps = Dumps(settings, types.SimpleNamespace(socket=root, port=1), 0.0)
dumps.poll()
print("begun", flush=True)
time.sleep(60)
"""


def test_child_does_not_outlive_the_program(start, make, tmp_path):
    make({"pg_dump": "echo $$ > ../pid.new; mv ../pid.new ../pid; exec sleep 60"})
    program = start(CHILD, tmp_path)
    assert program.stdout.readline() == "begun\n"
    limit = time.monotonic() + 10
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)

    program.kill()
    program.wait()

    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() < limit and alive(pid):
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().split()[2] not in "ZX"
    except OSError:
        return False
