# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Upgrades with programs that behave like PostgreSQL's; molecule/upgrade has the real ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import types

import pytest
from hpc_db_host import upgrade as module
from hpc_db_host.lease import Lost
from hpc_db_host.postgres import Failed
from hpc_db_host.upgrade import Rejected, Told, Upgrade, copy_tree, differences, in_short

TRIALS = '["table", "public.trials", 3, "77"]\n["study", "beryllium", 0, "MINIMIZE", 3, -1.5]\n'
# A data directory keeps its rows in a file, and its server's socket is in it.
PROGRAMS = {
    "psql": """
        while [ $# -gt 0 ]; do case $1 in -h) data=$2;; -c) echo '"alice"'; exit;; esac; shift; done
        text=$(cat)
        case $text in
            *"FROM pg_database"*) echo '"postgres"'; echo '"studies"';;
            *gexec*) cat "$data/rows";;
            ROWS*) echo "$text" | sed 1d > "$data/rows";;
            *ROLE*) echo "$text" > "$data/roles";;
        esac
    """,
    "pg_dump": """
        case "$*" in *--file=*) for word; do case $word in --file=*) cp rows* "${word#--file=}"; esac; done; exit; esac
        while [ $# -gt 0 ]; do case $1 in -h) data=$2;; esac; shift; done
        echo ROWS; cat "$data/rows"
    """,
    "pg_restore": "",
    "pg_dumpall": "echo 'CREATE ROLE \"alice\";'; echo 'CREATE ROLE study;'",
    "vacuumdb": "",
    "pg_upgrade": """
        for word; do case $word in --old-datadir=*) old=${word#*=};; --new-datadir=*) new=${word#*=};; esac; done
        echo 'Performing Upgrade'
        mv "$old/rows" "$new/rows"
    """,
}


class Interrupted(BaseException):
    """The end of the program, at any point."""


@pytest.fixture
def instance(tmp_path, short_folder, monkeypatch):
    return Instance(tmp_path, short_folder, monkeypatch)


class Instance:
    """An instance directory whose studies are in PostgreSQL 17, with all the steps of an upgrade."""

    def __init__(self, root, sockets, monkeypatch):
        self.root, self.sockets, self.servers, instance = root, sockets, [], self

        class FakePostgres:
            port = 5432

            def __init__(self, settings, listen, keeper, parameters):
                self.socket = parameters["data_directory"]
                assert not listen and os.path.exists(os.path.join(self.socket, "PG_VERSION"))

            def start(self):
                assert self.socket not in instance.servers
                instance.servers.append(self.socket)

            def wait_for_write(self, patience):
                pass

            def stop(self, patience):
                instance.servers.remove(self.socket)
                return True

        monkeypatch.setattr(module, "Postgres", FakePostgres)
        pause = time.sleep
        monkeypatch.setattr(time, "sleep", lambda _seconds: pause(0.002))
        (root / "dumps").mkdir()
        (root / "dumps" / "rows").touch()
        for major in (17, 18):
            (root / f"bin{major}").mkdir()
            for name, script in PROGRAMS.items():
                self.program(major, name, script)
        self.make("17", 17, TRIALS)
        self.write("settings.json", 17)

    def program(self, major, name, script):
        path = self.root / f"bin{major}" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def make(self, name, major, rows=""):
        """Create a data directory, as initdb does."""
        folder = self.root / "data" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "PG_VERSION").write_text(f"{major}\n")
            (folder / "rows").write_text(rows)

    def write(self, name, major):
        settings = {
            "root": str(self.root), "bindir": str(self.root / f"bin{major}"), "instance": "hpc_db",
            "data": str(self.root / "data" / str(major)), "socket_parent": self.sockets,
            "databases": ["studies"], "dump_minutes": 0, "dump_keep": 5,
        }
        (self.root / "host").mkdir(exist_ok=True)
        (self.root / "host" / name).write_text(json.dumps(settings))

    def used(self):
        settings = json.loads((self.root / "host" / "settings.json").read_text())
        return settings["data"].rpartition("/")[2]

    def rows(self, name):
        return (self.root / "data" / name / "rows").read_text()

    def names(self):
        return sorted(os.listdir(self.root / "data"))

    def upgrade(self, major=18, back=False, alive=lambda: None):
        """Upgrade as the playbook does."""
        if major > int(self.used()):
            self.make(f"{major}.new", major)
        self.write(f"settings-{major}.json", major)
        return self.run(major, back, alive)

    def run(self, major=18, back=False, alive=lambda: None):
        settings = json.loads((self.root / "host" / "settings.json").read_text())
        keeper = types.SimpleNamespace(check=alive, renew=alive)
        return Upgrade(settings, str(self.root / "host" / f"settings-{major}.json"), keeper).run(back)

    def is_as_before(self):
        dumped = any(name.startswith("studies-") for name in os.listdir(self.root / "dumps"))
        return (self.used(), self.rows("17"), self.servers, dumped) == ("17", TRIALS, [], True)


def test_upgrade_works_on_a_copy_and_keeps_the_old_directory(instance):
    done = instance.upgrade()

    assert (done["way"], done["from"], done["to"]) == ("pg_upgrade", "17", "18")
    assert done["kept"] == str(instance.root / "data" / "17")
    study = {"study": "beryllium", "objective": 0, "direction": "MINIMIZE", "trials": 3, "best": -1.5}
    held = {"tables": {"public.trials": [3, "77"]}, "studies": [study]}
    assert done["databases"] == {"postgres": held, "studies": held}
    assert (instance.used(), instance.names(), instance.servers) == ("18", ["17", "18"], [])
    assert instance.rows("17") == instance.rows("18") == TRIALS
    assert os.listdir(instance.root / "host") == ["settings.json"]
    assert any(name.startswith("studies-") for name in os.listdir(instance.root / "dumps"))


@pytest.mark.parametrize("name", ["a\u2028b", "\x85", "\u2029 \u03a9"])
def test_name_of_a_study_may_hold_what_separates_lines_elsewhere(name, instance):
    rows = TRIALS.replace("beryllium", name)
    (instance.root / "data" / "17" / "rows").write_text(rows, encoding="utf-8")

    done = instance.upgrade()

    assert done["databases"]["studies"]["studies"][0]["study"] == name
    assert instance.rows("18") == rows


@pytest.mark.parametrize("refuse, why", [
    (lambda instance: instance.program(18, "pg_upgrade", "echo 'Your installation has tables: fatal'; exit 1"),
     "pg_upgrade: Your installation has tables: fatal"),
    (lambda instance: (instance.root / "bin18" / "pg_upgrade").unlink(), "bin18/pg_upgrade is missing"),
    (lambda instance: os.symlink("/elsewhere", instance.root / "data" / "17" / "pg_wal"),
     "data/17/pg_wal is a symbolic link"),
])
def test_what_pg_upgrade_refuses_is_dumped_and_restored(refuse, why, instance):
    refuse(instance)

    done = instance.upgrade()

    assert done["way"].startswith("dump and restore, since pg_upgrade failed: ") and done["way"].endswith(why)
    assert (instance.used(), instance.names()) == ("18", ["17", "18"])
    assert instance.rows("17") == instance.rows("18") == TRIALS
    # the owner's role exists already
    assert (instance.root / "data" / "18" / "roles").read_text() == "CREATE ROLE study;\n"


@pytest.mark.parametrize("program, script, message", [
    ("pg_upgrade", "echo 'Performing Upgrade'; echo 'Linking files    fatal'; echo 'disk full'; exit 1",
     "pg_upgrade failed: pg_upgrade: disk full; its logs are in .*/data/18.unfinished"),
    ("pg_upgrade", PROGRAMS["pg_upgrade"] + "sed -i s/3,/2,/ $new/rows",
     "the contents of PostgreSQL 18 differ: postgres: public.trials has 2 rows, not 3; .* and 1 more"),
    ("pg_upgrade", PROGRAMS["pg_upgrade"] + "sed -i s/77/78/ $new/rows", "studies: rows of public.trials differ$"),
    ("pg_upgrade", PROGRAMS["pg_upgrade"] + "sed -i s/-1.5/-1.4/ $new/rows", "studies: best values of .* differ$"),
    ("vacuumdb", "echo 'vacuumdb: error: no' >&2; exit 1", "vacuumdb: error: no"),
])
def test_upgrade_that_fails_changes_nothing_and_the_next_one_works(program, script, message, instance):
    instance.program(18, program, script)
    with pytest.raises(Failed, match=message):
        instance.upgrade()
    assert instance.is_as_before()

    instance.program(18, program, PROGRAMS[program])
    instance.upgrade()
    assert (instance.used(), instance.rows("18"), instance.names()) == ("18", TRIALS, ["17", "18"])


def test_nothing_is_moved_without_a_dump(instance):
    instance.program(17, "pg_dump", "echo 'pg_dump: error: disk full' >&2; exit 1")

    with pytest.raises(Failed, match="cannot dump studies: pg_dump: error: disk full"):
        instance.upgrade()
    assert (instance.used(), instance.names(), instance.servers) == ("17", ["17", "18.new"], [])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_run_that_ends_at_a_rename_is_done_again(number, after, instance, monkeypatch):
    rename, renamed = os.rename, []

    def interrupt(source, target):
        if "/dumps/" in source:
            return rename(source, target)
        renamed.append(target)
        if len(renamed) == number and not after:
            raise Interrupted
        rename(source, target)
        if len(renamed) == number:
            raise Interrupted

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(Interrupted):
        instance.upgrade()
    monkeypatch.setattr(os, "rename", rename)

    assert instance.rows("17") == TRIALS and instance.servers == []
    assert instance.used() == ("18" if (number, after) == (3, True) else "17")
    if instance.used() == "17":
        instance.upgrade()
    assert (instance.used(), instance.rows("18")) == ("18", TRIALS)
    complete = (number, after) in ((2, True), (3, False))
    # only a complete directory is kept, under another name
    aside = [name for name in instance.names() if name not in ("17", "18")]
    assert [bool(re.fullmatch(r"18\.\w+Z", name)) for name in aside] == [True] * complete


@pytest.mark.parametrize("beats", [0, 1, 3, 6, 10])
def test_lease_that_is_lost_ends_it_at_once(beats, instance):
    seen = []

    def alive():
        seen.append(1)
        if len(seen) > beats:
            raise Lost

    with pytest.raises(Lost):
        instance.upgrade(alive=alive)

    assert (instance.used(), instance.rows("17"), len(seen)) == ("17", TRIALS, beats + 1)


def test_way_back_is_the_kept_directory(instance):
    instance.upgrade()

    done = instance.upgrade(17)

    assert (done["way"], done["kept"]) == ("kept", str(instance.root / "data" / "18"))
    assert (instance.used(), instance.names()) == ("17", ["17", "18"])

    instance.upgrade()
    assert instance.used() == "18" and len(instance.names()) == 3  # including the directories left by the first attempt


def test_way_back_to_an_earlier_state_must_be_asked_for(instance):
    instance.upgrade()
    later = TRIALS.replace('3, "77"', '4, "78"')
    (instance.root / "data" / "18" / "rows").write_text(later)

    with pytest.raises(Failed, match="^upgrade_back: .*studies: public.trials has 3 rows, not 4.* remain in .*18$"):
        instance.upgrade(17)
    assert instance.used() == "18"

    instance.upgrade(17, back=True)
    assert (instance.used(), instance.rows("17"), instance.rows("18")) == ("17", TRIALS, later)


@pytest.mark.parametrize("before, later", [(None, 0), (2, 3), (2, None)])
def test_storage_proxy_that_ran_meanwhile_is_no_later_state(instance, before, later):
    def noted(rows):
        return TRIALS + (f'["table", "hpc_db.requests", {rows}, "{rows}"]\n' if rows is not None else "")

    instance.upgrade()
    (instance.root / "data" / "17" / "rows").write_text(noted(before))
    (instance.root / "data" / "18" / "rows").write_text(noted(later))

    instance.upgrade(17)

    assert instance.used() == "17"


def test_run_that_came_late_moves_nothing(instance):
    instance.upgrade()
    instance.write("settings-18.json", 18)

    with pytest.raises(Failed, match="another run has already moved the studies to PostgreSQL 18"):
        instance.run()
    assert (instance.used(), instance.names(), os.listdir(instance.root / "host")) == (
        "18", ["17", "18"], ["settings.json"]
    )


def test_settings_to_go_over_to_are_needed(instance):
    with pytest.raises(Failed, match="settings-18.json contains no data directory; run the playbook upgrade.yml"):
        instance.run()


def test_server_of_a_pg_upgrade_that_was_killed_is_ended(instance):
    shutil.copy("/bin/sleep", instance.root / "postgres")
    instance.make("18.copy", 17)
    with subprocess.Popen([instance.root / "postgres", "60"], cwd=instance.root / "data" / "18.copy") as orphan:
        while not os.path.samefile(f"/proc/{orphan.pid}/exe", instance.root / "postgres"):
            time.sleep(0.01)
        (instance.root / "data" / "18.copy" / "postmaster.pid").write_text(f"{orphan.pid}\n")

        instance.upgrade()

        assert orphan.wait(5) == -signal.SIGKILL
    assert (instance.used(), instance.names()) == ("18", ["17", "18"])


def test_program_that_hangs_is_ended_with_us(instance):
    instance.program(18, "pg_upgrade", f"echo $$ > {instance.root}/pid; exec sleep 60")

    def alive():
        if (instance.root / "pid").exists() and (instance.root / "pid").read_text():
            raise Interrupted

    with pytest.raises(Interrupted):
        instance.upgrade(alive=alive)

    with pytest.raises(ProcessLookupError):
        os.kill(int((instance.root / "pid").read_text()), 0)
    assert instance.is_as_before()


def test_copy_is_the_same_and_private(tmp_path):
    source = tmp_path / "source"
    (source / "base" / "1").mkdir(parents=True)
    (source / "base" / "1" / "2").write_bytes(b"x" * 3_000_000)
    beats = []
    umask = os.umask(0o077)
    try:
        copy_tree(str(source), str(tmp_path / "target"), lambda: beats.append(1))
    finally:
        os.umask(umask)

    assert (tmp_path / "target" / "base" / "1" / "2").read_bytes() == b"x" * 3_000_000
    assert (tmp_path / "target" / "base").stat().st_mode & 0o777 == 0o700 and beats
    (source / "pg_wal").symlink_to("/elsewhere")
    with pytest.raises(Rejected, match="source/pg_wal is a symbolic link"):
        copy_tree(str(source), str(tmp_path / "second"), lambda: None)


@pytest.mark.parametrize("stdout, stderr, message", [
    ("Checking for contrib/isn                    fatal\n\nYour installation contains\n\"contrib/isn\" functions.\n"
     "Failure, exiting\n", "", "x: Your installation contains \"contrib/isn\" functions. Failure, exiting"),
    ("", "psql: note\npsql:<stdin>:3: ERROR:  no table\nLINE 1\n", "x: psql:<stdin>:3: ERROR:  no table"),
    ("", "x: error: no\n", "x: x: error: no"),
    ("", "a\nb\nc\nd\n", "x: b c d"),
    ("", "", "x: no error message"),
])
def test_failed_program_tells_in_one_line(stdout, stderr, message):
    assert " ".join(str(Told("x", stdout, stderr)).split()) == " ".join(message.split())


def test_differences_are_told_in_short():
    def contents(**tables):
        return {"a": {"tables": tables, "studies": []}, "b": {"tables": {}, "studies": []}}

    before, after = contents(one=[1, "1"], two=[2, "2"], three=[3, "3"], four=[4, "4"]), contents(one=[1, "1"])
    del after["b"]

    assert differences(before, before) == []
    lost = differences(before, after)
    assert lost == [
        "b is missing", "a: four has 0 rows, not 4", "a: three has 0 rows, not 3", "a: two has 0 rows, not 2"
    ]
    assert in_short(lost).endswith("a: three has 0 rows, not 3 and 1 more")
    assert differences(contents(), contents(new=[1, "1"])) == ["a: new has 1 rows, not 0"]
