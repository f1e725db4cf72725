# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""postgres as a child process, played by real processes that behave like it; tests/integration has the real one."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from hpc_db_host import postgres as module
from hpc_db_host.postgres import PROGRAMS, Failed, Postgres, check_programs, free_port

# Records its environment and arguments, then runs until told to stop; "deaf" lists the signals that it ignores.
PROGRAM = f"""#!{sys.executable}
import json, os, signal, sys, time
deaf = {{deaf!r}}
if deaf == "dead":
    sys.exit(1)
def end(number, _frame):
    with open({{aside!r}} + ".end", "w") as stream:
        stream.write(signal.Signals(number).name)
    os._exit(0)  # as postgres does after either of them
signal.signal(signal.SIGINT, signal.SIG_IGN if deaf == "SIGINT" else end)
signal.signal(signal.SIGQUIT, end)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
seen = {{{{"argv": sys.argv[1:], "environment": dict(os.environ), "parent": os.getppid()}}}}
with open({{aside!r}} + ".new", "w") as stream:
    json.dump(seen, stream)
os.rename({{aside!r}} + ".new", {{aside!r}})
time.sleep(60)
"""


@pytest.fixture
def make(tmp_path, short_folder):
    (tmp_path / "bin").mkdir()
    (tmp_path / "data").mkdir()
    made = []

    def make(deaf="", psql="exit 0", listen=True, beat=lambda: None, **settings):
        programs = {
            "postgres": PROGRAM.format(deaf=deaf, aside=str(tmp_path / "called.json")),
            "psql": f"#!/bin/sh\n{psql}\n",
        }
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        given = {
            "root": str(tmp_path), "bindir": str(tmp_path / "bin"), "data": str(tmp_path / "data"), "port": "5432",
            "instance": "hpc_db",
            "config": str(tmp_path / "postgresql.conf"), "socket_parent": short_folder, **settings,
        }
        keeper = types.SimpleNamespace(check=lambda: None, renew=beat, lost="")
        made.append(Postgres(given, listen, keeper, {"shared_buffers": "32MB"}))
        return made[-1]

    yield make
    for each in made:
        each.stop(0)


def called(tmp_path):
    limit = time.monotonic() + 10
    while not (tmp_path / "called.json").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    return json.loads((tmp_path / "called.json").read_text())


def ended_by(tmp_path):
    return (tmp_path / "called.json.end").read_text()


@pytest.mark.parametrize("listen, addresses", [(True, []), (False, ["listen_addresses="])])
def test_parameters_reach_postgres(listen, addresses, make, tmp_path):
    postgres = make(listen=listen)
    postgres.start()

    argv = called(tmp_path)["argv"]

    assert argv[::2] == ["-c"] * (len(argv) // 2)
    assert argv[1::2] == [
        f"config_file={tmp_path}/postgresql.conf", *addresses, f"port={postgres.port}", "shared_buffers=32MB",
        f"unix_socket_directories={postgres.socket}",
    ]
    assert os.stat(postgres.socket).st_mode & 0o777 == 0o700


def test_settings_of_workers_do_not_reach_postgres_or_psql(make, tmp_path, monkeypatch):
    for name in ("PGHOSTADDR", "PGREQUIREAUTH", "PGSERVICE", "PGTZ", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "192.0.2.1")
    postgres = make(psql="env | grep -E '192.0.2.1' >&2 && exit 1; echo '1|77'")
    postgres.start()

    assert "192.0.2.1" not in called(tmp_path)["environment"].values()
    assert postgres.probe() == ""


def test_programs_speak_english(make, tmp_path, monkeypatch):
    for name in ("LANG", "LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.setenv(name, "de_DE.UTF-8")
    postgres = make(psql='test "$LC_ALL" = C || exit 1; echo "1|77"')
    postgres.start()

    # LC_ALL overrides all other language variables
    assert called(tmp_path)["environment"]["LC_ALL"] == "C"
    assert postgres.probe() == ""


@pytest.mark.parametrize("psql, reason", [
    ("echo; echo '77|77'", ""),
    ("echo; echo '78|77'", "connections exhausted: 77 of 77 are used"),
    ("echo nonsense", "psql printed 'nonsense'"),
    ("echo no; echo 'FATAL:  disk full' >&2; exit 2", "FATAL:  disk full"),
    ("exit 3", "psql ended with 3"),
])
def test_probe_says_why(psql, reason, make):
    assert make(psql=psql).probe() == reason


@pytest.mark.parametrize("deaf, psql, message", [
    ("dead", "exit 1", "ended with exit code 1 while starting: see .*/log"),
    ("", "echo refused >&2; exit 1", "has accepted no write within 0 s: refused"),
])
def test_start_that_fails_says_why(deaf, psql, message, make, tmp_path):
    postgres = make(deaf, psql)
    postgres.start()

    with pytest.raises(Failed, match=message):
        postgres.wait_for_write(0.5)


def test_programs_that_are_being_updated_are_not_started(make, tmp_path):
    postgres = make(bindir=str(tmp_path / "postgresql-17" / "bin"))
    (tmp_path / "postgresql-17.unfinished").touch()

    with pytest.raises(Failed, match="PostgreSQL in .*/postgresql-17 is being installed or updated, or"):
        postgres.start()

    assert not (tmp_path / "called.json").exists()


@pytest.mark.parametrize("deaf, clean", [("", True), ("SIGINT", False)])
def test_stop_is_clean_only_if_fast(deaf, clean, make, tmp_path):
    postgres = make(deaf)
    postgres.start()
    called(tmp_path)

    assert postgres.stop(0.3) is clean
    assert ended_by(tmp_path) == ("SIGINT" if clean else "SIGQUIT")
    assert not os.path.exists(postgres.socket)


def test_postgres_that_was_killed_did_not_stop_cleanly(make, tmp_path):
    postgres = make()
    postgres.start()
    postgres._child.kill()

    assert postgres.stop(5) is False


def test_signal_while_it_starts_finds_the_child(make, monkeypatch):
    class Told(Exception):
        pass

    def tell(_number, _frame):
        raise Told

    def start():
        signal.signal(signal.SIGTERM, tell)
        with pytest.raises(Told):
            postgres.start()
        assert postgres._child is not None
        postgres._child.kill()

    monkeypatch.setattr(module, "_die_with_parent", lambda: os.kill(os.getppid(), signal.SIGTERM))
    postgres = make()
    # A process without this one's threads, which might take the signal.
    alone = multiprocessing.get_context("fork").Process(target=start)
    alone.start()
    alone.join(30)

    assert alone.exitcode == 0


@pytest.mark.parametrize("content, expected", [
    (None, None),
    ("", None),
    ("12", "{own}\n"),
    ("garbage\n", None),
    ("{innocent}\n/data\n1\n5432\n", "{own}\n/data\n1\n5432\n"),
    ("-{innocent}\n/data\n", "{own}\n/data\n"),
])
def test_stale_pid_file_blocks_nothing_and_the_innocent_lives(content, expected, make, tmp_path):
    pid_file = tmp_path / "data" / "postmaster.pid"
    with subprocess.Popen(["sleep", "60"]) as innocent:
        pids = {"own": os.getpid(), "innocent": innocent.pid}
        if content is not None:
            pid_file.write_text(content.format(**pids))

        make().start()

        assert (pid_file.read_text() if pid_file.exists() else None) == (expected and expected.format(**pids))
        assert innocent.poll() is None
        innocent.kill()


def test_orphan_on_the_data_directory_is_stopped_first(make, tmp_path):
    shutil.copy("/bin/sleep", tmp_path / "postgres")
    beats = []
    with subprocess.Popen([tmp_path / "postgres", "60"], cwd=tmp_path / "data") as orphan:
        (tmp_path / "data" / "postmaster.pid").write_text(f"{orphan.pid}\n/data\n")
        make(beat=lambda: beats.append(orphan.poll())).start()

        assert orphan.wait(5) == -signal.SIGKILL
        assert beats == [None, -signal.SIGKILL, -signal.SIGKILL]  # before it, and before and after the PID file


@pytest.mark.parametrize("taken", [False, True])
def test_port_that_is_taken_is_replaced(taken):
    with socket.socket() as other:
        other.bind(("", 0))
        wanted = other.getsockname()[1]
        if taken:
            other.listen()
        else:
            other.close()

        assert (free_port(wanted) != wanted) is taken


def test_socket_folder_in_nothing_is_refused(make, short_folder):
    with pytest.raises(Failed, match="^server_socket_parent: .*/nothing: No such file or directory$"):
        make(socket_parent=f"{short_folder}/nothing")


def test_socket_folder_that_is_too_long_is_refused_and_left_empty(make, tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()

    with pytest.raises(Failed, match="server_socket_parent: .* is too long; a socket's path leaves 69 bytes for it"):
        make(socket_parent=str(folder))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("program, text, says", [
    ("psql", None, "psql does not run on {host}: .*No such file or directory.*"),
    ("postgres", "#!/nowhere/sh\n", "postgres does not run on {host}: .*"),
    ("pg_dump", "#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.99'\nnot found\" >&2; exit 1\n",
     "pg_dump does not run on {host}: libc.so.6: version 'GLIBC_2.99' not found"),
    ("pg_restore", "#!/bin/sh\nexit 3\n", "pg_restore does not run on {host}: exit code 3"),
    ("postgres", "#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n",
     "/.*/bin/postgres on {host} is postgres .PostgreSQL. 18.6, but /.*/data was made by PostgreSQL 17"),
    ("psql", "#!/bin/sh\necho nothing\n", "/.*/bin/psql on {host} is nothing, but .*"),
])
def test_programs_that_do_not_run_on_this_node_are_named(program, text, says, tmp_path):
    for folder in ("bin", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("17\n")
    for name in PROGRAMS:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) 17.10'\n")
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {"bindir": str(tmp_path / "bin"), "data": str(tmp_path / "data")}
    check_programs(settings)

    (tmp_path / "bin" / program).unlink()
    if text is not None:
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)

    with pytest.raises(Failed, match="^" + says.format(host=socket.gethostname()) + "$"):
        check_programs(settings)
