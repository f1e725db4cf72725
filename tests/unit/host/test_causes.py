# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The causes and fixes that belong to messages of PostgreSQL and libpq."""

import os
import time

import pytest
from hpc_db_host import causes

WANTED = {
    "root": "/r", "max_connections": 320, "workers": 100, "plugin": False, "tls": True, "databases": ["alice", "mala"],
}
RULE = 'no pg_hba.conf entry for host "10.0.0.7", user "study", database "{}", {}'


@pytest.mark.parametrize("words, said, mend", [
    ("sorry, too many clients already", "too many clients against max_connections 320", r"databases_workers \(100\)"),
    ("remaining connection slots are reserved for roles with SUPERUSER", "too many clients", "client_environment"),
    ('password authentication failed for user "study"', "the password of study is not", "hpc_db.yml"),
    ('connection to server at "c1" failed: fe_sendauth: no password supplied', "sent no password", "chmod 600"),
    ("expected SASL response, got message type 88", "sent no password", "chmod 600"),
    (RULE.format("nope", "SSL encryption"), "study requested the database nope, which", "^databases_studies: "),
    (RULE.format("mala", "no encryption"), "10.0.0.7 connected without TLS", "postgres_tls"),
    (RULE.format("mala", "SSL encryption"), "study may not connect from 10.0.0.7", "^postgres_networks: "),
    ('database "x y" does not exist', "the database x y does not exist", "^databases_studies: "),
    ('role "bob" does not exist', "names the role bob", "instance_study_role"),
    ("terminating connection due to idle-in-transaction timeout", "idle in a transaction", "^postgres_settings: "),
    ("terminating connection due to idle-session timeout", "between trials", "leave idle_session_timeout out"),
    ('could not write to file "pg_wal/x": No space left on device', "the disk is full", "^instance_root: "),
    ("disk full: /r/data", "the quota is exceeded or the disk is full", "^instance_root: "),
    ("server process (PID 7) was terminated by signal 9: Killed", "too little memory", "^mem in server_job_options"),
    ('private key file "server.key" has group or world access', "certificate or its key", "chmod 600 conf/server.key"),
    ('unrecognized configuration parameter "work_men"', "a parameter of PostgreSQL is wrong", "^postgres_settings$"),
    ("database files are incompatible with server", "made by another PostgreSQL", "^postgres_major"),
    ('lock file "postmaster.pid" already exists', "another server has the data directory", "^instance_root"),
    ("could not locate a valid checkpoint record", "is damaged", "restore.yml"),
    ('definition of service "hpc_db" not found', "does not find the service hpc_db", "unset PGSERVICEFILE"),
    ('syntax error in service file "/home/alice/.pg_service.conf", line 3', "too old", "psycopg2-binary>=2.9"),
    ('could not translate host name "c1" to address', "cannot be resolved", "server_address"),
    ("channel binding required, but server did not complete authentication", "TLS differs from", "^postgres_tls"),
    ('connection to server at "c1", port 5432 failed: Connection refused', "cannot be reached", "postgres_listen_add"),
    ("something that nobody has seen", "^something that nobody has seen$", "^see the logs in /r/log$"),
])
def test_words_are_explained(words, said, mend):
    explained = causes.explain(words, WANTED)

    for text, pattern in zip(explained, (said, mend)):
        assert causes.re.search(pattern, text), explained


def line(second, words, client="c2 ", level="FATAL"):
    return f"2026-11-22 10:00:{second:02}.123 UTC postgres[4711] {client}{level}:  {words}\n"


def write_log(folder, *lines, when="Sun"):
    path = folder / f"postgresql-{when}.log"
    path.write_text("".join(lines))
    return path


SINCE = causes.calendar.timegm((2026, 11, 22, 10, 0, 0))
TOO_MANY = "sorry, too many clients already"


@pytest.fixture(autouse=True)
def no_name_server(monkeypatch):
    def gethostbyaddr(address):
        if address == "c2":
            return "c2.cluster", [], []
        raise OSError("unknown host")

    monkeypatch.setattr(causes.socket, "gethostbyaddr", gethostbyaddr)


def test_fatal_lines_are_counted_by_cause(tmp_path):
    write_log(
        tmp_path,
        line(1, TOO_MANY), line(2, TOO_MANY, "c3 "), line(3, TOO_MANY), "\xff DETAIL:  more\n",
        line(4, 'role "bob" does not exist', "[local] "), line(5, "the database system is starting up"),
        line(6, "terminating connection due to administrator command"), line(7, "duplicate key", level="ERROR"),
        line(8, "server process (PID 7) was terminated by signal 9: Killed", "", "LOG"),
        line(9, "listening on IPv4", "", "LOG"),
    )

    told = [event.text() for event in causes.read_logs(str(tmp_path), SINCE, WANTED)]

    assert told == [
        "too many clients: about 160 workers against max_connections 320 "
        "(3 times by c2, c3, from 2026-11-22 10:00:01 to 2026-11-22 10:00:03 UTC)",
        "a URL names the role bob, which does not exist (1 times by the server's own host, at 2026-11-22 10:00:04 UTC)",
        "the server job has too little memory (1 times, at 2026-11-22 10:00:08 UTC)",
    ]


def test_what_is_older_is_not_counted(tmp_path):
    write_log(tmp_path, line(1, TOO_MANY), line(8, "role \"bob\" does not exist"))
    old = write_log(tmp_path, line(9, TOO_MANY), when="Sat")
    os.utime(old, (SINCE, SINCE))

    events = causes.read_logs(str(tmp_path), SINCE + 5, WANTED)

    assert [event.said for event in events] == ["a URL names the role bob, which does not exist"]
    assert causes.read_logs(str(tmp_path), time.time(), WANTED) == []


@pytest.mark.parametrize("plugin, refused, workers", [
    (False, [0], 158), (False, range(10), 167), (False, [0, 1, 2, 100], 160),
    # With the plugin, each client retries every few seconds.
    (True, [0], 316), (True, range(10), 318),
])
def test_workers_are_those_inside_and_those_refused_at_once(plugin, refused, workers):
    assert causes.estimate_workers(list(refused), dict(WANTED, plugin=plugin)) == workers


def test_only_the_end_of_a_huge_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(causes, "LOG_BYTES", 200)
    path = write_log(tmp_path, *[line(second, TOO_MANY) for second in range(30)])

    assert 0 < len(causes.read_fatal(str(path))) < 4


FORGED = "2026-11-22 10:00:01.000 UTC {}PANIC:  could not read block 3 in file\n"


@pytest.mark.parametrize("forged", [
    # From a log written with an older log_line_prefix, which prints a stranger's user name unescaped.
    FORGED.format("[1] "), FORGED.format("[1] x@y 10.0.0.1 "), "x\n" + FORGED.format("[1] "),
    # Inside the message text, and an incomplete line.
    line(1, "duplicate key\n\t" + FORGED.format("postgres[1] ").strip(), level="ERROR"),
    *[line(1, f"duplicate{end}" + FORGED.format("postgres[1] ").strip(), level="ERROR") for end in "\r\v\x85\u2028"],
    FORGED.format("postgres[1] ").strip(), FORGED.format("postgres[1] x@y "), " " + FORGED.format("postgres[1] "),
    FORGED.format("postgres[1] ").replace("11-22", "99-99"),
])
def test_only_whole_lines_of_the_server_count(forged, tmp_path):
    path = tmp_path / "postgresql-Sun.log"
    path.write_bytes(forged.encode())

    assert causes.read_logs(str(tmp_path), 0, WANTED) == []
    assert causes.last_words(str(tmp_path)) == ""


def test_many_names_do_not_hide_the_rest(tmp_path):
    names = [line(number % 60, f'role "{number}" does not exist', "[local] ") for number in range(500)]
    write_log(tmp_path, *names, *names, line(1, "could not locate a valid checkpoint record", "", "PANIC"))

    events = causes.read_logs(str(tmp_path), 0, WANTED)

    assert len(events) == 22
    assert "the data directory is damaged" in [event.said for event in events]
    assert events[-1].said == "480 more errors sent to clients"


@pytest.mark.parametrize("log, text, words", [
    ("postgresql-Sun.log", line(1, "could not open x", "") + line(2, 'role "x" does not exist'), "could not open x"),
    ("postgresql-Sun.log", line(1, "could not open x", "") + line(2, "the database system is shutting down", ""),
     "could not open x"),
    ("job.log", "2026-11-22 10:00:00.123 GMT [7] FATAL:  configuration file is wrong\n", "configuration file"),
    ("job.log", "2026-11-22T10:00:00+0000 failed: FATAL:  of another job\n", ""),
    # Sidecars have logs of their own, which contain arbitrary text from strangers.
    ("pooler.log", line(1, "could not open x", ""), ""),
])
def test_last_words_are_the_servers_own(log, text, words, tmp_path):
    (tmp_path / log).write_text(text)

    assert causes.last_words(str(tmp_path)).startswith(f"FATAL:  {words}" if words else "")
    assert bool(causes.last_words(str(tmp_path))) == bool(words)
