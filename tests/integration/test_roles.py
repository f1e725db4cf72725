# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles, their rights and their passwords in a real PostgreSQL, over the network."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.modules import role_passwords

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
# PostgreSQL refuses to run as root.
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
ROLES = ["alice", "study", "reader"]
# By which role_passwords changes files and the server.
EFFECTS = {"open", "unlink", "flush", "fsync", "rename", "execute"}


class Server:
    """A server on 127.0.0.1 that lets nobody in without a password."""

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
        return {"host": "127.0.0.1", "port": self.port, "user": user, "passfile": self.passfile}

    def connect(self, user: str, database: str = "postgres", **given: Any) -> Any:
        import psycopg2

        connection = psycopg2.connect(**{**self.where(user), "dbname": database, "connect_timeout": 30, **given})
        connection.autocommit = True
        return connection

    def ask(self, statement: str, user: str = "alice", database: str = "postgres") -> list[tuple]:
        connection = self.connect(user, database)
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


@pytest.fixture(scope="module")
def psycopg2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The modules' driver."""
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
    params = {**server.where(), "database": "postgres", "roles": ROLES, "rotate": rotate}
    return role_passwords.ensure_passwords(params, check_mode)


def rotate_until(server: Server, step: int) -> bool:
    """Rotate in a process that is killed before or after what it does to a file or the server. False: it ended."""
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
    """Return who logs in over the network with the password file."""
    return [server.ask("SELECT current_user", role)[0][0] for role in ROLES]


def test_rotation_that_is_killed_anywhere_is_mended_over_the_network(server: Server) -> None:
    passwords_of(server, rotate=False)
    worker = server.connect("study")
    step, moments = 1, set()
    while rotate_until(server, step):
        then_rotate = step // 2 % 2 == 1  # else it is hpc_db.yml that comes next
        dry = passwords_of(server, then_rotate, check_mode=True)
        moments.add((Path(server.passfile + ".new").exists(), dry["passfile"] == server.passfile))

        passwords_of(server, then_rotate)

        assert users_who_get_in(server) == ROLES
        assert sorted(path.name for path in server.folder.glob("pgpass*")) == ["pgpass"]
        assert not passwords_of(server, rotate=False)["changed"]
        step += 1

    # before the new file, between it and the server's word, after that, and at the end
    assert moments == {(False, True), (True, True), (True, False)}
    cursor = worker.cursor()
    cursor.execute("SELECT current_user")
    assert cursor.fetchone() == ("study",)


def test_refused_password_leaves_those_that_work(server: Server) -> None:
    passwords_of(server, rotate=False)
    params = {**server.where(), "database": "postgres", "roles": ["study", "nobody_there"], "rotate": True}

    with pytest.raises(_connection.Unreachable, match='role "nobody_there" does not exist'):
        role_passwords.ensure_passwords(params, False)

    assert users_who_get_in(server) == ROLES
