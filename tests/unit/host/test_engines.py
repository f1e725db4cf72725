# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sidecars, played by a program that only listens; tests/integration has the real ones."""

import configparser
import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from hpc_db_host import engines, processes
from hpc_db_host.engines import engines_of, pooler_rules, quoted

# Listens at its configured address, unless a file "broken" is beside it; records the signals that it receives.
PROGRAM = """#!{python}
import configparser, os, signal, socket, sys
folder = os.path.dirname(sys.argv[0])
if sys.argv[1:] == ["--version"]:
    sys.exit(print({says!r}))
if os.path.exists(os.path.join(folder, "broken")):
    sys.exit("FATAL cannot do that")
read = configparser.ConfigParser()
read.read(sys.argv[1])
def note(*_signal):
    with open(os.path.join(folder, "hup"), "a") as stream:
        stream.write("hup ")
signal.signal(signal.SIGHUP, note)
with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PgBouncer does
    server.bind(("127.0.0.1", read.getint("pgbouncer", "listen_port")))
    server.listen(5)
    while True:
        server.accept()
"""


# Runs a sidecar, and prints its pid.
SERVE = """
import sys, time
from hpc_db_host import engines

class Listener(engines.Engine):
    name = "pooler"
    def command(self):
        return [sys.executable, "-c", "import time; time.sleep(600)"]

engine = Listener({"root": sys.argv[1], "service": {}, "pooler": {"port": 0}, "restarts": 5}, None, "127.0.0.1")
engine.poll()
print(engine._child.pid, flush=True)
time.sleep(600)
"""


class FakePostgres:
    """Has a folder for its socket, and one role."""

    port, verifier = 5433, "SCRAM-SHA-256$4096:c2FsdA==$stored:server"

    def __init__(self, folder):
        self.socket = str(folder)

    def query(self, statement, patience):
        assert "rolname = 'study'" in statement
        return self.verifier + "\n"


class Pooler:
    """The sidecar under test and its surroundings."""

    def __init__(self, root, says, **changes):
        for name in ("socket", "log", "host", "bin"):
            (root / name).mkdir()
        self.root, self.program, self.passfile = root, root / "bin" / "pgbouncer", root / "pgpass"
        self.program.write_text(PROGRAM.format(python=sys.executable, says=says))
        self.program.chmod(0o755)
        self.passfile.write_text("*:*:*:study:secret\n")
        self.postgres = FakePostgres(root / "socket")
        pooler = {
            "program": str(self.program), "port": 0, "connections": 7, "listen": "*", "networks": ["10.0.0.0/8"],
            "certificate": "/conf/server.crt", "key": "/conf/server.key", **changes,
        }
        service = {"user": "study", "dbname": "mala", "passfile": str(self.passfile)}
        settings = {"root": str(root), "restarts": 2, "databases": ["mala", "other"], "service": service,
                    "pooler": pooler, "proxy": {}}
        (self.engine,) = engines_of(settings, self.postgres, "127.0.0.1")

    def poll_until(self, condition):
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit, self.engine.reason
            self.engine.poll()
            time.sleep(0.02)

    def parameters(self):
        read = configparser.ConfigParser()
        read.read(self.root / "socket" / "pgbouncer.ini")
        return dict(read["databases"]), dict(read["pgbouncer"])


@pytest.fixture
def make(tmp_path):
    made = []

    def make(says="PgBouncer 1.18.0", **changes):
        made.append(Pooler(tmp_path, says, **changes))
        return made[0]

    yield make
    made[0].engine.stop()


@pytest.mark.parametrize("says, follows", [
    ("PgBouncer 1.18.0\nlibevent 2.1.12-stable", False), ("PgBouncer 1.21.0", True), ("pgbouncer 1.25.1", True),
])
def test_prepared_statements_are_followed_where_pgbouncer_can(says, follows, make):
    pooler = make(says)

    pooler.poll_until(lambda: pooler.engine.port)

    assert ("max_prepared_statements" in pooler.parameters()[1]) is follows


def test_configuration_lets_in_by_password_over_tls_only_and_nobody_else_reads_it(make):
    pooler = make()
    pooler.poll_until(lambda: pooler.engine.port)

    databases, parameters = pooler.parameters()
    folder = pooler.root / "socket"

    assert databases == dict.fromkeys(("mala", "other"), f"host={folder} port=5433")
    assert (parameters["pool_mode"], parameters["default_pool_size"]) == ("transaction", "7")
    assert (parameters["auth_type"], parameters["client_tls_sslmode"]) == ("hba", "require")
    assert (folder / "pgbouncer.users").read_text() == f'"study" "{FakePostgres.verifier}"\n'
    assert (folder / "pgbouncer.hba").read_text() == (
        'hostssl "mala" "study" 10.0.0.0/8 scram-sha-256\nhostssl "other" "study" 10.0.0.0/8 scram-sha-256\n'
    )
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_logins_that_never_end_are_awaited_no_longer_than_clients_wait(make):
    pooler = make()
    pooler.poll_until(lambda: pooler.engine.port)
    entries = (Path(__file__).parents[3] / "plugins" / "module_utils" / "_plan.py").read_text()
    (patience,) = re.findall(r'POOLER_CONNECT_TIMEOUT = "(\d+)"', entries)

    assert pooler.parameters()[1]["client_login_timeout"] == patience


def port_of_nobody():
    """Return a port below the kernel's ephemeral range, so that no other test gets it by chance."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(low // 2, low)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def test_killed_one_is_back_on_its_port(make):
    pooler = make(port=port_of_nobody())
    pooler.poll_until(lambda: pooler.engine.port)
    port, child = pooler.engine.port, pooler.engine._child

    os.kill(child.pid, signal.SIGKILL)
    pooler.poll_until(lambda: pooler.engine.port is None)
    assert "pooler ended with exit code -9" in pooler.engine.reason
    pooler.poll_until(lambda: pooler.engine.port == port)

    assert pooler.engine.reason == ""


def test_one_that_cannot_run_is_given_up_with_its_reason(make, monkeypatch):
    monkeypatch.setattr(engines, "LONGEST_PAUSE", 0.01)
    pooler = make()
    (pooler.root / "bin" / "broken").touch()

    pooler.poll_until(lambda: "not restarted" in pooler.engine.reason)

    assert pooler.engine.reason == "pooler ended with exit code 1: FATAL cannot do that; not restarted, " \
        "direct connections still work"
    assert (pooler.root / "log" / "pooler.log").read_text().count("FATAL") == 3


@pytest.mark.parametrize("says, verifier, reason", [
    ("GNU coreutils", FakePostgres.verifier, "is not PgBouncer"),
    ("PgBouncer 1.18.0", "", "cannot serve the role study, which has no SCRAM password"),
    ("PgBouncer 1.18.0", "md5abc", "cannot serve the role study, which has no SCRAM password"),
])
def test_what_it_needs_is_named(says, verifier, reason, make):
    pooler = make(says)
    pooler.postgres.verifier = verifier

    pooler.engine.poll()

    assert reason in pooler.engine.reason and pooler.engine.port is None


def test_new_password_is_taken_over_though_the_file_is_written_first(make):
    pooler = make()
    pooler.poll_until(lambda: pooler.engine.port)
    pooler.passfile.write_text("*:*:*:study:changed\n")
    os.utime(pooler.passfile, (1, 1))
    pooler.engine.poll()
    pooler.postgres.verifier = "SCRAM-SHA-256$4096:bmV3$stored:server"

    pooler.poll_until((pooler.root / "bin" / "hup").exists)

    assert "bmV3" in (pooler.root / "socket" / "pgbouncer.users").read_text()


def test_killed_hosting_program_takes_it_along(start, tmp_path):
    for name in ("log", "host"):
        (tmp_path / name).mkdir()
    process = start(SERVE, tmp_path)
    pid = int(process.stdout.readline())
    assert processes.start_time(pid)

    process.kill()

    limit = time.monotonic() + 60
    while processes.start_time(pid):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_all_networks_are_both_families():
    rules = pooler_rules("study", ["mala"], {"networks": ["all"], "certificate": ""})

    assert rules == 'host "mala" "study" 0.0.0.0/0 scram-sha-256\nhost "mala" "study" ::/0 scram-sha-256\n'


def test_path_in_a_url_is_no_more_than_a_path():
    assert quoted("/home/a b/{x}&y=%") == "/home/a%20b/%7Bx%7D%26y%3D%25"
