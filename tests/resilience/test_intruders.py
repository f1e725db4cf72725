# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another user of the cluster can neither log in, nor gain further rights, nor obtain a password."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini_cluster import MiniCluster

Figure = Callable[[str, str], None]
HERE = Path(__file__).parent
PROGRAMS = "/home/mallory/programs"
RUN = f"PYTHONPATH={PROGRAMS} exec python3 -u {PROGRAMS}/"
REFUSED = re.compile("no password supplied|no pg_hba.conf entry|server does not support SSL|Permission denied")
ROLES = ["alice", "study", "reader", "postgres", "mallory"]
DATABASES = ["alice", "mala", "second", "postgres", "template1"]


@pytest.fixture(scope="session")
def programs(cluster: MiniCluster) -> Iterator[Path]:
    """Provide mallory's tools: a client library, and the programs in this folder."""
    folder = cluster.state / "home" / "mallory" / "programs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    cluster.run("exec python3 -m zipfile --extract /srv/wheels/psycopg2_binary-*.whl $1", PROGRAMS, user="root")
    for name in ("intruder.py", "rogue.py"):
        shutil.copy(HERE / name, folder)
    cluster.run("cd $1 && openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=c3 -keyout key -out crt 2>/dev/null"
                " && chown -R mallory .", PROGRAMS, user="root")
    yield folder
    shutil.rmtree(folder)


def read_secrets(cluster: MiniCluster) -> dict[str, str]:
    """Return the passwords by role."""
    lines = (cluster.root / "secrets" / "pgpass").read_text().splitlines()
    return {line.split(":")[3]: line.split(":")[4] for line in lines if line and not line.startswith("#")}


@pytest.fixture
def secrets(cluster: MiniCluster) -> dict[str, str]:
    return read_secrets(cluster)


@pytest.mark.parametrize("row", ["S1", "S2"])
@pytest.mark.usefixtures("programs")
def test_without_a_password(row: str, cluster: MiniCluster, serving: dict, figure: Figure) -> None:
    other = {"c1": "c2", "c2": "c1"}[serving["host"]]
    doors = [f"{serving['host']}:{serving['port']}"]
    if row == "S2":
        doors += [f"127.0.0.1:{serving['port']}", f"{serving['socket']}:{serving['port']}"]
    tried = cluster.run(
        f"{RUN}intruder.py doors \"$@\"", *doors, "--", *ROLES, "--", *DATABASES,
        host=serving["host"] if row == "S2" else other, user="mallory",
    ).splitlines()

    assert len(tried) == len(ROLES) * len(DATABASES) * (5 if row == "S2" else 2)
    assert [attempt for attempt in tried if not REFUSED.search(attempt)] == []
    figure(row, f"{len(tried)} of {len(tried)} attempts refused")


@pytest.mark.usefixtures("programs")
def test_with_a_leaked_password(cluster: MiniCluster, serving: dict, secrets: dict, figure: Figure) -> None:
    own, *beyond = cluster.run(
        f"PGPASSWORD=$1 {RUN}intruder.py leaked $2 study mala", secrets["study"],
        f"{serving['host']}:{serving['port']}", host="c3", user="mallory",
    ).splitlines()

    assert own == "its own database: ALLOWED"
    denied = [attempt for attempt in beyond if "permission denied" in attempt]
    assert (denied, len(beyond)) == (beyond, 8)
    figure("S3", f"{len(denied)} of {len(beyond)} denied")


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.usefixtures("programs")
def test_rogue_server_on_the_old_port(
    tls: bool, cluster: MiniCluster, serving: dict, secrets: dict, figure: Figure
) -> None:
    entry = (cluster.home / ".pg_service.conf").read_text()
    stale = entry.replace(f"host={serving['host']}", "host=c3")
    careless = "".join(line for line in stale.splitlines(True) if not line.startswith(("sslmode", "channel_binding")))
    certificate = f"{PROGRAMS}/crt {PROGRAMS}/key" if tls else ""
    rogue = cluster.start("c3", f"{RUN}rogue.py {serving['port']} {certificate}", user="mallory")
    assert rogue.stdout
    assert rogue.stdout.readline() == "listens\n"

    def connect(service: str) -> str:
        (cluster.home / "stale.conf").write_text(service)
        psql = "PGSERVICEFILE=$HOME/stale.conf hpc_db/hpc_db/postgresql-17/bin/psql service=hpc_db --command='SELECT 1'"
        return cluster.run(f"{psql} || true", host="c2")

    said = connect(stale)
    connect(careless)  # shows that the rogue works
    (program,) = [process for process in cluster.processes("python3") if f"{PROGRAMS}/rogue.py" in process.command]
    os.kill(program.pid, signal.SIGKILL)
    *caught, careless_caught = re.findall(r"^got ?(.*)", rogue.communicate()[0], re.MULTILINE)
    (cluster.home / "stale.conf").unlink()

    password = secrets["study"].encode().hex()
    assert password in careless_caught
    assert caught and not any(caught), said
    figure("S4", f"{'with' if tls else 'without'} TLS: no byte of an answer to a request for the password")


def test_secrets_stay_in_their_file(cluster: MiniCluster, serving: dict, secrets: dict, figure: Figure) -> None:
    over = threading.Event()
    seen: set[bytes] = set()

    def watch() -> None:
        while not over.wait(0.01):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:
                    continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    played = [cluster.playbooks.play(name, None, "-vvv") for name in ("rotate", "hpc_db")]
    over.set()
    watcher.join()
    assert [each.returncode for each in played] == [0, 0], played[0].stdout

    rotated = read_secrets(cluster)
    assert rotated.keys() == secrets.keys() and not set(rotated.values()) & set(secrets.values())
    for secret in (*secrets.values(), *rotated.values()):
        assert not any(secret.encode() in command for command in seen)
        assert not any(secret in each.stdout for each in played)
        search = ["grep", "-rlF", "--", secret, str(cluster.home)]
        found = subprocess.run(search, capture_output=True, text=True, check=False)
        assert found.stdout.splitlines() in ([], [str(cluster.root / "secrets" / "pgpass")])
        assert secret not in cluster.run("scontrol show job; scontrol write batch_script $1 -", serving["job"])
    figure("S5", f"0 hits in {len(seen)} command lines, in the output of 2 plays with -vvv, job, scripts and logs")


def test_nothing_is_open_to_others(cluster: MiniCluster, figure: Figure) -> None:
    # Skips the conda packages' own files, which nobody else can reach below the private root.
    look = "find $@ -path '*/postgresql-17' -prune -o -user alice \\( -type f -o -type d \\) -perm /077 -print"
    shared = cluster.run(look, "hpc_db/hpc_db", ".pg_service.conf").splitlines()
    on_nodes = [cluster.run(look, "/tmp", "/dev/shm", host=host) for host in ("login", "c1", "c2")]

    assert (shared[:10], on_nodes) == ([], [""] * 3), f"{len(shared)} files"
    figure("S6", "0 files")
