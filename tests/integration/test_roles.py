# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles, their privileges and their passwords in a real PostgreSQL, over the network."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules import optuna_import, reading_role, role_passwords
from hpc_db_host import upgrade

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
# PostgreSQL refuses to run as root.
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
ROLES = ["alice", "study", "reader"]
# The calls with which role_passwords changes files and the server.
EFFECTS = {"open", "unlink", "flush", "fsync", "rename", "execute"}


class Server:
    """A server on 127.0.0.1 that requires a password of everyone."""

    def __init__(self, folder: Path, bindir: Path) -> None:
        self.folder, self.bindir, self.passfile = folder, bindir, str(folder / "pgpass")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "first").write_text("first\n")
        shutil.chown(folder, OWNER.pw_uid, OWNER.pw_gid)
        self.run("initdb", "--auth=scram-sha-256", "--username=alice", f"--pwfile={folder}/first", "--no-sync")
        role_passwords.write_passwords(self.passfile, {"alice": "first"})
        self.configure(max_connections=20)
        self.run("pg_ctl", "start", "--wait", f"--log={folder}/log")

    def configure(self, **settings: object) -> None:
        own = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        with open(self.folder / "data" / "postgresql.conf", "a") as stream:
            stream.writelines(f"{name} = '{value}'\n" for name, value in {**own, **settings}.items())

    def run(self, program: str, *options: str) -> None:
        subprocess.run(
            [str(self.bindir / program), "-D", str(self.folder / "data"), *options], check=True, cwd="/", timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **AS_OWNER,
        )

    def where(self, user: str = "alice") -> dict:
        """Return libpq's parameters."""
        return {"host": "127.0.0.1", "port": self.port, "user": user, "passfile": self.passfile}

    def connect(self, user: str, database: str = "postgres", **given: Any) -> Any:
        import psycopg2

        connection = psycopg2.connect(**{**self.where(user), "dbname": database, "connect_timeout": 30, **given})
        connection.autocommit = True
        return connection

    def ask(self, statement: str, user: str = "alice", database: str = "postgres") -> list[tuple]:
        """Query as a hostile user, who knows that a role may change most of its own settings."""
        connection = self.connect(user, database, options="-c default_transaction_read_only=off")
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


@pytest.fixture(scope="module")
def psycopg2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The driver of the modules."""
    folder = tmp_path_factory.mktemp("psycopg2")
    (wheel,) = (ROOT / ".cache" / "wheels").glob("psycopg2_binary-*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def server(bindir: Path, psycopg2: None) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="roles-"))
    folder.chmod(0o755)
    server = Server(folder, bindir)
    try:
        for role in ("study", "reader"):
            server.ask(f"CREATE ROLE {role} LOGIN")
        server.ask("CREATE DATABASE mala OWNER study")
        yield server
    finally:
        server.run("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(folder)


def passwords_of(server: Server, rotate: bool, check_mode: bool = False) -> dict:
    params = {**server.where(), "tls": False, "database": "postgres", "roles": ROLES, "rotate": rotate}
    return role_passwords.ensure_passwords(params, check_mode)


def rotate_until(server: Server, step: int) -> bool:
    """Rotate in a child that is killed before or after its ``step``-th change. Return False if it ended by itself."""
    child = os.fork()
    if child == 0:
        done = 0

        def count(frame: FrameType, event: str, called: Any) -> None:
            nonlocal done
            if frame.f_code.co_filename == role_passwords.__file__ and event in ("c_call", "c_return"):
                done += called.__name__ in EFFECTS
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            passwords_of(server, rotate=True)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def users_who_get_in(server: Server) -> list[str]:
    """Log in over the network with the password file; return the roles that succeed."""
    return [server.ask("SELECT current_user", role)[0][0] for role in ROLES]


def test_rotation_that_is_killed_anywhere_is_mended_over_the_network(server: Server) -> None:
    passwords_of(server, rotate=False)
    worker = server.connect("study")
    step, moments = 1, set()
    while rotate_until(server, step):
        then_rotate = step // 2 % 2 == 1  # otherwise hpc_db.yml runs next
        dry = passwords_of(server, then_rotate, check_mode=True)
        moments.add((Path(server.passfile + ".new").exists(), dry["passfile"] == server.passfile))

        passwords_of(server, then_rotate)

        assert users_who_get_in(server) == ROLES
        assert sorted(path.name for path in server.folder.glob("pgpass*")) == ["pgpass"]
        assert not passwords_of(server, rotate=False)["changed"]
        step += 1

    # before the new file exists, between that and the server's answer, after the answer, and at the end
    assert moments == {(False, True), (True, True), (True, False)}
    cursor = worker.cursor()
    cursor.execute("SELECT current_user")
    assert cursor.fetchone() == ("study",)


def test_refused_password_leaves_those_that_work(server: Server) -> None:
    passwords_of(server, rotate=False)
    roles = {"roles": ["study", "nobody_there"], "rotate": True}
    params = {**server.where(), "tls": False, "database": "postgres", **roles}

    with pytest.raises(_connection.Unreachable, match='role "nobody_there" does not exist'):
        role_passwords.ensure_passwords(params, False)

    assert users_who_get_in(server) == ROLES


# With these, a role with read access could fill the disk, or take resources that all sessions share.
HARMFUL = [
    "SELECT lo_from_bytea(0, 'mine')", "SELECT lo_create(0)", "SELECT lo_creat(-1)", "SELECT lo_put(1, 0, 'mine')",
    "SELECT lo_open(1, 131072)", "SELECT lowrite(0, 'mine')", "SELECT lo_unlink(1)", "SELECT lo_truncate(0, 0)",
    "SELECT lo_truncate64(0, 0)", "SELECT lo_import('/etc/hostname')", "SELECT lo_export(1, '/tmp/planted')",
    "SELECT pg_advisory_lock(1)", "SELECT pg_advisory_lock(1, 1)", "SELECT pg_advisory_lock_shared(1)",
    "SELECT pg_try_advisory_lock(n) FROM generate_series(1, 9) n", "SELECT pg_advisory_xact_lock(1)",
    "SELECT pg_advisory_xact_lock_shared(1)", "SELECT pg_try_advisory_xact_lock(1)",
    "SELECT pg_try_advisory_lock_shared(1, 1)", "SELECT pg_try_advisory_xact_lock_shared(1)",
    "SELECT pg_logical_emit_message(false, '', 'mine')", "SELECT pg_export_snapshot()", "SELECT txid_current()",
    "SELECT pg_current_xact_id()", "DO $$ BEGIN PERFORM pg_advisory_lock(1); END $$",
]


@pytest.fixture(scope="module")
def reader(server: Server) -> dict:
    """The read-only role of the database mala, as the playbook leaves it."""
    passwords_of(server, rotate=False)
    reader = {"role": "reader", "writer": "study", "databases": ["mala"]}
    params = {**server.where(), "tls": False, **reader}
    planned = reading_role.ensure_reader(params, check_mode=True)
    done = reading_role.ensure_reader(params, check_mode=False)
    again = reading_role.ensure_reader(params, check_mode=False)
    assert planned["statements"] == done["statements"] != [] == again["statements"]
    return params


def refusal(server: Server, statement: str, user: str = "reader", database: str = "mala") -> str:
    try:
        server.ask(statement, user, database)
    except Exception as error:  # psycopg2's error, which cannot be imported at the top of this file
        return " ".join(str(error).split())
    return "ALLOWED"


@pytest.mark.parametrize("statement", HARMFUL)
def test_reader_takes_nothing_that_all_share(statement: str, server: Server, reader: dict) -> None:
    assert "permission denied for function" in refusal(server, statement)


@pytest.mark.usefixtures("reader")
def test_study_role_keeps_what_it_had(server: Server) -> None:
    assert server.ask(optuna_import.LOCK, "study", "mala") == [(True,)]
    assert server.ask("SELECT lo_unlink(lo_from_bytea(0, 'mine')), txid_current() > 0", "study", "mala") == [(1, True)]
    assert "permission denied" in refusal(server, "SELECT lo_import('/etc/hostname')", "study")


@pytest.mark.usefixtures("reader")
def test_reader_cannot_lift_the_limits_that_hold(server: Server) -> None:
    sort = "SELECT count(*) FROM (SELECT repeat(n::text, 50) FROM generate_series(1, 3000000) n ORDER BY 1 OFFSET 0) x"
    log = server.folder / "log"
    before = log.stat().st_size

    for name in ("temp_file_limit", "log_min_messages", "log_min_error_statement"):
        assert "permission denied to set parameter" in refusal(server, f"SET {name} = '1'")
        assert "permission denied to set parameter" in refusal(server, f"ALTER ROLE reader SET {name} = '1'")
    assert "temporary file size exceeds" in refusal(server, f"SET statement_timeout = 0; {sort}")
    assert "invalid input syntax" in refusal(server, f"SELECT '{'x' * 1000000}'::int")
    assert "no" in refusal(server, "DO $$ BEGIN RAISE LOG '%', repeat('x', 1000000); RAISE 'no'; END $$")

    assert log.stat().st_size - before < 100000
    opened = []
    with pytest.raises(Exception, match="too many connections for role"):
        for _number in range(11):
            opened.append(server.connect("reader", "mala"))
    for connection in opened:
        connection.close()
    assert len(opened) == 10


def test_what_a_thief_has_changed_for_the_reader_is_changed_back(server: Server, reader: dict) -> None:
    for change in ("SET default_transaction_read_only = off", "SET search_path = nowhere", "SET statement_timeout = 0",
                   "IN DATABASE mala SET work_mem = '1GB'", "PASSWORD 'mine'"):
        server.ask(f"ALTER ROLE reader {change}", "reader", "mala")

    assert reading_role.ensure_reader(reader, check_mode=False)["changed"]
    assert passwords_of(server, rotate=False)["changed_roles"] == ["reader"]

    found = server.ask("SELECT setdatabase, setconfig FROM pg_db_role_setting WHERE setrole = 'reader'::regrole")
    assert [(database, sorted(settings)) for database, settings in found] == [
        (0, sorted(f"{name}={value}" for name, value in reading_role.SETTINGS.items()))
    ]
    assert not reading_role.ensure_reader(reader, check_mode=False)["changed"]


def test_functions_bring_no_rights_into_another_major(server: Server, reader: dict) -> None:
    def schema() -> str:
        environment = {"PGPASSFILE": server.passfile}
        command = [str(server.bindir / "pg_dump"), "--schema-only", "--host=127.0.0.1", f"--port={server.port}",
                   "--username=alice", "mala"]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "pg_catalog.pg_logical_emit_message" in schema()
    select = upgrade.FUNCTIONS.replace("\\gexec", "")
    for statements in server.ask(select, database="mala"):
        for statement in statements:
            server.ask(statement, database="mala") if statement else None

    assert "FUNCTION pg_catalog." not in schema()
    assert reading_role.ensure_reader(reader, check_mode=False)["changed"]
    assert "permission denied" in refusal(server, HARMFUL[0])


def log_in_halfway(server: Server, packet: bytes) -> socket.socket:
    """Connect without a password, and send nothing but this packet."""
    stranger = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    if packet:
        stranger.sendall(packet)
        stranger.recv(1024)  # the server's request for authentication, or its refusal
    return stranger


def startup_packet(user: str, database: str) -> bytes:
    body = struct.pack("!i", 3 << 16) + f"user\0{user}\0database\0{database}\0\0".encode()
    return struct.pack("!i", len(body) + 4) + body


def wait_until_in(server: Server, user: str) -> None:
    """Wait like a client with a password, which retries until it is let in."""
    limit = time.monotonic() + 90
    while re.search("too many clients|connection slots", said := refusal(server, "SELECT 1", user)):
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert said == "ALLOWED"


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("packet, strangers", [
    pytest.param(b"", 100, id="silent"), pytest.param(startup_packet("study", "mala"), 25, id="named"),
])
def test_logins_that_never_end_are_thrown_out(packet: bytes, strangers: int, server: Server) -> None:
    template = (ROOT / "roles/postgres/templates/postgresql.conf.j2").read_text()
    (bound,) = re.findall(r"^authentication_timeout = '(\d+)s'$", template, re.MULTILINE) or ["60"]
    server.configure(authentication_timeout=f"{bound}s")
    server.run("pg_ctl", "restart", "--wait", f"--log={server.folder}/log")

    opened = [log_in_halfway(server, packet) for _number in range(strangers)]
    began = time.monotonic()
    assert "too many clients" in refusal(server, "SELECT 1", "alice")  # although connections are reserved for that role
    for user in ("study", "alice"):
        wait_until_in(server, user)
    waited = time.monotonic() - began
    for stranger in opened:
        with contextlib.suppress(ConnectionResetError), stranger:
            while stranger.recv(1024):
                pass

    assert waited < 15
    assert time.monotonic() - began < 15
