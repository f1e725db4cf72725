# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""last_run, on a real directory; the answers of scheduler and server can be changed."""

import json
import os
import pwd
import shutil
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.last_run import psql_command, questions, see_last_run

PARAMS = {
    "name": "hpc_db", "scheduler": "slurm", "bin_dir": None, "fingerprint": "one", "roles": ["study", "reader"],
    "environment": None, "databases": [{"name": "studies", "studies": []}],
    "others": [],
}


class Instance:
    """An instance directory, with the answers of Slurm and psql about it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "hpc_db"
        self.queue = "JOBID|STATE\n4711|RUNNING|c1|1:00:00|hpc_db|None\n"
        self.answer = "study|f|f|f|t|f|f|SCRAM\nstudies|study\n"
        self.environment = folder / "env"
        files = {
            "host/settings.json": json.dumps({"bindir": str(self.root / "postgresql-17/bin"), "service": {}}),
            "host/hpc_db_host/lease.py": "lease", "conf/pg_hba.conf": "local all all peer\n",
            "secrets/pgpass": "*:*:*:study:secret\n", "postgresql-17/bin/postgres": "program",
            "postgresql-17/conda-meta/postgresql-17.10-0.json": "{}", "data/17/PG_VERSION": "17\n",
            "python/lib/python3.11/site-packages/optuna-5.0.0.dist-info/METADATA": "Version: 5.0.0",
            "run/endpoint.json": json.dumps({"job": "4711", "host": "c1", "port": 5432}), "log/job.log": "",
            "dumps/old": "",
        }
        for name, text in files.items():
            self.write(name, text)
        package = self.environment / "lib/python3.11/site-packages/hpc_db_client"
        package.mkdir(parents=True)
        (package / "plugin.py").write_text("")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def see(self, state: str = "compared", check_mode: bool = False, **params: object) -> dict:
        given = {**PARAMS, "root": str(self.root), "environment": str(self.environment), "state": state, **params}
        return see_last_run(given, lambda command: self.queue, lambda command: self.answer, check_mode)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path)


@pytest.fixture
def noted(instance: Instance) -> Instance:
    instance.see("noted")
    return instance


def test_is_kept_once_it_is_noted(instance: Instance) -> None:
    assert (instance.see()["kept"], instance.see()["why"]) == (False, "no complete run")

    assert instance.see("noted", check_mode=True)["changed"] is False
    assert not instance.see()["kept"]

    instance.see("noted")
    seen = instance.see()
    assert (seen["kept"], seen["why"], seen["endpoint"]["host"]) == (True, "", "c1")


def test_what_comes_and_goes_is_no_difference(noted: Instance) -> None:
    for name in ("log/postgresql-Mon.log", "dumps/studies.dump", "data/17/postmaster.pid", "workers/study.py",
                 ".doctor-x/job.sh", "run/lease.2", "host/hpc_db_host/__pycache__/lease.pyc"):
        noted.write(name, "new")

    assert noted.see()["kept"]


@pytest.mark.parametrize("name", [
    "conf/pg_hba.conf", "host/settings.json", "host/hpc_db_host/lease.py", "host/new.py", "secrets/pgpass",
    "postgresql-17/bin/postgres", "postgresql-17/bin/new", "postgresql-17/conda-meta/new-1.0-0.json",
    "python/lib/python3.11/site-packages/new.py", "data/17/PG_VERSION",
])
def test_another_file_is_a_difference(noted: Instance, name: str) -> None:
    path = noted.root / name
    text = path.read_text() if path.exists() else ""
    noted.write(name, f"{text} ")

    assert (noted.see()["kept"], noted.see()["why"]) == (False, "files")


@pytest.mark.parametrize("name", ["conf", "log", "secrets/pgpass", "."])
def test_another_mode_is_a_difference(noted: Instance, name: str) -> None:
    path = noted.root / name
    path.chmod(path.stat().st_mode ^ 0o010)

    assert noted.see()["why"] == "files"


@pytest.mark.parametrize("name", [
    "conf/pg_hba.conf", "postgresql-17/conda-meta", "python",
    "python/lib/python3.11/site-packages/optuna-5.0.0.dist-info",
])
def test_a_missing_file_is_a_difference(noted: Instance, name: str) -> None:
    path = noted.root / name
    path.rename(noted.environment / "aside")

    assert noted.see()["why"] == "files"


def test_another_client_package_is_a_difference(noted: Instance) -> None:
    shutil.rmtree(noted.environment)

    assert noted.see()["why"] == "files"


def test_other_settings_are_a_difference_that_asks_nobody(noted: Instance) -> None:
    noted.queue = "no queue at all"

    assert noted.see(fingerprint="two")["why"] == "settings"


def test_what_the_server_says_is_compared(noted: Instance) -> None:
    noted.answer = noted.answer.replace("study|f", "study|t")

    assert noted.see()["why"] == "databases"


@pytest.mark.parametrize("queue", [
    "JOBID|\n", "JOBID|\n4712|RUNNING|c1|1:00:00|hpc_db|None\n", "JOBID|\n4711|PENDING||1:00:00|hpc_db|Priority\n",
])
def test_without_the_server_nothing_is_kept(noted: Instance, queue: str) -> None:
    noted.queue = queue

    assert (noted.see()["kept"], noted.see()["why"]) == (False, "no server")


BOUND = ["channel_binding='require'", "sslmode='require'"]


@pytest.mark.parametrize("host, about, safe", [
    ("/tmp/sockets", {}, [f"requirepeer='{pwd.getpwuid(os.geteuid()).pw_name}'"]),
    ("c1", {"tls": True}, BOUND),
    ("c1", {}, BOUND),
    ("c1", {"tls": False}, ["require_auth='scram-sha-256'"]),
])
def test_nobody_else_is_told_the_password(host: str, about: dict, safe: list[str]) -> None:
    words = psql_command("/root", {"bindir": "/bin"}, {"host": host, "port": 5432, **about})[-1].split()

    assert sorted(word for word in words if word.partition("=")[0] in
                  ("channel_binding", "sslmode", "require_auth", "requirepeer")) == safe


def test_asks_for_what_is_named() -> None:
    studies = [{"name": "o'neill", "directions": None, "user_attributes": {"key": 1}}]
    databases = [{"name": "first", "studies": studies}, {"name": "second", "studies": []}]
    asked = questions({**PARAMS, "databases": databases, "others": ["mlflow"]})

    assert [line for line in asked.splitlines() if "connect" in line] == ["\\connect first", "\\connect second"]
    assert "datname IN ('first', 'second', 'mlflow', current_user)" in asked
    assert asked.count("study_name IN ('o''neill')") == 2
    assert "key IN ('key')" in asked


@pytest.mark.parametrize("name", ["x\n\\! touch canary", 'x" y', "x y", "", "-x"])
def test_a_name_that_psql_could_misread_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^databases: .* is not allowed"):
        questions({**PARAMS, "databases": [{"name": name, "studies": []}]})
