# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The doctor's findings on one node; tests/integration runs it on a cluster."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hpc_db_host import doctor, optuna_schema

ENTRY = "[other]\nhost=x\n[hpc_db]\n# mine\nhost=c1\nport=5433\npassfile={}/secrets/pgpass\n[last]\nport=1\n"
HELD = {
    "python": "3.11.2", "driver": "2.9.13", "sqlalchemy": "2.1.9", "optuna": "5.0.0", "hpc-db-client": "0.1.0",
    "revisions": ["v3.2.0.a", "v3.0.0.d"], "used": 3, "max_connections": 80, "schema": ["5.0.0", "v3.2.0.a"],
}


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """An instance whose server is running, according to its files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSERVICEFILE", raising=False)
    root = tmp_path / "root"
    for folder in ("run", "log", "conf", "secrets", "host"):
        (root / folder).mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    (root / "secrets/pgpass").touch(0o600)
    (root / "conf/postgresql-17.conf").write_text("max_connections = 80\nmax_connections = '60'\n")
    (root / "host/settings.json").write_text(json.dumps({
        "config": str(root / "conf/postgresql-17.conf"), "service": {"sslmode": "require"}, "databases": ["mala"],
    }))
    (root / "run/endpoint.json").write_text('{"host": "c1", "port": 5433, "job": "7"}')
    (tmp_path / ".pg_service.conf").write_text(ENTRY.format(root))
    wanted = {
        "instance": "hpc_db", "root": str(root), "owner": "alice", "workers": 20, "python_side": "/side/bin/python",
        "environment": "", "url": "u:///?service=hpc_db", "plain_url": "u:///?service=hpc_db", "log_hours": 24,
        "job": {"id": "7", "state": "RUNNING", "node": "c1", "reason": ""},
        "state": {"state": "serving", "reason": "it accepts writes"},
        "endpoint": {"host": "c1", "port": 5433, "job": "7"},
    }
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    return doctor.read_wanted(str(tmp_path / "wanted.json"))


def found(report):
    """Return the problems: check, text and fix."""
    return [(each["check"], each["said"], each["mend"]) for each in report.findings if each["state"] == "found"]


def states(report):
    return {each["check"]: each["state"] for each in report.findings}


def test_server_that_is_well(instance):
    report = doctor.look_at_server(instance)

    assert found(report) == []
    assert states(report) == {"job": "ok", "state": "ok", "modes": "ok", "log": "ok"}
    assert (instance["max_connections"], instance["databases"], instance["tls"]) == (60, ["alice", "mala"], True)


@pytest.mark.parametrize("changes, says, mend", [
    ({"job": None, "endpoint": None}, "no server job is queued or running, so the server is down", "hpc_db.yml"),
    ({"job": {"id": "8", "state": "PENDING", "node": "", "reason": "Resources"}, "endpoint": None},
     r"job 8 PENDING \(Resources\), so the server is down", "server_job_options"),
    ({"endpoint": None}, "job 7 RUNNING on c1, but the server is down", "job.log"),
    ({"state": {"state": "failed", "reason": 'unrecognized configuration parameter "x"'}},
     "failed: a parameter of PostgreSQL is wrong", "postgres_settings"),
    ({"state": {"state": "unhealthy", "reason": "connections exhausted: 55 of 55 are used"}},
     "unhealthy: too many clients against max_connections 60 .connections exhausted: 55 of", "databases_workers"),
])
def test_server_that_is_ill(changes, says, mend, instance):
    (told,) = found(doctor.look_at_server({**instance, **changes}))

    assert re.search(says, told[1]) and mend in told[2]


def test_server_that_rests_until_a_worker_starts_it_is_well(instance):
    report = doctor.look_at_server({**instance, "job": None, "endpoint": None, "rests": True})

    assert found(report) == []
    assert report.findings[0]["said"] == "no server runs; the next worker's job starts it"


def test_open_files_and_logs_are_told(instance):
    root = Path(instance["root"])
    (root / "secrets").chmod(0o750)
    (root / "log/postgresql-Sun.log").write_text(
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() + 5))
        + '.000 UTC postgres[1] c2 FATAL:  role "bob" does not exist\n'
    )

    modes, log = found(doctor.look_at_server(instance))

    assert modes == ("modes", f"open to others: {root}/secrets", f"chmod go= {root}/secrets")
    assert log[1].startswith("a URL names the role bob, which does not exist (1 times by c2, at ")

    # Settings changed since then may have fixed it.
    os.utime(root / "conf/postgresql-17.conf", (time.time() + 60,) * 2)
    assert [check for check, _said, _mend in found(doctor.look_at_server(instance))] == ["modes"]


def test_what_is_printed_is_escaped(instance):
    job = {"id": "8", "state": "PENDING", "node": "", "reason": "\x1b[2J\n  ok  job  \u202e"}

    told = doctor.look_at_server({**instance, "job": job, "endpoint": None}).findings

    assert all(word.isprintable() for each in told for word in each.values())
    assert r"(\x1b[2J\n  ok  job  \u202e)" in told[0]["said"]


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(doctor, "_look_at_network", lambda *_unused: None)
    monkeypatch.setattr(doctor, "ask_python", lambda python, url: dict(HELD, max_connections=60))


def test_node_that_is_well(instance, no_network):
    assert found(doctor.look_from_here(instance)) == []


@pytest.mark.parametrize("damage, says", [
    (lambda home: (home / ".pg_service.conf").write_text("[other]\n"), "service: .*hpc_db.* is missing .* stop.yml"),
    (lambda home: (home / ".pg_service.conf").unlink(), r"service: \[hpc_db\] in .* is missing .* share the home"),
    (lambda home: (home / "root/run/endpoint.json").write_text('{"host": "c2", "port": 5433}'),
     "service: .* points to c1 port 5433, but the server is on c2 port 5433 .* stop.yml"),
    (lambda home: (home / "root/run/endpoint.json").unlink(), "files: .*endpoint.json is missing on .* instance_root:"),
    (lambda home: (home / "root/secrets/pgpass").chmod(0o640), "passwords: .* has mode 0640: .* ignores .* chmod 600"),
    (lambda home: (home / "root/secrets/pgpass").unlink(), "passwords: .*No such file.* hpc_db.yml"),
    (lambda home: (home / "root").rename(home / "elsewhere"), "files: .*root does not exist instance_root: "),
    (lambda home: os.environ.update(PGSERVICEFILE="/no/such"), "service: .* in /no/such is missing unset PGSERVICE"),
])
def test_node_that_is_ill(damage, says, instance, no_network, monkeypatch):
    monkeypatch.setenv("PGSERVICEFILE", "")
    damage(Path(instance["root"]).parent)

    (told,) = found(doctor.look_from_here(instance))

    assert re.search(says, "{}: {} {}".format(*told))


class Server(threading.Thread):
    """Answers each client's request for TLS, with TLS if it has a certificate."""

    def __init__(self, certificate):
        super().__init__(daemon=True)
        self.certificate = certificate
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]

    def run(self):
        connection, _address = self.listening.accept()
        with connection:
            assert connection.recv(8) == doctor.SSL_REQUEST
            connection.sendall(b"S" if self.certificate else b"N")
            if self.certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate / "server.crt", self.certificate / "server.key")
                with context.wrap_socket(connection, server_side=True) as encrypted:
                    encrypted.recv(1)


def make_certificate(folder):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-batch", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "1",
         "-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")], check=True, capture_output=True,
    )
    return folder


@pytest.mark.parametrize("theirs, tls, expected", [
    ("conf", True, "ok"), ("stranger", True, "found"), (None, True, "found"), (None, False, "ok"),
])
def test_tls(theirs, tls, expected, instance):
    root = Path(instance["root"])
    make_certificate(root / "conf")
    server = Server(theirs and (root / "conf" if theirs == "conf" else make_certificate(root / theirs)))
    server.start()
    report = doctor.Report()

    doctor._look_at_network(report, dict(instance, tls=tls), "127.0.0.1", server.port)

    assert states(report) == {"name": "ok", "port": "ok", "TLS": expected}
    assert all("postgres_tls" in told[2] or "stranger" in told[1] for told in found(report))


def test_port_that_nobody_has(instance):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    report = doctor.Report()

    doctor._look_at_network(report, instance, "127.0.0.1", port)

    assert states(report) == {"name": "ok", "port": "found", "TLS": "skipped"}
    assert found(report)[0][1:] == (
        f"127.0.0.1 port {port}: the server cannot be reached (Connection refused)",
        "postgres_listen_addresses, server_address, or the networks between the nodes",
    )


@pytest.mark.parametrize("addresses, says", [
    (OSError("Name or service not known"), "c1 cannot be resolved: Name or service not known"),
    (["127.0.1.1"], "c1 resolves to 127.0.1.1, which is this node itself"),
])
def test_name_that_leads_nowhere(addresses, says, instance, monkeypatch):
    def getaddrinfo(*_unused, **_options):
        if isinstance(addresses, Exception):
            raise addresses
        return [(2, 1, 6, "", (address, 1)) for address in addresses]

    def refuse(*_unused):
        raise OSError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", refuse)
    report = doctor.Report()

    doctor._look_at_network(report, instance, "c1", 5433)

    assert found(report)[0][:2] == ("name", says) and "server_address" in found(report)[0][2]


def test_socket(instance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have only 107 bytes
    for expected in ("found", "ok"):
        report = doctor.Report()
        doctor._look_at_socket(report, ".s.PGSQL.5432")
        assert states(report) == {"name": "skipped", "port": expected, "TLS": "skipped"}
        if expected == "found":
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(".s.PGSQL.5432")
            listening.listen()
    listening.close()


@pytest.mark.parametrize("changes, side, says", [
    ({"driver": "", "why": "libpq.so.5: cannot open"}, {},
     "psycopg2 cannot be imported: libpq.so.5: .* hpc_db.yml installs it there"),
    ({"python": "3.8.1"}, {}, "Python 3.8.1 is too old, workers need 3.9 client_environment"),
    ({"sqlalchemy": ""}, {}, "SQLAlchemy is missing client_environment: "),
    ({"sqlalchemy": "1.3.24"}, {}, "SQLAlchemy 1.3.24, but the plugin needs 1.4.24 to 2.1"),
    ({"sqlalchemy": "2.2.0"}, {}, "SQLAlchemy 2.2.0, but"),
    ({"optuna": ""}, {}, "Optuna is missing client_environment: install optuna"),
    ({"hpc-db-client": ""}, {}, "hpc-db-client is missing, but .* client_environment: "),
    ({"optuna": "3.1.1", "revisions": ["v3.0.0.d", "v2.6.0.a"]}, {}, "Optuna 3.1.1 does not support the tables"),
    ({"schema": ["3.1.1", "v3.0.0.d"]}, {}, "Optuna 5.0.0 needs newer tables .* databases_upgrade_schema"),
    ({"optuna": "4.9.0"}, {"optuna": "5.0.0"}, "Optuna 4.9.0, but the management environment has 5.0.0: only"),
    ({"error": "FATAL:  sorry, too many clients already"}, {}, "cannot connect: too many clients .* databases_workers"),
])
def test_environment_that_is_ill(changes, side, says, instance, monkeypatch):
    monkeypatch.setattr(doctor, "ask_python", lambda python, url: {**HELD, **changes})
    wanted = dict(instance, plugin=True, url="u:///?service=hpc_db&plugin=hpc_db")
    report = doctor.Report()

    doctor._look_at_python(report, wanted, "workers", "~/env", "client_environment", True, side)

    (told,) = found(report)
    assert re.search(says, f"{told[1]} {told[2]}"), told


def test_server_that_is_down_is_told_once(instance, no_network):
    home = Path(instance["root"]).parent
    (home / "root/run/endpoint.json").unlink()
    (home / ".pg_service.conf").unlink()

    report = doctor.look_from_here(dict(instance, endpoint=None))

    assert found(report) == []
    assert states(report) == {
        "service": "skipped", "passwords": "ok", "name": "skipped", "port": "skipped", "TLS": "skipped",
        "management": "ok",
    }
    (home / ".pg_service.conf").write_text(ENTRY.format(instance["root"]))
    (told,) = found(doctor.look_from_here(dict(instance, endpoint=None)))
    assert told[0] == "service" and "points to a server that is down" in told[1] and told[2] == doctor.HOST_IT


def hang_up(server):
    server.accept()[0].close()


@pytest.mark.parametrize("answers", [False, True])
def test_node_that_died_is_told_once_and_no_address_is_blamed(answers, instance, monkeypatch):
    """The scheduler has not noticed yet. A server that answers is alive, whatever the clocks say."""
    run = Path(instance["root"]) / "run"
    (run / "lease.3").write_text("{}")
    (run / "hb.3").touch()
    os.utime(run / "hb.3", (time.time() - 200,) * 2)
    held = dict(HELD, max_connections=60, error="timeout expired")
    monkeypatch.setattr(doctor, "ask_python", lambda python, url: held)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"host": "127.0.0.1", "port": server.getsockname()[1] if answers else 1, "job": "7"}
        (run / "endpoint.json").write_text(json.dumps(place))
        wanted = doctor.read_wanted(str(Path(instance["root"]).parent / "wanted.json"))
        service = Path(instance["root"]).parent / ".pg_service.conf"
        service.write_text(service.read_text().replace("c1", "127.0.0.1").replace("5433", str(place["port"])))
        if answers:
            threading.Thread(target=hang_up, args=[server], daemon=True).start()

        here = doctor.look_from_here(wanted)
        (told, *others) = found(doctor.look_at_server(wanted)) or [("",) * 3]

    if answers:
        assert {"name": "ok", "port": "ok"}.items() <= states(here).items() and told[0] == ""
        return
    assert found(here) == others == []
    assert {"name": "ok", "port": "skipped", "TLS": "skipped", "management": "ok"}.items() <= states(here).items()
    assert re.match("job 7 RUNNING on c1, but the server has sent no heartbeat for 20. s: its node may ", told[1])


@pytest.mark.parametrize("beats, ttl", [(False, 0.5), (True, 60.0)])
def test_node_that_died_just_now_is_told_from_a_wrong_address(beats, ttl, instance, monkeypatch):
    """The last heartbeat is recent: the next one shows that the server is alive."""
    run = Path(instance["root"]) / "run"
    (run / "lease.3").write_text("{}")
    (run / "hb.3").write_text("1")
    (run / "endpoint.json").write_text('{"host": "127.0.0.1", "port": 1, "job": "7"}')
    wanted = dict(instance, lease_ttl=ttl)
    renewal = threading.Timer(0.2, (run / "hb.3").write_text, ["2"])
    monkeypatch.setattr(doctor, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "ask_python", lambda python, url: HELD)

    if beats:
        renewal.start()
    here = doctor.look_from_here(wanted)
    job = doctor.look_at_server(wanted).findings[0]

    assert (states(here)["port"], job["state"]) == (("found", "ok") if beats else ("skipped", "found"))


def test_connections_that_wait_for_the_next_start_are_told(instance, no_network):
    told = found(doctor.look_from_here(dict(instance, max_connections=320)))

    assert told == [("connections", "the server still allows 60, but its configuration says 320", doctor.HOST_IT_AGAIN)]


def test_python_is_asked_for_what_it_has(instance, tmp_path):
    held = doctor.ask_python(sys.executable, "sqlite://")

    assert held["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert set(held) >= {"sqlalchemy", "optuna", "driver", "revisions"}
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libpython3.so: no such file >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"^libpython3.so: no such file$"):
        doctor.ask_python(str(broken), "")
    with pytest.raises(OSError):
        doctor.ask_python(str(tmp_path / "none"), "")


def test_newest_revision_comes_first(tmp_path, monkeypatch):
    folder = tmp_path / "storages/_rdb/alembic/versions"
    folder.mkdir(parents=True)
    for name, before in (("v1", "None"), ("v2", '"v1"'), ("v3", '"v2"')):
        (folder / f"{name}.py").write_text(f'revision = "{name}"\ndown_revision = {before}\n')
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(optuna_schema.importlib.util, "find_spec", lambda name: spec)

    assert optuna_schema.installed_optuna().revisions == ["v3", "v2", "v1"]
