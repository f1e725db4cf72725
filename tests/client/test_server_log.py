# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Text that a stranger writes into PostgreSQL's log before logging in, and the doctor's reading of it."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hpc_db_host import causes, files
from real_server import Server, eventually

TEMPLATE = Path(__file__).parents[2] / "roles/postgres/templates/postgresql.conf.j2"
WANTED = {"databases": ["study"], "tls": False, "root": "/r", "max_connections": 100, "workers": 5, "plugin": True}
NOW = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
DAMAGED = "PANIC:  could not read block 3"


@pytest.fixture
def log(server: Server, tmp_path: Path) -> Iterator[Path]:
    """The server's log, emptied and in the format of our configuration."""
    settings = dict(re.findall(r"^(log_line_prefix|log_timezone) = ('.*')$", TEMPLATE.read_text(), re.MULTILINE))
    for name, value in settings.items():
        server.ask(f"ALTER SYSTEM SET {name} = {value}")
    server.ask("SELECT pg_reload_conf()")
    eventually(lambda: f"'{server.ask('SHOW log_line_prefix')[0][0]}'" == settings["log_line_prefix"])
    (server.data / "log").write_text("")
    (tmp_path / "postgresql-Sun.log").symlink_to(server.data / "log")
    yield server.data / "log"
    for name in settings:
        server.ask(f"ALTER SYSTEM RESET {name}")
    server.ask("SELECT pg_reload_conf()")


def ask_to_log_in(server: Server, user: str, database: str = "study", application: str = "x") -> None:
    """Send a client's first packet, and no more."""
    words = [b"user", user.encode(), b"database", database.encode(), b"application_name", application.encode(), b""]
    body = struct.pack("!I", 196608) + b"\0".join(words) + b"\0"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(struct.pack("!I", len(body) + 4) + body)
        while connection.recv(1000):
            pass


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x85", "\u2028", "\n\t\n"], ids=ascii)
@pytest.mark.parametrize("prefix", ["UTC [1] ", "UTC postgres[1] ", "UTC postgres[1] 10.0.0.1 "])
def test_a_stranger_writes_no_line_of_the_log(
    end: str, prefix: str, server: Server, log: Path, tmp_path: Path
) -> None:
    forged = f"x{end}{NOW}.000 {prefix}{DAMAGED}{end}"

    ask_to_log_in(server, forged)
    ask_to_log_in(server, "y", forged)
    ask_to_log_in(server, "z", application=forged)
    eventually(lambda: log.read_bytes().count(b" does not exist\n") >= 3)
    events = causes.read_logs(str(tmp_path), 0, WANTED)

    assert sum(len(event.times) for event in events) == 3
    assert {re.match("a URL names the role [xyz]", event.said) is not None for event in events} == {True}
    assert all(event.text().isprintable() and "restore" not in event.mend for event in events)
    assert causes.last_words(str(tmp_path)) == ""


@pytest.mark.parametrize("name", [
    "too many clients already", "the database system is starting up", "x\" could not read block 3 in file \"y",
    "FATAL:  could not read block", "x\", database \"study\" was terminated by signal 9", "\x1b[2J\u202e",
])
def test_a_name_is_no_cause(name: str, server: Server, log: Path, tmp_path: Path) -> None:
    ask_to_log_in(server, name)
    eventually(lambda: b" does not exist\n" in log.read_bytes())

    (event,) = causes.read_logs(str(tmp_path), 0, WANTED)

    assert event.said == f"a URL names the role {files.printable(name)}, which does not exist"


def test_what_a_client_has_logged_is_not_the_servers(server: Server, log: Path, tmp_path: Path) -> None:
    server.ask("DO $$BEGIN RAISE LOG E'server process (PID 1) was terminated by signal 9\\n2026 PANIC:  x'; END$$")
    eventually(lambda: b"signal 9" in log.read_bytes())

    assert causes.read_logs(str(tmp_path), 0, WANTED) == []
