# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The test cluster behaves like a real one, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cluster needs root")

PROGRAM = Path(__file__).with_name("cluster")
HOSTS = ["ctl", "login", "c1", "c2"]
NAMESPACES = [f"/proc/self/ns/{name}" for name in ("ipc", "mnt", "net", "pid", "uts")]


class Cluster:
    def __init__(self, name: str) -> None:
        self.state = Path(f"/tmp/hpc-db-{name}-{os.getpid()}")

    def try_(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAM), verb, "--state", str(self.state), *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)

    def __call__(self, verb: str, *arguments: str) -> str:
        done = self.try_(verb, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def ssh(self, *command: str, program: str = "ssh", stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, "-F", str(self.state / "ssh_config"), "login", *command],
                              input=stdin, capture_output=True, text=True, timeout=60)

    def reaches(self, source: str, target: str, port: int) -> bool:
        look = f"import socket; socket.create_connection(('{target}', {port}), timeout=2)"
        return self.try_("exec", source, "--", "/usr/bin/python3", "-c", look).returncode == 0

    def node(self, name: str) -> str:
        return self("exec", "ctl", "--", "sinfo", "-h", "-n", name, "-p", "work", "-o", "%T")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster("test")
    cluster("up", "--nodes", "2")
    yield cluster
    cluster("down")


@pytest.fixture
def another() -> Iterator[Cluster]:
    """Yield a second cluster that is not up yet."""
    cluster = Cluster("another")
    yield cluster
    cluster("down")


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_runs_a_job_that_writes_to_the_shared_home(cluster: Cluster) -> None:
    submitted = cluster.ssh("sbatch --parsable --output=job.out --wrap 'echo $USER on $(hostname)'")

    assert submitted.returncode == 0, submitted.stderr
    output = cluster.state / "home/alice/job.out"
    assert eventually(lambda: output.exists() and output.read_text() in ("alice on c1\n", "alice on c2\n"))
    assert cluster("exec", "c2", "--user", "alice", "--", "cat", "job.out") == output.read_text().strip()


def test_a_cable_can_be_as_slow_as_a_long_one(cluster: Cluster) -> None:
    def connect() -> float:
        look = "import socket, time; t = time.time(); socket.create_connection(('login', 22)); print(time.time() - t)"
        return float(cluster("exec", "workstation", "--", "/usr/bin/python3", "-c", look))

    cluster("delay", "login", "200")
    try:
        assert connect() >= 0.2
        sent = cluster.ssh("head -c 300000 /dev/zero")
        assert (sent.returncode, len(sent.stdout)) == (0, 300000)
        assert "give 0 to 10000" in cluster.try_("delay", "login", "10001").stderr
    finally:
        cluster("delay", "login", "0")

    assert eventually(lambda: connect() < 0.2)


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    found = cluster.ssh(f"srun --nodes=2 sh -c 'echo $(hostname) $(readlink {' '.join(NAMESPACES)}) $$'")

    first, second = (line.split() for line in sorted(found.stdout.splitlines()))
    assert (first[0], second[0]) == ("c1", "c2")
    assert len({*first, *second}) == 2 * 7


@pytest.mark.parametrize("host", [*HOSTS, "workstation"])
def test_users_are_the_same_everywhere(cluster: Cluster, host: str) -> None:
    assert cluster("exec", host, "--user", "alice", "--", "id", "-un", "20001") == "alice"
    assert cluster.try_("exec", host, "--user", "mallory", "--", "ls", "/home/alice").returncode != 0


def test_workstation_reaches_only_the_login_node(cluster: Cluster) -> None:
    assert cluster.reaches("workstation", "login", 22)
    assert cluster.reaches("login", "c1", 6818)
    assert cluster.reaches("c1", "login", 22)
    assert not cluster.reaches("workstation", "c1", 6818)
    assert "unreachable" in cluster.try_("connect", "c1", "6818").stderr


def test_transfers_files(cluster: Cluster) -> None:
    assert cluster.ssh(program="sftp", stdin=f"put {PROGRAM} copy\n").returncode == 0
    assert (cluster.state / "home/alice/copy").read_bytes() == PROGRAM.read_bytes()


def test_refuses_a_bad_partition(cluster: Cluster) -> None:
    refused = cluster.ssh("sbatch --partition=nonsense --wrap true")

    assert refused.returncode == 1
    assert "invalid partition" in refused.stderr


def test_a_killed_node_comes_back(cluster: Cluster) -> None:
    cluster("kill", "c1")
    assert "c1 is not up" in cluster.try_("exec", "c1", "--", "true").stderr
    assert not cluster.reaches("login", "c1", 6818)

    cluster("boot", "c1")
    assert cluster.reaches("login", "c1", 6818)
    assert eventually(lambda: cluster.node("c1") == "idle")


def test_a_cut_node_lives_on(cluster: Cluster) -> None:
    cluster("cut", "c2")
    assert not cluster.reaches("login", "c2", 6818)
    assert cluster("exec", "c2", "--", "hostname") == "c2"

    cluster("heal", "c2")
    assert cluster.reaches("login", "c2", 6818)
    assert eventually(lambda: cluster.node("c2") == "idle")


def test_who_missed_a_host_reaches_it_once_it_is_healed(cluster: Cluster) -> None:
    cluster("cut", "login")
    assert "No route to host" in cluster.try_("connect", "login", "22").stderr
    missed = subprocess.Popen([str(PROGRAM), "connect", "login", "22", "--state", str(cluster.state)],
                              stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2.8)  # its network asks for the host three times, one second apart, and gives up a second later
        cluster("heal", "login")
        assert cluster.reaches("workstation", "login", 22)
    finally:
        missed.wait(30)


def test_the_controller_remembers_jobs(cluster: Cluster) -> None:
    submitted = time.time()
    job = cluster.ssh("sbatch --parsable --hold --wrap true").stdout.strip()
    saved = cluster.state / "spool/job_state"
    assert eventually(lambda: saved.exists() and saved.stat().st_mtime > submitted)
    cluster("kill", "ctl")
    cluster("boot", "ctl")

    assert eventually(lambda: cluster.ssh(f"squeue -h -j {job} -o %T").stdout.strip() == "PENDING")
    cluster.ssh(f"scancel {job}")


def test_starts_only_once(cluster: Cluster) -> None:
    again = cluster.try_("up")

    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
    assert "already up" in again.stderr


def test_says_why_it_cannot_start(another: Cluster) -> None:
    failed = another.try_("up", "--slurm", "Nonsense=1")

    assert failed.returncode == 1
    assert "unrecognized key: Nonsense" in failed.stderr
    assert not another.state.exists()
    assert not processes(another.state, set())


def test_down_leaves_nothing(another: Cluster) -> None:
    before = machine()
    another("up", "--nodes", "1", "--mount", "/usr/share:/srv/share")
    used = {namespace for host in ("ctl", "login", "c1", "workstation") for namespace in
            another("exec", host, "--", "readlink", *NAMESPACES).splitlines()}
    assert len(used - namespaces(Path("/proc/self"))) == 4 * len(NAMESPACES)
    assert machine() == before
    there = set(os.listdir("/usr/share"))
    assert all(set(another("exec", host, "--", "ls", "-A", "/srv/share").splitlines()) == there
               for host in ("login", "c1", "workstation"))
    session = subprocess.Popen(["ssh", "-F", another.state / "ssh_config", "login", "echo in; sleep 60"],
                               stdout=subprocess.PIPE)
    assert session.stdout and session.stdout.readline() == b"in\n"

    another("down")
    another("down")

    session.communicate(timeout=10)
    assert machine() == before
    assert not another.state.exists()
    assert not processes(another.state, used)


def machine() -> tuple[str, list[str]]:
    """Return the mounts and network interfaces in this machine's own namespaces."""
    return Path("/proc/mounts").read_text(), sorted(os.listdir("/sys/class/net"))


def processes(state: Path, used: set[str]) -> list[Path]:
    """Return the processes in one of the ``used`` namespaces, or with the ``state`` directory on their command line."""
    return [process for process in Path("/proc").glob("[0-9]*")
            if namespaces(process) & used or str(state) in command_line(process)]


def namespaces(process: Path) -> set[str]:
    try:
        return {os.readlink(path) for path in (process / "ns").iterdir()}
    except OSError:  # it has ended
        return set()


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""
