# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PgBouncer and Optuna's storage proxy as sidecars of postgres, on the test cluster: more workers than connections."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from target import CLUSTER, Target

JOB = {"partition": "work", "time": "01:00:00", "mem": "1000M", "nodelist": "c1"}
SETTINGS = {
    "server_job_options": JOB, "databases_workers": 20, "server_pooler": True, "server_pooler_connections": 5,
    "server_proxy": True, "server_proxy_connections": 3,
    "databases_studies": [{"name": "mala", "studies": [{"name": "beryllium"}]}],
}
PYTHON = "PYTHONPATH=/srv/client hpc_db/hpc_db/python/bin/python -W ignore"
POOLED = "postgresql+psycopg2:///?service=hpc_db-pooled"

# Workers that start together, each with its own storage; threads stand for processes. Their trials continue as long as
# there is a file "hold".
WORKERS = """
import os, sys, threading, time
import optuna
from sqlalchemy.dialects import plugins
from hpc_db_client import proxy

optuna.logging.disable_default_handler()
plugins.register("hpc_db", "hpc_db_client.plugin", "HpcDb")
url, workers, trials = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start, errors = threading.Barrier(workers), []

def objective(trial):
    while os.path.exists("hold"):
        time.sleep(0.1)
    return trial.suggest_float("x", 0, 1)

def work():
    start.wait()
    try:
        storage = proxy.storage("hpc_db") if url == "proxy" else url
        study = optuna.load_study(storage=storage, study_name="beryllium", sampler=optuna.samplers.RandomSampler())
        study.optimize(objective, n_trials=trials)
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _worker in range(workers)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(errors), "errors", *set(map(repr, errors)))
"""

# Connection attempts from within the cluster by clients other than the one with the certificate.
STRANGERS = """
import json, os, sys
import grpc

with open("hpc_db/hpc_db/run/endpoint.json") as stream:
    proxy = json.load(stream)["proxy"]
def read(path):
    with open(path, "rb") as stream:
        return stream.read()
trusted = read("hpc_db/hpc_db/secrets/proxy.crt")
own = read("hpc_db/hpc_db/secrets/proxy.key")
other = read("other.key"), read("other.crt")
name = [("grpc.ssl_target_name_override", "hpc-db")]
address = "%s:%s" % (proxy["host"], proxy["port"])
for who, channel in (
    ("nobody", grpc.insecure_channel(address)),
    ("no certificate", grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), name)),
    ("another certificate", grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted, *other), name)),
    ("ours", grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted, own, trusted), name)),
):
    ask = channel.unary_unary("/optuna.StorageService/GetAllStudies")
    try:
        print(who, "was told", len(ask(b"", timeout=20)) > 0)
    except grpc.RpcError as error:
        print(who, error.code().name)
"""


@pytest.fixture(scope="module")
def instance(mini: Target) -> Iterator[Target]:
    """The instance with both sidecars, and the tests' programs in alice's home directory."""
    played = mini.play("hpc_db", SETTINGS)
    assert re.search(r"^mini .* failed=0", played.stdout, re.MULTILINE), played.stdout
    assert f"\n{POOLED}&plugin=hpc_db\n" in played.stdout
    for name, text in (("workers.py", WORKERS), ("strangers.py", STRANGERS)):
        mini.run(f"cat > {name} <<'EOF'\n{text}\nEOF")
    eventually(lambda: {"pooler", "proxy"} <= set(endpoint(mini)))
    yield mini


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def endpoint(mini: Target) -> dict:
    return json.loads(mini.run("cat hpc_db/hpc_db/run/endpoint.json 2>/dev/null || echo '{}'"))


def at_c1(mini: Target, script: str) -> str:
    command = [str(CLUSTER), "exec", "c1", "--", "sh", "-c", script]
    return subprocess.run(command, env=mini.environment, check=True, capture_output=True, text=True).stdout.strip()


def trials(mini: Target) -> Counter[str]:
    counted = mini.run("psql -XAtF ' ' service=hpc_db -c 'SELECT state, count(*) FROM trials GROUP BY 1'")
    return Counter({state: int(count) for state, count in (line.split() for line in counted.splitlines())})


@pytest.mark.parametrize("url", [f"{POOLED}&plugin=hpc_db", "proxy"])
def test_more_workers_than_connections_start_together(url: str, instance: Target) -> None:
    before = trials(instance)["COMPLETE"]

    said = instance.run(f"{PYTHON} workers.py '{url}' 16 2")

    assert said.splitlines()[-1] == "0 errors"
    assert trials(instance)["COMPLETE"] == before + 32
    held = instance.run("psql -XAt service=hpc_db -c \"SELECT count(*) FROM pg_stat_activity WHERE usename = 'study'\"")
    assert int(held) <= 5 + 3 + 1 + 1  # the pooler's, the proxy's with its spare connection, and the session that asks


def test_pooler_lets_only_the_study_role_in(instance: Target) -> None:
    refused = {
        "passfile=/dev/null": "no password supplied",
        "passfile=guessed": "authentication failed",
        "sslmode=disable": "SSL required",
        "sslrootcert=other.crt": "certificate verify failed",
        "user=alice": "login rejected",  # has all rights, and a password
        "dbname=postgres": "login rejected",
    }
    instance.run(
        "umask 077; echo '*:*:*:study:guessed' > guessed; openssl req -x509 -batch -nodes -newkey rsa:2048"
        " -subj /CN=hpc-db -keyout other.key -out other.crt 2>/dev/null"
    )
    tries = " ".join(f"'{options}'" for options in ["dbname=mala", *refused])

    said = instance.run(
        f"for each in {tries}; do"
        " psql -XAt \"service=hpc_db-pooled $each\" -c 'SELECT current_user' 2>&1 | tail -n 1; done"
    ).splitlines()

    assert said[0] == "study"
    wrong = [(options, line) for (options, reason), line in zip(refused.items(), said[1:]) if reason not in line]
    assert len(said) == 1 + len(refused) and not wrong, said


def test_proxy_serves_nobody_without_the_certificate(instance: Target) -> None:
    said = instance.run(f"{PYTHON} strangers.py 2>/dev/null").splitlines()

    assert said == [
        "nobody UNAVAILABLE", "no certificate UNAVAILABLE", "another certificate UNAVAILABLE", "ours was told True"
    ]


def test_trials_go_on_when_the_engines_were_killed(instance: Target) -> None:
    before, published = trials(instance), endpoint(instance)
    ways = {"pooled": f"{POOLED}&plugin=hpc_db", "proxy": "proxy"}
    instance.run("touch hold")
    for name, url in ways.items():
        instance.run(f"({PYTHON} workers.py '{url}' 4 2 > {name}.log 2>&1 &)")
    eventually(lambda: trials(instance)["RUNNING"] == before["RUNNING"] + 8)
    engines = "pgrep -x pgbouncer; pgrep -f '[s]torage_proxy'"
    old = set(at_c1(instance, engines).split())

    at_c1(instance, f"kill -9 {' '.join(old)}")
    instance.run("rm hold")

    for name in ways:
        instance.run(f"until grep -q errors {name}.log; do sleep 0.2; done")
        assert instance.run(f"cat {name}.log").splitlines()[-1] == "0 errors"
    assert trials(instance) == before + Counter({"COMPLETE": 16})
    eventually(lambda: {**endpoint(instance), "since": 0} == {**published, "since": 0})
    assert len(old) == 2 and not old & set(at_c1(instance, engines).split())


def test_benchmark_measures_every_storage(instance: Target) -> None:
    said = instance.run(f"{PYTHON} /srv/bench/storage.py --client /srv/client --quick figures.json 2>&1 || true")

    results = json.loads(instance.run("cat figures.json || echo '{\"results\": []}'"))["results"]
    assert [result["way"] for result in results] == [
        "manual", "direct", "direct, plugin", "pooled", "pooled, plugin", "proxy", "SQLite", "journal"
    ], said
    assert all(result["in"] == 2 and result["ask"] and not result["errors"] for result in results), said


def test_new_password_is_the_pooler_s_too(instance: Target) -> None:
    rotated = instance.play("rotate", SETTINGS)
    assert re.search(r"^mini .* changed=1 .* failed=0", rotated.stdout, re.MULTILINE), rotated.stdout

    eventually(lambda: instance.run("psql -XAt service=hpc_db-pooled -c 'SELECT 1' || true") == "1")


def test_engines_end_with_the_job(instance: Target) -> None:
    instance.run("scancel --name=hpc_db; while squeue --noheader --me | grep -q .; do sleep 0.2; done")

    assert at_c1(instance, "pgrep -x pgbouncer; pgrep -f '[s]torage_proxy'; true") == ""
    assert instance.run("cat .pg_service.conf") == ""
    assert endpoint(instance) == {}
