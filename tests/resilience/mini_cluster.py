# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The test cluster with a server on it, observed from outside, where no injected fault can interfere."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hpc_db_host.files import read_json
from target import ROOT, Target

CLUSTER = ROOT / "tests" / "cluster" / "cluster"
SCENARIOS = ROOT / "molecule"
NUMBERS = itertools.count()
NAME = "hpc_db"
URL = f"postgresql+psycopg2:///?service={NAME}"
PLUGIN_URL = f"{URL}&plugin=hpc_db"
WORKER = f'hpc_db/{NAME}/python/bin/python workers/worker.py "$1" beryllium "$2" "workers/log.$3" $4 $5'
COMPARE = f"hpc_db/{NAME}/python/bin/python workers/compare.py $1 beryllium workers/log.*"


class Process(NamedTuple):
    """A process of the cluster, with its PID on this machine."""

    pid: int
    parent: int
    host: str
    program: str
    command: list[str]


def on_host(processes: Iterable[Process], host: str) -> list[Process]:
    """Return the processes of one host."""
    return [process for process in processes if process.host == host]


def other_node(endpoint: dict) -> str:
    """Return the node that could run the server, but does not."""
    return {"c1": "c2", "c2": "c1"}[endpoint["host"]]


@contextlib.contextmanager
def started(*options: str) -> Iterator[MiniCluster]:
    """Start a test cluster of two nodes with the packages of this checkout; remove it afterwards."""
    if os.geteuid() != 0:
        pytest.skip("the test cluster needs root")
    state = Path(f"/tmp/hpc-db-own-{os.getpid()}-{next(NUMBERS)}")
    mounts = [f"--mount={ROOT / '.cache' / name}:/srv/{name}" for name in ("wheels", "channel")]
    subprocess.run([str(CLUSTER), "up", "--state", str(state), "--nodes=2", *mounts, *options], check=True)
    try:
        yield MiniCluster(state)
    finally:
        subprocess.run([str(CLUSTER), "down", "--state", str(state)], check=True)


@contextlib.contextmanager
def hosting(settings: dict, *options: str) -> Iterator[MiniCluster]:
    """Start such a cluster with alice's server on it."""
    with started(*options) as cluster:
        played = cluster.playbooks.play("hpc_db", settings)
        assert played.returncode == 0, played.stdout
        yield cluster


def is_server(command: list[str]) -> bool:
    """Exclude children with a title of their own, and calls that only print a version or a setting."""
    return not command[0].startswith("postgres: ") and not {"--version", "-V", "-C"} & set(command)


def eventually(condition: Callable[[], object], seconds: float, pause: float = 0.1) -> float:
    """Wait for a condition; return the time it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(pause)
    return time.monotonic() - began


class MiniCluster:
    """A running test cluster with alice's server in a job."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.home = state / "home" / "alice"
        self.root = self.home / "hpc_db" / NAME
        self.playbooks = Target(
            [SCENARIOS / "default" / "inventory", SCENARIOS / "resilience" / "inventory"], [],
            {"HPC_DB_CLUSTER": str(state)},
        )
        self._home = (state / "home").stat()

    # --- hosts

    def verb(self, verb: str, *arguments: str) -> str:
        """Apply an action to a host: kill, boot, cut or heal."""
        command = [str(CLUSTER), verb, "--state", str(self.state), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def mend(self, host: str) -> None:
        """Undo ``kill``, ``cut`` or a drain, and make Slurm use the host again; Slurm itself checks only rarely."""
        dead = re.search(rf"^{host} +dead", self.verb("status"), re.MULTILINE)
        self.verb("boot" if dead else "heal", host)

        def is_used() -> bool:
            state = self.node(host)
            if state.rstrip("*") in ("down", "drained", "draining"):
                self.run("scontrol update nodename=$1 state=resume", host, host="ctl", user="root")
            return state in ("idle", "mixed", "allocated", "completing")

        eventually(is_used, 90, 1)

    def start(self, host: str, script: str, *arguments: str, user: str = "alice") -> subprocess.Popen[str]:
        """Start a shell script on a host."""
        command = [str(CLUSTER), "exec", host, "--state", str(self.state), "--user", user, "--"]
        return subprocess.Popen(
            [*command, "sh", "-c", script, "sh", *arguments], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def run(self, script: str, *arguments: str, host: str = "login", user: str = "alice") -> str:
        """Run a shell script on a host; return its output."""
        with self.start(host, script, *arguments, user=user) as process:
            output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        return output.strip()

    def processes(self, *programs: str) -> Iterator[Process]:
        """Yield the processes that run one of these programs on any host, including one that is cut off."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                program = os.path.basename(os.readlink(entry / "exe")).split(" ")[0]
                if program.startswith(programs) and self._is_ours(entry / "root"):
                    host = (entry / "root/etc/hostname").read_text().strip()
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if command != [""]:  # not ended since
                        yield Process(int(entry.name), parent, host, program, command)

    def _is_ours(self, root: Path) -> bool:
        """Return whether a root belongs to a host of the cluster, whose home directories may be behind a cache."""
        shared = root / "run/shared"
        return os.path.samestat((shared if shared.exists() else root / "home").stat(), self._home)

    # --- the server

    def postmasters(self) -> list[Process]:
        """Return every PostgreSQL server: each postgres without a postgres parent that does not just print something.

        Children that a killed server leaves for a moment, with titles like "postgres: checkpointer", count as that
        server: PostgreSQL starts no second server on the host while they exist.
        """
        found = list(self.processes("postgres"))
        pids = {process.pid for process in found}
        orphans = [process for process in found if process.parent not in pids]
        servers = [process for process in orphans if is_server(process.command)]
        titled = [process for process in orphans if process.command[0].startswith("postgres: ")]
        left = {process.host: process for process in titled if not on_host(servers, process.host)}
        return [*servers, *left.values()]

    def host_programs(self) -> list[Process]:
        """Return every supervisor, but not its children that are about to become psql or the like."""
        found = [process for process in self.processes("python3") if "hpc_db_host" in process.command]
        pids = {process.pid for process in found}
        return [process for process in found if process.parent not in pids]

    def said(self, name: str) -> dict:
        """Read a file that the supervisor publishes; empty if it publishes nothing."""
        return read_json(str(self.root / "run" / f"{name}.json")) or {}

    def service(self) -> str:
        """Return the host in the service entry; empty if there is none."""
        with contextlib.suppress(FileNotFoundError):
            entry = re.search(rf"^\[{NAME}\]\n([^\[]*)", (self.home / ".pg_service.conf").read_text(), re.MULTILINE)
            if entry:
                return re.findall(r"^host=(.*)", entry.group(1), re.MULTILINE)[0]
        return ""

    def log(self) -> str:
        return (self.root / "log" / "job.log").read_text()

    def settings(self) -> dict:
        return json.loads((self.root / "host" / "settings.json").read_text())

    # --- the queue

    def jobs(self, name: str = NAME) -> dict[str, str]:
        """Return the id and the state of each job of this name."""
        queue = self.run('squeue --noheader --name="$1" --format="%i %T"', name)
        return dict(line.split() for line in queue.splitlines())

    def slurm(self, setting: str) -> int:
        """Return one of Slurm's timeouts."""
        return int(re.findall(rf"^{setting} += (\d+)", self.run("scontrol show config"), re.MULTILINE)[0])

    def node(self, name: str) -> str:
        """Return the node's state in Slurm's wording, with a ``*`` when the node does not respond."""
        return self.run('sinfo --noheader --nodes="$1" --partition=work --format=%T', name)

    def is_serving(self) -> bool:
        return self.said("state").get("state") == "serving" and bool(self.service())

    def wait_for_another(self, before: dict, seconds: float) -> float:
        """Wait until a server other than ``before`` (an endpoint) is running; return the time it took."""
        def is_new() -> bool:
            return self.is_serving() and self.said("endpoint").get("since", 0) > before["since"]

        return eventually(is_new, seconds)

    def have_server(self) -> None:
        """Ensure that a server is running; like a user, run the playbook if no job is in the queue."""
        if not self.jobs():
            played = self.playbooks.play("hpc_db")
            assert played.returncode == 0, played.stdout
        eventually(self.is_serving, 120)


class Watch:
    """Samples the cluster ten times a second."""

    def __init__(self, cluster: MiniCluster) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._acknowledged = [(time.monotonic(), 0)]
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self.postmasters: list[set[tuple[str, int]]] = []
        self.stale = 0.0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._over.wait(0.1):
            now = time.monotonic()
            written = sum(path.stat().st_size for path in self._cluster.home.glob("workers/log.*"))
            if written > self._acknowledged[-1][1]:
                self._acknowledged.append((now, written))
            service = self._cluster.service()
            running = {(process.host, process.pid) for process in self._cluster.postmasters()}
            self.postmasters.append(running)
            if service and service == self._cluster.service() and service not in {host for host, _pid in running}:
                self.stale += now - before
            before = now

    def most(self) -> int:
        """Return the largest number of servers that ran at once."""
        return max(map(len, self.postmasters))

    def gap(self, since: float) -> float:
        """Return the longest time without an acknowledged trial."""
        times = [since, *(moment for moment, _written in self._acknowledged if moment > since)]
        return max(after - before for before, after in zip(times, times[1:]))

    def wait_for_acknowledgement(self, seconds: float) -> None:
        now = time.monotonic()
        eventually(lambda: self._acknowledged[-1][0] > now, seconds)


class Workers:
    """Workers of one study on a host, from the beginning of a ``with`` block to its end.

    Plain Optuna, configured by the URL alone. When the server goes away, six workers are in their objective and two
    between trials, so that their next call is tell or ask. Heartbeats are compared by the database's clock, so a worker
    must not be taken for dead, whatever its time zone.
    """

    # All of them with Optuna's default sampler, which reads all trials, would take the whole machine.
    OPTIONS = (*["--seconds=1 --random"] * 4, *["--pause=1 --random"] * 2, *["--seconds=1 --heartbeat"] * 2)
    ZONES = ["UTC"] * 6 + ["Asia/Tokyo", "America/New_York"]
    # For long tests beside others: as many workers, fewer trials.
    CALM = (*["--seconds=3 --random"] * 5, *["--pause=3 --random"] * 2, "--seconds=5 --heartbeat")

    def __init__(self, cluster: MiniCluster, host: str, options: Sequence[str] = OPTIONS) -> None:
        self._cluster, self._host, self._options = cluster, host, options
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Workers:
        folder = self._cluster.home / "workers"
        shutil.rmtree(folder, ignore_errors=True)
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests" / "workers", folder, ignore=without)
        # The same layout as pip installs.
        shutil.copytree(ROOT / "client/src/hpc_db_client", folder / "hpc_db_client", ignore=without)
        about = folder / "hpc_db_client-0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hpc-db-client\nVersion: 0\n")
        (about / "entry_points.txt").write_text("[sqlalchemy.plugins]\nhpc_db = hpc_db_client.plugin:HpcDb\n")
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, 20001, 20001)
        self._started = [
            self._cluster.start(
                self._host, f"exec >workers/output.{number} 2>&1; export PGTZ={zone}; exec {WORKER}", PLUGIN_URL,
                "100000", str(number), *options.split(),
            )
            for number, (options, zone) in enumerate(zip(self._options, self.ZONES))
        ]
        return self

    def __exit__(self, *_unused: object) -> None:
        for process in self._cluster.processes("python3"):
            if "workers/worker.py" in process.command:
                os.kill(process.pid, 15)
        for worker in self._started:
            worker.communicate(timeout=20)

    def check(self) -> None:
        """Check that no worker has ended, and that all acknowledged trials are in the database, each once."""
        compared = self._cluster.run(COMPARE, URL)
        assert re.search(r" lost=0 doubled=0 ", compared), compared
        ended = [f"workers/output.{number}" for number, worker in enumerate(self._started) if worker.poll() is not None]
        assert not ended, self._cluster.run('tail -v -n 40 "$@"', *ended)

    def check_ended(self) -> None:
        """Check that only trials of the ended workers are unfinished, or finished but not acknowledged."""
        left = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", self._cluster.run(COMPARE, URL))}
        assert left["failed"] == 0
        assert left["running"] + left["complete"] - left["acknowledged"] <= len(self._started), left

    def said(self) -> list[str]:
        """Return all lines that the workers have printed."""
        return [line for path in self._cluster.home.glob("workers/output.*") for line in path.read_text().splitlines()]
