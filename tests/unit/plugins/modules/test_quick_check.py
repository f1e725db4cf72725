# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""quick_check, on a real directory; the scheduler's answer can be changed."""

import json
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.modules.quick_check import check

FORGET = Path(__file__).parents[4] / "roles/server/tasks/forget.yml"
PARAMS = {"name": "hpc_db", "scheduler": "slurm", "bin_dir": None, "fingerprint": "one"}


class Instance:
    """An instance directory, with Slurm's answer about its job."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "hpc_db"
        self.queue = "JOBID|STATE\n4711|RUNNING|c1|1:00:00|hpc_db|None\n"
        files = {
            "host/settings.json": "{}", "host/hpc_db_host/lease.py": "lease", "conf/pg_hba.conf": "local all all peer",
            "secrets/pgpass": "*:*:*:study:secret\n", "postgresql-17/bin/postgres": "program",
            "run/endpoint.json": json.dumps({"job": "4711", "host": "c1", "port": 5432}), "log/job.log": "",
        }
        for name, text in files.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def check(self, state: str = "compared", check_mode: bool = False, **params: object) -> dict:
        given = {**PARAMS, "root": str(self.root), "state": state, **params}
        return check(given, lambda command: self.queue, check_mode)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path)


@pytest.fixture
def recorded(instance: Instance) -> Instance:
    instance.check("recorded")
    return instance


def test_is_unchanged_once_it_is_recorded(instance: Instance) -> None:
    assert (instance.check()["unchanged"], instance.check()["reason"]) == (False, "no full run")

    assert instance.check("recorded", check_mode=True)["changed"] is False
    assert not instance.check()["unchanged"]

    instance.check("recorded")
    found = instance.check()
    assert (found["unchanged"], found["reason"], found["endpoint"]["host"]) == (True, "", "c1")


def test_path_of_the_directory_is_no_difference(recorded: Instance) -> None:
    assert recorded.check(root=f"{recorded.root}/../hpc_db/")["unchanged"]


def test_files_that_only_a_full_run_compares_are_no_difference(recorded: Instance) -> None:
    for name in ("log/postgresql-Mon.log", "dumps/studies.dump", "data/17/postmaster.pid", "workers/study.py",
                 ".doctor-x/job.sh", "run/lease.2", "host/hpc_db_host/__pycache__/lease.pyc",
                 "postgresql-17/bin/postgres", "python/lib/python3.11/site-packages/new.py"):
        recorded.write(name, "new")

    assert recorded.check()["unchanged"]


@pytest.mark.parametrize("name", [
    "conf/pg_hba.conf", "host/settings.json", "host/hpc_db_host/lease.py", "host/new.py", "secrets/pgpass",
])
def test_another_file_is_a_difference(recorded: Instance, name: str) -> None:
    path = recorded.root / name
    text = path.read_text() if path.exists() else ""
    recorded.write(name, f"{text} ")

    assert (recorded.check()["unchanged"], recorded.check()["reason"]) == (False, "files")


@pytest.mark.parametrize("name", ["conf", "host/hpc_db_host", "secrets/pgpass"])
def test_another_mode_is_a_difference(recorded: Instance, name: str) -> None:
    path = recorded.root / name
    path.chmod(path.stat().st_mode ^ 0o010)

    assert recorded.check()["reason"] == "files"


@pytest.mark.parametrize("name", ["conf/pg_hba.conf", "host/hpc_db_host", "secrets"])
def test_a_missing_file_is_a_difference(recorded: Instance, name: str) -> None:
    path = recorded.root / name
    path.rename(recorded.root.parent / "aside")

    assert recorded.check()["reason"] == "files"


def test_other_settings_are_a_difference_that_asks_nobody(recorded: Instance) -> None:
    recorded.queue = "no queue at all"

    assert recorded.check(fingerprint="two")["reason"] == "settings"


@pytest.mark.parametrize("before", [
    {"settings": "one", "files": "a1", "databases": "b2"}, {"settings": "two"}, {"files": "a1"},
])
def test_record_of_another_version_is_a_difference_and_is_replaced(instance: Instance, before: dict) -> None:
    instance.write("run/kept.json", json.dumps(before))
    assert not instance.check()["unchanged"]

    instance.check("recorded")

    assert instance.check()["unchanged"]
    assert sorted(path.name for path in (instance.root / "run").iterdir()) == ["endpoint.json", "kept.json"]


@pytest.mark.parametrize("queue", [
    "JOBID|\n", "JOBID|\n4712|RUNNING|c1|1:00:00|hpc_db|None\n", "JOBID|\n4711|PENDING||1:00:00|hpc_db|Priority\n",
])
def test_without_the_server_a_full_run_is_needed(recorded: Instance, queue: str) -> None:
    recorded.queue = queue

    assert (recorded.check()["unchanged"], recorded.check()["reason"]) == (False, "no server")


def test_without_the_server_nothing_is_recorded(instance: Instance) -> None:
    (instance.root / "run/endpoint.json").unlink()

    assert instance.check("recorded")["reason"] == "no server"

    assert instance.check()["reason"] == "no full run"


def test_full_run_removes_that_record() -> None:
    assert f'path: "{{{{ hpc_db.root }}}}/{Layout("").recorded_state}"' in FORGET.read_text()
