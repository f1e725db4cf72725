# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tunnel with a fake ssh; tests/integration has the real one."""

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "roles/dashboard/files/tunnel.py"
specification = importlib.util.spec_from_file_location("tunnel", PROGRAM)
tunnel = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tunnel)

# Records its calls in files: a master creates its socket, and lives until its login node is cut off; commands sent over
# it run on this machine.
SSH = """#!{python}
import json, os, pathlib, signal, subprocess, sys
folder, words = pathlib.Path({folder!r}), sys.argv[1:]
control = [pathlib.Path(word[12:]) for word in words if word.startswith("ControlPath=")][0]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "-N" in words:
    if (folder / "cut").exists():
        sys.exit("ssh: connect to host login port 22: No route to host")
    (folder / "master").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_unused: (control.unlink(), sys.exit(255)))
    control.touch()
    signal.pause()
elif not control.exists():
    sys.exit(255)
elif "-O" not in words:
    sys.exit(subprocess.run(["sh", "-c", words[-1]]).returncode)
"""
ENDPOINT = {"host": "c1", "port": 5432, "since": 1.5}
PASSWORD = "*:*:*:reader:correct-horse_"


def place(**changes):
    return json.dumps({**ENDPOINT, **changes})


def test_what_ssh_says_stays_in_its_line_of_the_log(capsys):
    tunnel.say("lost: x\n2026-11-22 10:00:00 leads to y\x1b[2J")

    assert capsys.readouterr().out.endswith(r" lost: x\n2026-11-22 10:00:00 leads to y\x1b[2J" + "\n")


@pytest.mark.parametrize("text, expected", [
    (place(), tunnel.Place("c1", 5432, 1.5)),
    (place(host="2001:db8::1"), tunnel.Place("2001:db8::1", 5432, 1.5)),
    *[(place(host=host), None) for host in ("-oProxyCommand=x", "a b", "a\nb", "$(id)", "", "/tmp/x")],
    *[(place(port=port), None) for port in (0, 65536, "x", None)],
    ("", None), ("{", None), ("[]", None), ("{}", None),
])
def test_endpoint(text, expected):
    assert tunnel.parse_endpoint(text) == expected


@pytest.mark.parametrize("password, expected", [
    (f"{PASSWORD}\n", PASSWORD), ("", ""), ("*:*:*:study:x\n", ""), (f"{PASSWORD}\n{PASSWORD}\n", ""),
])
def test_answer_of_the_login_node(password, expected):
    mark = f"\n{tunnel.MARK}"
    text = f"Welcome to login{mark}{place()}{mark}{password}{mark}"

    assert tunnel.parse_look(text, "reader") == (tunnel.Place("c1", 5432, 1.5), expected)


def test_other_answers_are_refused():
    with pytest.raises(tunnel.Lost, match="'Account expired' is not a valid answer of the login node"):
        tunnel.parse_look("Account expired\n", "reader")


class Running:
    """The program, running, with a local folder as its cluster."""

    def __init__(self, folder):
        self.folder, self.root, self.here = folder, folder / "a b; $(x)", folder / "here"
        for path in (self.root / "run", self.root / "secrets", self.here, folder / "tmp"):
            path.mkdir(parents=True)
        self.ssh = folder / "ssh"
        self.ssh.write_text(SSH.format(python=sys.executable, folder=str(folder)))
        self.ssh.chmod(0o755)
        self.settings = {
            "ssh": str(self.ssh), "host": "login", "arguments": "-F '/my config' -o ProxyJump=gate", "role": "reader",
            "root": str(self.root), "folder": str(self.here), "service": "hpc_db", "poll": 0.05,
            "parameters": {"sslmode": "require", "passfile": "/there", "user": "study", "dbname": "mala"},
        }
        (self.root / "secrets/pgpass").write_text(f"*:*:*:study:secret\n{PASSWORD}\n")

    def start(self):
        command = [sys.executable, "-I", str(PROGRAM), json.dumps(self.settings), "--port=4711"]
        environment = {**os.environ, "TMPDIR": str(self.folder / "tmp")}
        self.log = self.folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def serve(self, **changes):
        (self.root / "run/new").write_text(place(**changes))
        (self.root / "run/new").rename(self.root / "run/endpoint.json")

    def wait_for(self, text, number=1):
        deadline = time.monotonic() + 60
        while self.log.read_text().count(text) < number:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def running(tmp_path, monkeypatch):
    running = Running(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid):
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_follows_the_server_and_leaves_nothing(running):
    running.start()
    running.wait_for("no server is running")
    running.serve()
    running.wait_for("forwards to c1 port 5432")
    first = int((running.folder / "master").read_text())
    (running.root / "secrets/pgpass").write_text(PASSWORD.replace("horse", "battery") + "\n")
    running.wait_for("it has a new password")
    assert "battery" in (running.here / "pgpass").read_text()
    running.serve(host="c2", since=2.5)
    running.wait_for("forwards to c2 port 5432")

    assert not is_alive(first)  # and with it every connection that still waited for c1
    assert (running.here / "pg_service.conf").read_text().split() == [
        "[hpc_db]", "dbname=mala", "host=127.0.0.1", f"passfile={running.here}/pgpass", "port=4711",
        "sslmode=require", "user=reader",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in running.here.iterdir()} == {0o600}
    masters = [call for call in running.calls() if "-N" in call]
    assert masters[0][-7:] == ["-F", "/my config", "-o", "ProxyJump=gate", "-N", "--", "login"]
    forwarded = [call[call.index("-L") + 1] for call in running.calls() if "-O" in call]
    assert forwarded == ["127.0.0.1:4711:c1:5432", "127.0.0.1:4711:c2:5432"]
    assert "correct" not in str(running.calls()) and "secret" not in running.log.read_text()

    running.process.terminate()
    assert running.process.wait(30) == 0
    assert not is_alive(int((running.folder / "master").read_text()))
    assert list((running.folder / "tmp").iterdir()) == []


def test_connects_again_when_the_login_node_is_back(running, monkeypatch):
    running.serve()
    (running.folder / "cut").touch()
    running.start()
    running.wait_for("ssh to login has ended with 1")
    (running.folder / "cut").unlink()
    running.wait_for("forwards to c1 port 5432")
    os.kill(int((running.folder / "master").read_text()), signal.SIGTERM)
    running.wait_for("forwards to c1 port 5432", 2)

    assert "the connection to login is lost" in running.log.read_text()
    assert "No route to host" in running.log.read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere its process group is ended")
def test_killed_it_takes_ssh_with_it(running):
    running.serve()
    running.start()
    running.wait_for("forwards to c1 port 5432")

    running.process.kill()

    wait_until_gone(int((running.folder / "master").read_text()))
