# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease while the supervisor waits: real programs and processes. PostgreSQL's are small ones that log their calls.

Each program can be made to wait until the file ``go`` exists.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hpc_db_host
import pytest
from hpc_db_host import files, processes
from hpc_db_host.keeper import Keeper
from hpc_db_host.lease import Held, Lease, Lost

TTL = 4.0
WAIT = "touch {root}/waits; while [ ! -e {root}/go ]; do sleep 0.05; done"
# Like postgres, it has a child in a session of its own that survives the death of the first process.
POSTGRES = f"""#!{sys.executable}
import os, signal, sys, time
root = {{root!r}}
data = next((word[15:] for word in sys.argv if word.startswith("data_directory=")), root + "/data/17")
os.chdir(data)
def note(what):
    with open(root + "/events", "a") as stream:
        stream.write("%s %s\\n" % (what, data))
def end(number, frame):
    note("stopping")
    while {{slow}} and not os.path.exists(root + "/go"):
        time.sleep(0.05)
    note("checkpoint")
    os.kill(backend, signal.SIGKILL)
    os._exit(0)
note("opened")
backend = os.fork()
if not backend:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
with open(root + "/backend", "w") as stream:
    stream.write(str(backend))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGQUIT, end)
signal.signal(signal.SIGINT, end)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
while True:
    time.sleep(300)
"""
PSQL = """
text=$(cat)
case $text in
    *pg_logical_emit_message*) [ ! -e {root}/backend ] || echo '1|77';;
    *pg_terminate_backend*) {drain}; echo 0;;
    *"FROM pg_database"*) echo '"postgres"';;
esac
"""
PG_UPGRADE = """
for word; do case $word in --old-datadir=*) old=${word#*=};; --new-datadir=*) new=${word#*=};; esac; done
"""


class Instance:
    """An instance directory, and the supervisor running on it, which waits at one point."""

    def __init__(self, root, where):
        self.root, self.where = root, where
        for folder in ("run", "log", "host", "data/17", "data/18.new", "sockets", "bin17", "bin18", "dumps"):
            (root / folder).mkdir(parents=True)
        for major, data in ((17, "17"), (18, "18.new")):
            (root / "data" / data / "PG_VERSION").write_text(f"{major}\n")
            self.write_programs(major)
        self.write_settings("settings", 17, "17")
        self.write_settings("settings-18", 18, "18")

    def write_programs(self, major):
        wait = {where: WAIT.format(root=self.root) if self.where == where else ":" for where in PLACES}
        scripts = {
            "postgres": POSTGRES.format(root=str(self.root), slow=self.where.endswith("stop")),
            "psql": PSQL.format(root=self.root, drain=wait["drain"]),
            "pg_dump": wait["programs"],
            "pg_restore": "",
            "vacuumdb": "",
            "pg_upgrade": PG_UPGRADE + wait["pg_upgrade"],
        }
        for name, script in scripts.items():
            path = self.root / f"bin{major}" / name
            said = f'[ "$1" != --version ] || echo "{name} (PostgreSQL) {major}.1"\n'
            path.write_text(script if name == "postgres" else f"#!/bin/sh\n{said}{script}\n")
            if name == "postgres":
                path.rename(path.with_suffix(".py"))
                path.write_text(f'#!/bin/sh\n{said}[ "$1" = --version ] || exec {path}.py "$@"\n')
                path.with_suffix(".py").chmod(0o755)
            path.chmod(0o755)

    def write_settings(self, name, major, data):
        settings = {
            "instance": "x", "cluster": "c", "scheduler": "local", "bindir": str(self.root / f"bin{major}"),
            "data": str(self.root / "data" / data), "config": "", "port": free_port(), "advertise": "127.0.0.1",
            "socket_parent": str(self.root / "sockets"), "service": {"dbname": "x"}, "lease_ttl": TTL,
            "service_file": str(self.root / "service"), "databases": [], "dump_minutes": 0, "dump_keep": 1,
            "restarts": 0, "stop_notice": 4, "drain_seconds": 300, "stop_patience": 300,
        }
        (self.root / "host" / f"{name}.json").write_text(json.dumps(settings))

    def start(self):
        """Start the supervisor and let it run to the point where it waits."""
        upgrade = self.where in ("upgrade stop", "pg_upgrade")
        verb = ["upgrade", "--settings", self.root / "host" / "settings-18.json"] if upgrade else ["serve"]
        environment = {**os.environ, "PYTHONPATH": str(Path(hpc_db_host.__file__).parents[1])}
        with open(self.root / "said", "w") as said:
            self.program = subprocess.Popen(
                [sys.executable, "-m", "hpc_db_host", *verb, "--root", self.root], env=environment, stdout=said,
                stderr=said,
            )
        if self.where in ("stop", "drain"):
            self.until(self.is_published)
            self.program.terminate()
        self.until(lambda: (self.root / "waits").exists() or "stopping" in self.events())

    def is_published(self):
        return bool(files.read_json(str(self.root / "run" / "endpoint.json")))

    def until(self, condition):
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit and self.program.poll() is None, (self.root / "said").read_text()
            time.sleep(0.02)

    def go(self):
        (self.root / "go").touch()

    def events(self):
        try:
            return (self.root / "events").read_text()
        except FileNotFoundError:
            return ""

    def contender(self, monkeypatch):
        """A contender on another host; the scheduler reports the holder as ended."""
        record = self.root / "run" / "lease.1"
        record.write_text(json.dumps({**json.loads(record.read_text()), "silence": 0}))
        monkeypatch.setattr(processes, "this_host", lambda: "elsewhere")
        holder = {"host": "elsewhere", "pid": os.getpid(), "job": "8", "kind": "slurm"}
        return Lease(str(self.root / "run"), holder, lambda _holder: True, TTL)

    def at_work(self):
        """Return every process that belongs to the instance, except for the supervisor."""
        found = {pid: words for pid, words in zip(everybody(), command_lines(everybody())) if str(self.root) in words}
        return [words for pid, words in found.items() if pid != self.program.pid]


PLACES = ("programs", "drain", "stop", "upgrade stop", "pg_upgrade")


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def everybody():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_lines(pids):
    for pid in pids:
        try:
            yield Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            yield ""


@pytest.fixture
def at():
    """Start a supervisor that waits at a given point."""
    made = []
    folder = Path(tempfile.mkdtemp(prefix="keeper-"))  # a short path, for the sockets

    def at(where):
        made.append(Instance(folder / where.replace(" ", "_"), where))
        made[-1].start()
        return made[-1]

    yield at
    for instance in made:
        processes.kill_below(instance.program.pid)
        instance.program.kill()
        instance.program.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((instance.root / "backend").read_text()), signal.SIGKILL)
    shutil.rmtree(folder)


def test_lease_is_renewed_whatever_the_program_waits_for(at, monkeypatch):
    instances = [at(where) for where in PLACES]
    contenders = [instance.contender(monkeypatch) for instance in instances]
    limit = time.monotonic() + 2.5 * TTL

    taken = set()
    while time.monotonic() < limit:
        for where, contender in zip(PLACES, contenders):
            with contextlib.suppress(Held):
                contender.try_acquire()
                taken.add(where)
        time.sleep(0.05)

    assert taken == set()
    for instance, contender in zip(instances, contenders):
        instance.go()
        if instance.where == "programs":
            instance.until(instance.is_published)
            instance.program.terminate()
        assert instance.program.wait(60) == 0, (instance.root / "said").read_text()
        assert instance.events().split()[::2][-1] == "checkpoint"
        assert contender.try_acquire()


@pytest.mark.parametrize("where", PLACES)
def test_lost_lease_ends_everything_at_once_and_nothing_is_written_any_more(where, at):
    instance = at(where)
    before = instance.events()

    (instance.root / "run" / "lease.2").write_text('{"host": "c2", "job": "8"}')

    # The program that it waits for would never end.
    assert instance.program.wait(30) == 1
    said = (instance.root / "said").read_text().splitlines()
    assert re.search("failed: the lease was taken by job 8 on c2", said[-1])
    assert instance.events() == before
    assert [words for words in instance.at_work() if "postgres" in words] == []
    assert not (instance.root / "run" / "released.1").exists()
    assert os.path.exists(instance.root / "data" / "17")


def test_program_that_was_frozen_before_the_start_does_not_start_postgres(at, monkeypatch):
    instance = at("programs")
    contender = instance.contender(monkeypatch)
    instance.program.send_signal(signal.SIGSTOP)
    contender.acquire(5 * TTL, lambda _held: None, pause=0.05)

    instance.go()
    instance.program.send_signal(signal.SIGCONT)

    assert instance.program.wait(30) == 1
    assert instance.events() == ""
    contender.renew()


@pytest.fixture
def killed(monkeypatch):
    """The pids that the keeper would have killed."""
    killed = []
    monkeypatch.setattr(processes, "kill_below", killed.append)
    return killed


@pytest.fixture
def lease(tmp_path):
    lease = Lease(str(tmp_path), {"pid": os.getpid(), "job": "7"}, lambda _holder: True, ttl=0.6)
    assert lease.try_acquire()
    return lease


@pytest.mark.parametrize("busy", [True, False])
def test_renewal_that_hangs_is_noticed_before_others_may_take_over(busy, lease, killed, monkeypatch):
    over = threading.Event()
    began = time.monotonic()
    monkeypatch.setattr(Lease, "_write_beat", lambda _lease: over.wait())
    with Keeper(lease) as keeper:
        try:
            if busy:  # the program itself hangs, too
                with pytest.raises(Lost):
                    threading.Thread(target=over.wait).start()
                    while not keeper.lost:
                        time.sleep(0.005)
                    keeper.check()
            while not killed:
                time.sleep(0.005)
            assert time.monotonic() - began < 0.6
        finally:
            over.set()
    assert keeper.lost == "the lease was not renewed for 0.3 s: the file system does not answer"
    assert set(killed) == {os.getpid()}


def test_freeze_gives_the_renewal_its_turn_first(lease, killed):
    """The clock jumps by more than the TTL, as it does for a program that was stopped."""
    keeper = Keeper(lease)
    lease._clock = lambda: time.monotonic() + 60

    keeper.watch()
    assert not keeper.lost
    keeper.beat()
    keeper.watch()
    keeper.watch()

    assert not keeper.lost and not killed


def test_lost_lease_is_not_released(lease, killed, tmp_path):
    (tmp_path / "lease.2").write_text('{"host": "c2", "job": "8"}')
    keeper = Keeper(lease)

    with pytest.raises(Lost, match="taken by job 8 on c2"):
        keeper.renew()
    with pytest.raises(Lost):
        keeper.check()
    assert killed == [os.getpid()] * 3  # also processes started in between


def test_signal_that_waits_for_the_main_thread_is_given_to_no_other(start):
    """A thread with unblocked signals would make the main thread raise an exception in the middle of its shutdown."""
    code = """
import os, signal, sys, time
from hpc_db_host.threads import Repeat, signals_waiting
def stop(number, frame):
    raise SystemExit("told after the block" if done else "told within the block")
signal.signal(signal.SIGTERM, stop)
done = False
with Repeat(0.0, lambda: 0.01):
    with signals_waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        for turn in range(20):
            time.sleep(0.01)
        done = True
"""
    process = start(f"import sys; sys.stderr = sys.stdout\n{code}")

    assert process.communicate(timeout=30)[0] == "told after the block\n"
