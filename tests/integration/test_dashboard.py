# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna-dashboard on the workstation, behind a tunnel that follows the server from node to node."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Browser
from target import CLUSTER, Target, Workstation

FOLDER = ".local/share/mala.hpc_db/mini/hpc_db/dashboard"
WORK = """
import optuna, sys
optuna.logging.disable_default_handler()
study = optuna.load_study(storage="postgresql+psycopg2:///?service=hpc_db", study_name="beryllium")
study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("n", 1, 8), int(sys.argv[1]))
"""
# Prints a page of the dashboard, whatever its HTTP status.
ASK = """
import sys, urllib.error, urllib.request
method, address, body = sys.argv[1:]
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(address, body.encode() or None, headers, method=method)
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=100)
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    sys.exit(f"0 {error}")
print(answer.status, answer.read().decode())
"""
# Prints one line for each statement that the read-only role tries over its own connection.
TRY = """
import json, psycopg2, sys
for database, statement in json.loads(sys.argv[1]):
    try:
        connection = psycopg2.connect(f"service=hpc_db dbname={database}")
        connection.autocommit = True
        with connection.cursor() as cursor:
            for each in statement.split(";"):
                cursor.execute(each)
        print("ALLOWED")
    except psycopg2.Error as error:
        print(" ".join(str(error).split()))
"""
WRITABLE = "SET default_transaction_read_only = off"
FORBIDDEN = {
    ("mala", "DELETE FROM trials"): "cannot execute DELETE in a read-only transaction",
    ("mala", f"{WRITABLE}; DELETE FROM trials"): "permission denied for table trials",
    ("mala", f"{WRITABLE}; ALTER TABLE trials ADD COLUMN mine int"): "must be owner of table trials",
    ("mala", f"{WRITABLE}; CREATE TABLE mine ()"): "permission denied for schema public",
    ("mala", f"{WRITABLE}; CREATE TEMPORARY TABLE mine ()"): "permission denied to create temporary tables",
    ("mala", f"{WRITABLE}; SELECT lo_from_bytea(0, 'mine')"): "permission denied for function lo_from_bytea",
    ("mala", f"{WRITABLE}; SELECT pg_advisory_lock(1)"): "permission denied for function pg_advisory_lock",
    ("mala", "SELECT rolpassword FROM pg_authid"): "permission denied for table pg_authid",
    ("mala", "SELECT pg_read_file('/etc/hostname')"): "permission denied for function pg_read_file",
    ("mala", "COPY trials TO PROGRAM 'cat'"): "pg_execute_server_program role",
    ("alice", "SELECT 1"): "no pg_hba.conf entry",
    ("postgres", "SELECT 1"): "no pg_hba.conf entry",
}


def eventually(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a condition; a loaded machine takes ten times as long as an idle one."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


class CommandLines:
    """Collects every command line of every host, five times a second."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.seen: set[bytes] = set()

    def __enter__(self) -> set[bytes]:
        self._thread.start()
        return self.seen

    def __exit__(self, *_unused: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(process.read_bytes())
                except OSError:
                    pass  # the process has ended


class Dashboard:
    """The instance on the cluster, and its owner's view of it on the workstation."""

    def __init__(self, mini: Target, workstation: Workstation) -> None:
        self.mini, self.workstation = mini, workstation
        self.said: list[str] = []
        self.addresses: dict[str, str] = {}
        self.command_lines: set[bytes] = set()

    def play(self, name: str, settings: dict | None = None, *options: str) -> str:
        """Run a playbook on the workstation; it must succeed."""
        played = self.workstation.play(name, settings, *options)
        assert played.returncode == 0, played.stdout + self.log("tunnel")
        self.said.append(played.stdout)
        shown = r"^optuna-dashboard shows (\w+): (http://\S+:\d+/)$"
        self.addresses.update(re.findall(shown, played.stdout, re.MULTILINE))
        return played.stdout

    def work(self, trials: int) -> None:
        """Run trials on the login node."""
        self.mini.run(f"hpc_db/hpc_db/python/bin/python -W ignore -c {shlex.quote(WORK)} {trials}")

    def ask(self, path: str, method: str = "GET", body: str = "", database: str = "mala") -> tuple[int, dict]:
        """Query the dashboard's API; return the status and the answer. The status is 0 if there is no answer."""
        words = ["python3", "-c", ASK, method, self.addresses[database] + path, body]
        status, _space, said = self.workstation.run(f"{shlex.join(words)} 2>&1 || :").partition(" ")
        try:
            return int(status), json.loads(said)
        except ValueError:
            return int(status), {"reason": said}

    def studies(self, database: str = "mala") -> dict[str, int]:
        """Return the id of each study."""
        status, answer = self.ask("api/studies", database=database)
        assert status == 200, answer
        return {study["study_name"]: study["study_id"] for study in answer["study_summaries"]}

    def trials(self) -> int:
        """Return the number of trials that the dashboard reports."""
        status, answer = self.ask("api/studies/1")
        return len(answer["trials"]) if status == 200 else -1

    def try_as_reader(self, statements: list[tuple[str, str]]) -> list[str]:
        """Return the result of each statement, run over the tunnel as the read-only role."""
        words = [f"{FOLDER}/python/bin/python", "-c", TRY, json.dumps(statements)]
        return self.workstation.run(f"PGSERVICEFILE={FOLDER}/pg_service.conf {shlex.join(words)}").splitlines()

    def endpoint(self) -> dict:
        return json.loads(self.mini.run("cat hpc_db/hpc_db/run/endpoint.json 2>/dev/null || echo '{}'"))

    def log(self, name: str) -> str:
        return self.workstation.run(f"cat {FOLDER}/{name}.log || :")

    def cluster(self, *words: str) -> None:
        """Apply an action to a host."""
        subprocess.run([str(CLUSTER), *words], env=self.mini.environment, check=True, capture_output=True, timeout=100)


@pytest.fixture(scope="module")
def dashboard(mini: Target, workstation: Workstation, bindir: Path) -> Dashboard:
    """The dashboard, started for an instance with 20 trials; PostgreSQL is Debian's."""
    dashboard = Dashboard(mini, workstation)
    provider = {"postgres_provider": "system", "postgres_bindir": str(bindir), "postgres_major": int(bindir.parts[-2])}
    dashboard.play("hpc_db", provider)
    dashboard.work(20)
    with CommandLines() as dashboard.command_lines:
        dashboard.play("dashboard", None, "-vvv")
    return dashboard


@pytest.fixture(scope="module")
def page(browser: Callable[..., Browser], workstation: Workstation) -> Browser:
    """A browser on the workstation."""
    return browser(workstation)


def test_api_has_the_studies_of_each_database(dashboard: Dashboard) -> None:
    assert list(dashboard.addresses) == ["mala", "second"]
    assert dashboard.studies() == {"beryllium": 1, "aluminium": 2, "two objectives": 3}
    assert dashboard.studies("second") == {}
    assert dashboard.trials() == 20


def test_found_again(dashboard: Dashboard) -> None:
    addresses = dict(dashboard.addresses)

    said = dashboard.play("dashboard")

    assert re.search(r"^mini .* changed=0 .* failed=0", said, re.MULTILINE), said
    assert dashboard.addresses == addresses


def test_page_has_the_study_and_draws_it(dashboard: Dashboard, page: Browser) -> None:
    page.open(dashboard.addresses["mala"])
    page.wait_for_text("beryllium")
    page.open(f"{dashboard.addresses['mala']}dashboard/studies/1/trials")
    page.wait_for_text("20 Trials")
    page.open(f"{dashboard.addresses['mala']}dashboard/studies/1")
    page.wait_for_text("Hyperparameter Importance")
    page.wait_for(lambda: len(page.find(".js-plotly-plot .scatterlayer .points path")) >= 20)
    page.screenshot("dashboard", 1250)


def test_reader_changes_nothing(dashboard: Dashboard, bindir: Path) -> None:
    make = 'CREATE TABLE {0} AS SELECT 7 AS x'
    for role in ("alice", "study"):
        psql = [str(bindir / "psql"), f"service=hpc_db user={role} dbname=mala", "-qc", make.format(f"of_{role}")]
        dashboard.mini.run(shlex.join(psql))
    allowed = [("mala", "SELECT * FROM of_alice"), ("mala", "SELECT * FROM of_study")]

    said = dashboard.try_as_reader([*FORBIDDEN, *allowed])

    assert [text for text, wanted in zip(said, FORBIDDEN.values()) if wanted not in text] == []
    assert said[len(FORBIDDEN):] == ["ALLOWED", "ALLOWED"]
    for method, path, body in (("DELETE", "api/studies/1", "{}"),
                               ("POST", "api/studies", '{"study_name": "mine", "directions": ["minimize"]}'),
                               ("PUT", "api/studies/1/note", '{"body": "mine", "version": 1}')):
        assert dashboard.ask(path, method, body) == (500, {"reason": "internal server error"})
    assert (list(dashboard.studies()), dashboard.trials()) == (["beryllium", "aluminium", "two objectives"], 20)


def test_password_is_in_its_files_only(dashboard: Dashboard) -> None:
    password = dashboard.mini.run("grep :reader: hpc_db/hpc_db/secrets/pgpass").rpartition(":")[2]
    private = f"{FOLDER} {FOLDER}/pgpass {FOLDER}/pg_service.conf {FOLDER}/tunnel.log {FOLDER}/tunnel.json"

    assert len(password) > 40
    lines = dashboard.command_lines
    assert any(b"files/dashboard.py" in line for line in lines) and any(b"tunnel.py" in line for line in lines)
    assert not any(password.encode() in line for line in lines)
    assert not any(password in said for said in dashboard.said)
    found = dashboard.workstation.run(f"grep -rl --exclude-dir=python {password} .local .ansible .config || :")
    assert found == f"{FOLDER}/pgpass"
    assert dashboard.workstation.run(f"stat -c %a {private}").split() == ["700", "600", "600", "600", "600"]
    service = dashboard.workstation.run(f"cat {FOLDER}/pg_service.conf").split()
    assert {"channel_binding=require", "sslmode=require", "require_auth=scram-sha-256", "user=reader"} < set(service)


def test_follows_the_server_to_another_node(dashboard: Dashboard, page: Browser) -> None:
    page.open(f"{dashboard.addresses['mala']}dashboard/studies/1/trials")
    page.wait_for_text("20 Trials")
    before = dashboard.endpoint()
    drain = ["scontrol", "update", f"nodename={before['host']}", "state=drain", "reason=test"]
    dashboard.cluster("exec", "ctl", "--", *drain)
    dashboard.mini.run(f"scancel {before['job']}")
    eventually(lambda: dashboard.endpoint().get("host", before["host"]) != before["host"])
    dashboard.work(5)

    eventually(lambda: dashboard.trials() == 25)

    page.wait_for_text("25 Trials")  # the open page polls by itself
    assert f"forwards to {dashboard.endpoint()['host']} port" in dashboard.log("tunnel")


def test_login_node_is_cut_off_and_back(dashboard: Dashboard) -> None:
    lost = dashboard.log("tunnel").count("is lost")
    dashboard.cluster("cut", "login")
    eventually(lambda: dashboard.log("tunnel").count("is lost") > lost)
    dashboard.cluster("heal", "login")
    dashboard.work(5)

    eventually(lambda: dashboard.trials() == 30)


def test_new_password_is_taken_over(dashboard: Dashboard) -> None:
    with CommandLines() as seen:
        dashboard.play("rotate")
    password = dashboard.mini.run("grep :reader: hpc_db/hpc_db/secrets/pgpass")

    eventually(lambda: dashboard.workstation.run(f"cat {FOLDER}/pgpass") == password)

    assert dashboard.try_as_reader([("mala", "SELECT 1")]) == ["ALLOWED"]
    assert not any(password.rpartition(":")[2].encode() in line for line in seen)


def test_refused_in_one_line(dashboard: Dashboard) -> None:
    """One host for each case, in a single play."""
    given: dict[str, tuple[dict, str]] = {
        "reader": ({"databases_reader_role": "visitor"}, "databases_reader_role: visitor cannot read mala, second; run"
                   " the playbook hpc_db.yml to grant access (database mala: "),
        "database": ({"dashboard_databases": ["nope"]}, "dashboard_databases: nope is not allowed; names in"),
        "socket": ({"server_address": "socket"}, "server_address: socket with a connection over ssh is not allowed; a"),
        "port": ({"dashboard_port": 80}, "dashboard_port: 80 is not allowed; a port from 1024"),
    }
    host = {"ansible_host": "login", "ansible_user": "alice", "instance_cluster": "mini"}
    hosts = {name: {**host, **settings} for name, (settings, _says) in given.items()}
    inventory = json.dumps({"hpc_db": {"hosts": hosts}})
    dashboard.workstation.run(f"echo {shlex.quote(inventory)} > cases.json")
    trials = dashboard.trials()

    played = dashboard.workstation.play("dashboard", None, "--inventory=~/cases.json", f"--limit={','.join(given)}")

    for name, (_settings, says) in given.items():
        said = re.findall(rf"^(?:fatal|failed): \[{name}\].*(?:\n .*)*", played.stdout, re.MULTILINE)
        assert len(said) == 1 and says in " ".join(said[0].split()), played.stdout
        assert re.search(rf"^{name} .* changed=0 .* failed=1 ", played.stdout, re.MULTILINE), played.stdout
    assert dashboard.trials() == trials


def test_stop_leaves_nothing_that_runs(dashboard: Dashboard) -> None:
    dashboard.play("dashboard", {"dashboard_state": "stopped"})
    again = dashboard.play("dashboard", {"dashboard_state": "stopped"})

    assert re.search(r"^mini .* changed=0 .* failed=0", again, re.MULTILINE), again
    left = dashboard.workstation.run("ps -u alice -o args=")
    assert "dashboard" not in left.replace("ps -u", "") and "BatchMode" not in left, left
    assert dashboard.ask("api/studies")[0] == 0
    assert dashboard.workstation.run("find $TMPDIR -maxdepth 1 -name 'hpc_db-tunnel-*'") == ""
    assert dashboard.workstation.run(f"ls {FOLDER}/pgpass 2>/dev/null || :") == ""
