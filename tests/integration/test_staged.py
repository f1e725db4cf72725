# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A login node without access to channels and wheels: the workstation solves, fetches and uploads everything.

Then, on that instance: the holders of connections, and the doctor's findings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from target import CLUSTER, ROOT, Target

JOB = {"partition": "work", "time": "01:00:00", "mem": "1000M"}
URL = "postgresql+psycopg2:///?service=hpc_db&plugin=hpc_db"
ASK = '~/hpc_db/hpc_db/postgresql-17/bin/psql "service=hpc_db user=alice dbname=mala" -Atc "show server_version"'
ENDPOINT = "hpc_db/hpc_db/run/endpoint.json"


def test_workstation_brings_everything(mini: Target, tmp_path: Path) -> None:
    workstation = tmp_path / "of root alone"
    workstation.mkdir(mode=0o700)
    shutil.copytree(ROOT / ".cache/channel", workstation / "channel", ignore=shutil.ignore_patterns("wheels", "*-18.*"))
    shutil.copytree(ROOT / ".cache/wheels", workstation / "wheels")
    mini.environment["XDG_CACHE_HOME"] = str(workstation / "cache")
    lock_file = workstation / "postgresql-17.lock"
    settings = {
        "postgres_staged": "true",  # a string, as with -e postgres_staged=true
        "postgres_channels": [(workstation / "channel").as_uri()],
        "postgres_python_wheelhouse": str(workstation / "wheels"),
        "databases_studies": [{"name": "mala", "studies": [{"name": "beryllium"}]}],
        "client_environment": "~/env",
        "server_pooler": "true", "server_proxy": "yes",
    }
    for folder in ("channel/linux-64", "wheels"):
        assert mini.run(f"ls '{workstation}/{folder}' 2>/dev/null || echo unreadable") == "unreadable"
    mini.run("python3 -m venv env")
    before = mini.files()

    planned = mini.play("hpc_db", settings, "--check")
    assert planned.returncode == 0, planned.stdout
    assert mini.files() == before and not (workstation / "cache").exists()

    played = mini.play("hpc_db", {**settings, "postgres_lock_file": str(lock_file)})
    assert played.returncode == 0, played.stdout
    assert mini.run(ASK) == "17.10"
    mini.run(f"until grep -q pooler {ENDPOINT} && grep -q proxy {ENDPOINT}; do sleep 0.2; done")
    assert mini.run(ASK.replace("service=hpc_db user=alice", "service=hpc_db-pooled")) == "17.10"
    assert mini.run("cd ~/hpc_db/hpc_db; ls -d staged */*.packages 2>/dev/null || :") == ""
    locked = re.findall(r"^\S+(?=#sha256:)", lock_file.read_text(), re.MULTILINE)
    begin = f"{(workstation / 'channel').as_uri()}/linux-64"
    assert [url.rpartition("-")[0] for url in locked] == [f"{begin}/libpq-17.10", f"{begin}/postgresql-17.10"]

    assert mini.run("env/bin/python -c 'import hpc_db_client, psycopg2, sqlalchemy' && env/bin/pip check") == (
        "No broken requirements found."
    )
    assert re.search(rf"^{re.escape(URL)}$", played.stdout, re.MULTILINE), played.stdout

    again = mini.play("hpc_db", settings)  # without the lock file
    assert re.search(r"^mini .* changed=0 .* failed=0", again.stdout, re.MULTILINE), again.stdout


# One idle connection, one that is stuck in a transaction, and then as many as the server accepts.
HOLD = """
import sys, psycopg2
held = [psycopg2.connect("service=hpc_db") for _each in range(2)]
held[0].autocommit = True
for connection in held:
    connection.cursor().execute("SELECT 1")
print("ready", flush=True)
for _line in sys.stdin:
    refused = 0
    while refused < 8:
        try:
            held.append(psycopg2.connect("service=hpc_db"))
        except psycopg2.OperationalError:
            refused += 1
    print("full", flush=True)
"""
# A younger connection may belong to a job that has just started.
OLD_ENOUGH = (
    '~/hpc_db/hpc_db/postgresql-17/bin/psql "service=hpc_db user=alice dbname=mala" -Atc '
    "\"select clock_timestamp() - max(backend_start) > '10 s' from pg_stat_activity where usename = 'study'\""
)


@pytest.fixture
def outside_of_any_job(mini: Target) -> Iterator[subprocess.Popen]:
    """A process on a compute node outside alice's jobs; a line on its standard input makes it take all connections."""
    python = "/home/alice/hpc_db/hpc_db/python/bin/python"
    command = [str(CLUSTER), "exec", "c2", "--user", "alice", "--", python, "-c", HOLD]
    process = subprocess.Popen(
        command, env=mini.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    yield process
    assert process.stdin
    process.stdin.close()
    assert process.wait(60) == 0


def report(mini: Target, settings: dict) -> tuple[int, str]:
    """Return the doctor's exit status and report, after checking that it leaves nothing behind."""
    played = mini.play("doctor", {"client_environment": "~/env", **settings})
    assert mini.run("ls -A hpc_db/hpc_db | grep doctor || :") == ""
    assert " changed=0 " in played.stdout
    found = re.search(r"^hpc_db on mini: .*(?:\n  .*)*", played.stdout, re.MULTILINE)
    assert found, played.stdout
    return played.returncode, found[0]


def parts(text: str) -> dict[str, str]:
    """Return the findings by place; each fix is on the line of its problem."""
    found = re.findall(r"^  ((?:the|login|compute) \S+).*\n((?:    .*(?:\n|$))*)", text, re.MULTILINE)
    return {name: re.sub(r"\n +fix: ", " -> ", part) for name, part in found}


def test_who_holds_them_and_what_the_doctor_says(mini: Target, outside_of_any_job: subprocess.Popen) -> None:
    # The environment finds Optuna in another folder, as with a site's own packages.
    mini.run("echo ~/hpc_db/hpc_db/python/lib/python3*/site-packages > more.pth && mv more.pth env/lib/python3*/site-*")
    status, well = report(mini, {})

    assert status == 0 and " no problems found\n" in well, well
    assert re.search(r"^  login node login\n(?:.*\n)+  compute node c[12]\n", well, re.MULTILINE), well
    versions = r"Python 3.* psycopg2 2.* SQLAlchemy 2.* Optuna 5.*"
    for name in ("login node", "compute node"):
        part = parts(well)[name]
        assert re.search(r"TLS +TLSv1.[23], with the certificate of this instance", part), well
        assert re.search(rf"workers +{versions} hpc-db-client 0.*; connected, \d+ of 60 connections", part), well

    # More workers than connections, and a password file that others may read.
    assert outside_of_any_job.stdin and outside_of_any_job.stdout
    outside_of_any_job.stdin.write("\n")
    outside_of_any_job.stdin.flush()
    assert outside_of_any_job.stdout.readline() == "full\n"
    mini.run("chmod 644 hpc_db/hpc_db/secrets/pgpass")
    status, ill = report(mini, {"server_job_options": {**JOB, "partition": "nope"}})
    mini.run("chmod 600 hpc_db/hpc_db/secrets/pgpass")

    assert status != 0
    found = parts(ill)
    too_many = r"too many clients: about (5[6-9]|6[0-3]) workers against max_connections 60 \(8 times by c2, .*"
    assert re.search(rf"PROBLEM +log +{too_many} -> databases_workers \(20\): ", found["the server"]), ill
    assert re.search(r"PROBLEM +passwords +\S+ has mode 0644: libpq ignores .* -> chmod 600 ", found["login node"]), ill
    assert re.search(r"PROBLEM +workers +~/env cannot connect: a client sent no pass", found["login node"]), ill
    refused = r"nothing was checked: .*invalid partition .* -> doctor_job_options"
    assert re.search(rf"PROBLEM +job +{refused}", found["compute node"]), ill

    mini.run(f"until {OLD_ENOUGH} | grep -q t; do sleep 0.5; done")
    shown = mini.play("status", {"client_environment": "~/env"}).stdout

    clock = r"00:\d\d:\d\d"
    for line in (
        r"connections  5\d of 60 +\[#{17,19}-{1,3}\]\n  from +c2 +5\d  study",
        rf"stuck +c2 +1  study: idle in transaction on mala for {clock} \(PID \d+\)",
        rf"orphaned +c2 +5\d  study: you have no job there; idle for {clock}",
        rf"URL +{re.escape(URL)}",
    ):
        assert re.search(rf"^  {line}$", shown, re.MULTILINE), shown

    mini.play("stop")
    status, down = report(mini, {"doctor_log_hours": 0})

    assert status != 0
    found = parts(down)
    assert "no server job is queued or running, so the server is down -> the playbook hpc_db.yml" in found["the server"]
    assert "PROBLEM" not in found["login node"] + found["compute node"], down
    assert found["compute node"].count("the server is down") == 6, down
