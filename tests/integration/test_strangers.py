# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rogue server on our port: every program that connects gives nothing away, and fails soon."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._plan import service_entries
from target import ROOT

SECRET = "a-password-of-256-bits"
NOBODY = pwd.getpwnam("nobody")
OWNER = pwd.getpwuid(os.geteuid()).pw_name  # the owner's role has the same name
ROGUE = ROOT / "tests" / "resilience" / "rogue.py"
WHEELS = """
psycopg2_binary sqlalchemy optuna alembic colorlog mako markupsafe numpy packaging pyyaml tqdm typing_extensions
"""
MODULE = """
import importlib, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.argv[2].encode(), "legacy"
importlib.import_module("ansible_collections." + sys.argv[1]).main()
"""
PLAIN_PSYCOPG2 = "import psycopg2, sys; psycopg2.connect(sys.argv[1])"
PLAIN_SQLALCHEMY = "import sqlalchemy, sys; sqlalchemy.create_engine(sys.argv[1]).connect()"


class Place(NamedTuple):
    """The server that a program is led to, and the files it needs for that."""

    folder: Path
    bindir: Path
    port: int
    tls: bool

    def login(self) -> dict:
        """Return the login options of mala.hpc_db's modules."""
        passfile = str(self.folder / "pgpass")
        return {"host": "127.0.0.1", "port": self.port, "user": OWNER, "passfile": passfile, "tls": self.tls}

    def service(self) -> dict:
        """Return the service entry's parameters, as the role ``server`` writes them."""
        settings = {
            "databases_studies": [{"name": "postgres", "tables": "optuna"}], "instance_study_role": OWNER,
            "postgres_tls": self.tls, "postgres_hba_rules": [], "postgres_major": 17, "server_address": "",
        }
        entry = service_entries(settings, OWNER, "/root")["direct"]
        return {**entry, "host": "127.0.0.1", "port": self.port, "passfile": self.folder / "pgpass"}


Command = Callable[[Place], "list[str]"]


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, *(["-c"] if "import" in program else []), program, *arguments]


def module(which: str, **options: object) -> Command:
    """Return the command that runs one of our modules, as the tasks call it."""

    def command(place: Place) -> list[str]:
        arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {**place.login(), **options}})
        return python(MODULE, f"mala.hpc_db.plugins.modules.{which}", arguments.replace("FOLDER", str(place.folder)))

    return command


def community(which: str, **options: object) -> Command:
    """Return the command that runs a module of community.postgresql, with the login that the roles use."""

    def command(place: Place) -> list[str]:
        safe = {**_connection.safety("127.0.0.1", place.tls), "passfile": str(place.folder / "pgpass")}
        login = {"login_host": "127.0.0.1", "login_port": place.port, "login_user": OWNER, "connect_params": safe}
        arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {**login, **options}})
        return python(MODULE, f"community.postgresql.plugins.modules.{which}", arguments)

    return command


def worker(place: Place) -> list[str]:
    return python(PLAIN_SQLALCHEMY, "postgresql+psycopg2:///?service=hpc_db")


# Each file that opens a connection over the network, and commands that make it do so.
OPENERS: dict[str, list[Command]] = {
    "plugins/module_utils/_connection.py": [
        lambda place: python(PLAIN_SQLALCHEMY, _connection.storage_url(place.login(), "postgres")),
        lambda place: [str(place.bindir / "psql"), "-d", _connection.conninfo(place.login(), "postgres"), "-c", ""],
    ],
    "plugins/modules/abandoned_trials.py": [
        module("abandoned_trials", name="hpc_db", root="FOLDER/root", bin_dir="FOLDER/bin", database="postgres",
               cluster="mini"),
    ],
    "plugins/modules/optuna_import.py": [
        module("optuna_import", database="postgres", root="FOLDER/root", file="FOLDER/study.log"),
    ],
    "plugins/modules/optuna_study.py": [module("optuna_study", databases=[{"name": "postgres"}])],
    "plugins/modules/reading_role.py": [
        module("reading_role", role="reader", writer=OWNER, databases=["postgres"]),
    ],
    "plugins/modules/role_passwords.py": [module("role_passwords", database="postgres", roles=["nobody"])],
    "plugins/modules/server_info.py": [module("server_info", database="postgres")],
    "plugins/modules/study_dump.py": [module("study_dump", root="FOLDER/root", database="postgres")],
    "plugins/modules/study_trials.py": [
        module("study_trials", database="postgres", path="FOLDER/trials.json.gz"),
    ],
    "roles/dashboard/tasks/start.yml": [
        community("postgresql_query", login_db="postgres", query="SELECT study_name FROM studies LIMIT 0"),
    ],
    "roles/databases/tasks/ensure.yml": [
        community("postgresql_user", login_db="postgres", name="study"),
        community("postgresql_db", name="studies"),
    ],
    "roles/databases/tasks/reload.yml": [community("postgresql_query", login_db="postgres", query="SELECT 1")],
    "roles/workers/files/wait.py": [
        lambda place: python(str(place.folder / "wait.py"), str(place.folder / "root"), "hpc_db", "1", "1"),
    ],
    "roles/workers/files/study_optuna.py": [worker],
    "client/src/hpc_db_client/dialect.py": [worker],
    "plugins/module_utils/host/probe.py": [
        lambda place: python(
            str(ROOT / "plugins/module_utils/host/probe.py"), "postgresql+psycopg2:///?service=hpc_db"
        ),
    ],
}
# These connect over the unix socket of the temporary server that they start, whose folder is private.
OVER_THE_SOCKET = {
    *(f"plugins/module_utils/host/{name}.py" for name in ("dumps", "engines", "postgres", "upgrade")),
    "roles/server/files/storage_proxy.py",
}
# These mention programs and modules without running them against a server.
NAMES_ONLY = {
    "plugins/module_utils/_postgres.py", "plugins/module_utils/_workers.py", "plugins/modules/upgrade_data.py",
    "roles/databases/tasks/with_server.yml",
}
OPENS = re.compile(
    r"_connection\.(connect|parameters|conninfo|storage_url)\(|\b(asyncpg|psycopg2?|driver)\.connect\(|\._invoke_creator\b"
    r"|(create_engine|RDBStorage|get_storage)\(|postgresql\+psycopg2?://%|[\"/](psql|pg_(dump|dumpall|restore))\""
    r"|community\.postgresql\.postgresql_"
)
COMMANDS = list({id(each): each for commands in OPENERS.values() for each in commands}.values())


def test_every_opener_is_tried() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("plugins", "roles", "playbooks", "client/src", "controller/src")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".yml", ".j2", ".sh") and OPENS.search(path.read_text())
    }

    assert found == {*OPENERS, *OVER_THE_SOCKET, *NAMES_ONLY}


def test_every_task_tells_whether_there_is_tls() -> None:
    for path in ROOT.glob("roles/*/tasks/*.yml"):
        told = [re.findall(rf"^ +{key}: ", path.read_text(), re.MULTILINE) for key in ("passfile", "tls")]
        assert len(told[0]) == len(told[1]), path


def test_service_entry_is_as_safe_as_the_modules() -> None:
    entry = Place(Path(), Path(), 1, True).service()

    given = {key: str(value) for key, value in _connection.safety("c1", True).items()}
    assert {key for key in given if given[key] != str(entry.get(key))} == {"connect_timeout", "require_auth"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The files that the programs expect on a cluster: passwords, a service entry, a queue, and packages."""
    folder = Path(tempfile.mkdtemp(prefix="strangers-"))
    folder.chmod(0o755)
    for name in ("bin", "packages", "root/host/hpc_db_host"):
        (folder / name).mkdir(parents=True)
    (folder / "study.log").write_text('{"op_code": 0, "worker_id": "a"}\n')
    (folder / "bin" / "squeue").write_text("#!/bin/sh\necho 'JOBID|'; echo '7|RUNNING|c1|1:00:00|hpc_db|None'\n")
    (folder / "bin" / "squeue").chmod(0o755)
    (folder / "pgpass").write_text(f"*:*:*:*:{SECRET}\n")
    (folder / "pgpass").chmod(0o600)
    for path in ("roles/workers/files/wait.py", "client/src/hpc_db_client/outlook.py"):
        shutil.copy(ROOT / path, folder)
    for name in WHEELS.split():
        (wheel,) = (ROOT / ".cache" / "wheels").glob(f"{name}-*.whl")
        zipfile.ZipFile(wheel).extractall(folder / "packages")
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=c3 -keyout key -out crt".split(),
        cwd=folder, check=True, capture_output=True,
    )
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(folder: Path, bindir: Path) -> Iterator[int]:
    """A real server with TLS; yields its port."""
    data, port = folder / "data", free_port()
    data.mkdir()
    (folder / "init").write_text(SECRET)
    for name in ("crt", "key"):
        shutil.copy(folder / name, folder / f"server.{name}")
    for path in (data, folder / "init", folder / "server.key"):
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    (folder / "server.key").chmod(0o600)
    as_nobody: dict = {"user": NOBODY.pw_uid, "group": NOBODY.pw_gid, "extra_groups": [], "cwd": "/"}
    subprocess.run(
        [bindir / "initdb", "--no-sync", "-D", data, "-U", OWNER, "-A", "scram-sha-256", f"--pwfile={folder}/init"],
        check=True, capture_output=True, **as_nobody,
    )
    rules = "hostssl all all 127.0.0.1/32 scram-sha-256\nlocal all all password\n"
    (data / "pg_hba.conf").write_text(rules)
    settings = {
        "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": data, "ssl": "on", "fsync": "off",
        "ssl_cert_file": folder / "server.crt", "ssl_key_file": folder / "server.key", "log_connections": "on",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with open(folder / "log", "wb") as log:
        postgres = subprocess.Popen([bindir / "postgres", "-D", data, *options], stderr=log, **as_nobody)
    eventually(lambda: "ready to accept" in (folder / "log").read_text())
    yield port
    postgres.terminate()
    postgres.wait(30)


def eventually(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def rogue(port: int, *options: str) -> Iterator[list[str]]:
    """Run the rogue server on a port; afterwards the list holds the secrets that each client has given it."""
    got: list[str] = []
    said: list[str] = []
    with subprocess.Popen([sys.executable, ROGUE, str(port), *options], stdout=subprocess.PIPE, text=True) as process:
        stdout = process.stdout
        assert stdout and stdout.readline() == "listens\n"

        def listen() -> None:
            for line in stdout:
                said.append(line)

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield got
            # The rogue finishes with a client a moment after the client has gone.
            eventually(lambda: 2 * said.count("accepted\n") == len(said))
        finally:
            process.kill()
            listener.join()
        got += [bytes.fromhex(line[3:].strip()).decode() for line in said if line.startswith("got")]


def run_all(place: Place) -> list[tuple[str, str, float]]:
    """Run every program that connects, in parallel; return each with its error message, if any, and its duration."""
    service = "".join(f"{key}={value}\n" for key, value in place.service().items())
    (place.folder / "pg_service.conf").write_text(f"[hpc_db]\n{service}")
    settings = {"bindir": str(place.bindir), "service": {}}
    (place.folder / "root" / "host" / "settings.json").write_text(json.dumps(settings))
    paths = [place.folder / "packages", ROOT / ".cache" / "collections"]
    environment = {
        "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(place.folder),
        "PYTHONPATH": ":".join(map(str, paths)),
        "PGSERVICEFILE": str(place.folder / "pg_service.conf"),
    }

    def run(command: list[str]) -> tuple[str, str, float]:
        began = time.monotonic()
        done = subprocess.run(
            command, env=environment, cwd=place.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=90, check=False,
        )
        name = next((word for word in command if re.fullmatch(r"[\w.]+\.modules\.\w+", word)), command[1])
        return name, why_failed(done), time.monotonic() - began

    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        return list(pool.map(run, [command(place) for command in COMMANDS]))


def why_failed(done: subprocess.CompletedProcess[str]) -> str:
    """Return a failed program's output; for Python, its last line."""
    if done.stdout.strip().startswith("{"):
        said = json.loads(done.stdout)
        if said.get("failed"):
            return said["msg"].strip()
        return next((said[name] for name in ("error", "no_answer") if said.get(name)), "")
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""


# Without TLS nothing binds a password to the connection, so a login can be relayed: docs/security.md
@pytest.mark.parametrize(("kind", "tls"), [
    ("asks", True), ("asks over TLS", True), ("relays", True), ("relays over TLS", True), ("is silent", True),
    ("asks", False), ("asks over TLS", False), ("is silent", False),
])
def test_rogue_server_gets_nothing(kind: str, tls: bool, folder: Path, server: int, bindir: Path) -> None:
    place = Place(folder, bindir, free_port(), tls)
    certificate = [str(folder / "crt"), str(folder / "key")] if "TLS" in kind else []
    way = {"relays": [f"--relay=127.0.0.1:{server}"], "is": ["--silent"]}.get(kind.split()[0], [])

    with rogue(place.port, *certificate, *way) as got:
        ran = run_all(place)

    assert not any(got)
    assert [each for each in ran if not each[1] or "\n" in each[1] or each[1].startswith("IndexError")] == []
    assert [each for each in ran if each[2] > 60] == []
    assert len(got) >= len(ran) - 3  # without TLS, psql of PostgreSQL 15 refuses before it connects


def test_the_real_server_lets_them_in(folder: Path, server: int, bindir: Path) -> None:
    before = (folder / "log").read_text().count("connection authorized")

    ran = run_all(Place(folder, bindir, server, True))

    assert not [said for _name, said, _took in ran if re.search("channel|SSL|authenticat|require_|timeout", said)], ran
    assert (folder / "log").read_text().count("connection authorized") - before >= len(ran)


def test_another_users_server_on_the_socket_gets_nothing(folder: Path, server: int, bindir: Path) -> None:
    login = {**Place(folder, bindir, server, True).login(), "host": str(folder / "data")}
    psql = [bindir / "psql", "-d", _connection.conninfo(login, "postgres"), "-c", "SELECT 1"]

    asked = subprocess.run(psql, capture_output=True, text=True, timeout=30, check=False)

    assert f'requirepeer specifies "{OWNER}", but actual peer user name is "nobody"' in asked.stderr
