# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every argument of a module is used literally, or refused in one line; no part of it is ever executed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic

NOBODY = 65534
HOSTILE = [
    "a b", "it's", 'say "hi"', "$(touch CANARY)", "`touch CANARY`", "; touch CANARY #", "x\ntouch CANARY", "x\r-i y",
    "a,b", "a:b", "-x", "--help", "-Ssh -c 'touch CANARY'", "{x}", "{{ lookup('pipe', 'touch CANARY') }}", "%j",
    "$HOME", "a\\", "\u03a9", "x=y", "", "..",
]
SERVER = {"host": "/SOCKET", "port": 5432, "user": "alice", "passfile": "FOLDER/pgpass"}
JOB = {"name": "hpc-db", "root": "FOLDER/root", "bin_dir": "FOLDER/bin"}
# Valid arguments, with the programs in FOLDER/bin; each text among them is replaced by each hostile one.
MODULES: dict[str, dict[str, Any]] = {
    "abandoned_trials": {
        **JOB, **SERVER, "database": "postgres", "cluster": "mini", "studies": ["mala/be"], "other_jobs": ["mine"],
    },
    "background_program": {
        "name": "logs", "root": "FOLDER/new", "command": ["FOLDER/bin/python", "-x"], "port_option": "--port",
    },
    "bootstrap_server": {"root": "FOLDER/root", "timeout": 1},
    "broken_lease": {"root": "FOLDER/root"},
    "client_package": {
        "environment": "FOLDER/bin/python", "index_url": "FOLDER/index", "wheelhouse": "FOLDER/wheels", "project":
        'name = "n"\nversion = "1"\nrequires-python = ">=3.9"\ndependencies = []', "files": {"n/a.py": "pass"},
    },
    "cluster_info": {"bin_dir": "FOLDER/bin", "channels": ["FOLDER/x"], "wheelhouse": "FOLDER/wheels"},
    "cluster_info index": {"bin_dir": "FOLDER/bin", "index_url": "file:FOLDER/x"},
    "conda_env": {
        "prefix": "FOLDER/new/prefix", "specs": ["postgresql=17"], "channels": ["conda-forge"], "provider": "conda",
        "client": "FOLDER/bin/conda", "module_load": None,
    },
    "conda_env rattler": {
        "prefix": "FOLDER/new/prefix", "specs": ["postgresql=17"], "rattler_python": "FOLDER/bin/python",
    },
    "conda_env lock": {
        "prefix": "FOLDER/new/prefix", "specs": ["postgresql=17"], "lease": "FOLDER/root", "lock":
        "@EXPLICIT\nfile:///c/noarch/postgresql-17.2-0.conda#sha256:" + 64 * "a", "rattler_python": "FOLDER/bin/python",
    },
    "conda_env staged": {
        "prefix": "FOLDER/new/prefix", "specs": ["postgresql=17"], "state": "staged", "archives": "FOLDER/new/archives",
        "rattler_python": "FOLDER/bin/python", "host": {
            "system": "Linux", "machine": "x86_64", "release": "6.1", "glibc": "2.28",
            "packages": {"libpq": ["17.2", "h_0"]},
        },
    },
    "data_directory": {"path": "FOLDER/new/17", "bindir": "FOLDER/bin"},
    "hosting_job": {
        **JOB, "script": "FOLDER/root/host/job.sh", "output": "FOLDER/root/log/job.log",
        "options": {"partition": "work", "comment": "mine"},
    },
    "hosting_job gridengine": {
        **JOB, "script": "FOLDER/root/host/job.sh", "output": "FOLDER/root/log/job.log", "scheduler": "gridengine",
        "options": {"q": "all.q", "A": "mine", "l": {"h_rt": "600", "gpu": "a100"}},
    },
    "hosting_job_info": JOB,
    "instance": {
        "root": "FOLDER/new", "directories": ["conf"],
        "files": [{"path": "conf/a", "content": "a", "mode": "0600", "validate": ["FOLDER/bin/postgres", "{file}"]}],
    },
    "job_script_check": {
        **JOB, "script": "FOLDER/root/job.sh", "options": {"partition": "work"}, "setting": "workers_job_options",
    },
    "optuna_import": {
        **SERVER, "database": "mala", "file": "FOLDER/study.log", "root": "FOLDER/root", "studies": ["be"], "name": "b",
    },
    "optuna_study": {
        **SERVER, "databases": [
            {"name": "mala", "studies": [{"name": "beryllium", "user_attributes": {"by": "alice"}}]},
        ],
    },
    "postgres_info": {"bindir": "FOLDER/bin"},
    "python_env": {
        "path": "FOLDER/new/python", "python": "FOLDER/bin/python", "requirements": ["optuna>=3"],
        "index_url": "FOLDER/index", "wheelhouse": "FOLDER/wheels", "advice": "none",
        "beside": [{"path": "FOLDER/new/rattler", "requirements": ["py-rattler"]}],
    },
    "python_env wheels": {
        "path": "FOLDER/new/wheels", "python": "FOLDER/bin/python", "requirements": ["optuna>=3"], "layout": "wheels",
        "host": {"python": "3.9.2", "machine": "x86_64", "glibc": "2.28"},
    },
    "quick_check": {**JOB, "state": "recorded", "fingerprint": "a1"},
    "reading_role": {**SERVER, "role": "reader", "writer": "study", "databases": ["mala"]},
    "role_passwords": {**SERVER, "database": "postgres", "roles": ["study"]},
    "server_info": {**SERVER, "database": "postgres"},
    "short_job": {
        **JOB, "script": "FOLDER/root/job.sh", "output": "FOLDER/root/out", "options": {"partition": "work"},
        "listening": "FOLDER/root/door",
    },
    "sshfs_mount": {
        "path": "FOLDER/new/mount", "host": "127.0.0.1", "port": 1, "folder": "logs", "user": "alice", "timeout": 5,
        "identity_file": "FOLDER/key", "ssh_config": "/dev/null", "proxy_jump": ["gate"],
        "ssh_arguments": "-4", "options": {"dcache_timeout": "5"},
    },
    "study_report": {
        "path": "FOLDER/report.html", "trials": "FOLDER/trials.json.gz", "status": {
            "instance": "mine", "cluster": "mini", "url": "postgresql://", "read": 0, "job": None,
            "endpoint": None, "state": None, "disk": None, "server": None,
            "log": {"since": None, "serving": False, "outages": [], "troubles": []},
        },
    },
    "study_trials": {**SERVER, "database": "postgres", "path": "FOLDER/trials.json.gz"},
    "upgrade_data": {"root": "FOLDER/root", "major": 18, "patience": 1},
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ordinary user's folder, with programs that fail, and an empty working directory."""
    folder = Path(tempfile.mkdtemp(prefix="inputs-"))
    for name in ("bin", "cwd", "root/host/hpc_db_host", "root/log"):
        (folder / name).mkdir(parents=True)
    (folder / "study.log").write_text('{"op_code": 0, "worker_id": "a"}\n')
    programs = "conda fusermount3 initdb postgres python qdel qstat qsub sbatch scancel sinfo squeue ssh sshfs"
    for name in programs.split():
        (folder / "bin" / name).write_text("#!/bin/sh\necho 'not\ntoday' >&2\nexit 1\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(folder / "cwd")
    was_root = os.geteuid() == 0
    if was_root:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    if was_root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The arguments of psycopg2's connections; no server answers."""
    asked: list[dict] = []

    class Error(Exception):
        pgcode = None

    def connect(**parameters: Any) -> None:
        asked.append(parameters)
        raise Error("connection refused\n\tIs the server running?\n")

    fake = types.SimpleNamespace(Error=Error, connect=connect, sql=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "psycopg2", fake)  # type: ignore[arg-type]
    return asked


def texts_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the positions of all texts."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from texts_of(inner, (*path, key))


def replaced(value: Any, path: tuple, text: str) -> Any:
    if not path:
        return text
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], text)
    return copy


CASES = [
    pytest.param(name.split()[0], arguments, path, id=f"{name}-{'.'.join(map(str, path))}")
    for name, arguments in MODULES.items()
    for path in texts_of(arguments)
    if path[-1] not in ("layout", "provider", "scheduler", "state")  # these have fixed choices
]


def run_module(name: str, arguments: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> dict:
    module = importlib.import_module(f"ansible_collections.mala.hpc_db.plugins.modules.{name}")
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    with pytest.raises(SystemExit):
        module.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "arguments", "path"), CASES)
def test_no_text_is_run(
    name: str, arguments: dict, path: tuple, folder: Path, connections: list, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for hostile in HOSTILE:
        for text in sorted({hostile, f"FOLDER/{hostile}" if str(path[-1]) not in ("name", "options") else hostile}):
            text = text.replace("CANARY", f"{folder}/canary")
            given = json.loads(json.dumps(replaced(arguments, path, text)).replace("FOLDER", str(folder)))

            result = run_module(name, given, monkeypatch, capsys)

            assert not (folder / "canary").exists(), text
            assert not os.listdir("."), f"{text!r} has made something in the working directory"
            if result.get("failed"):
                assert result["msg"].strip() and len(result["msg"].splitlines()) == 1, (text, result)
            shutil.rmtree(folder / "new", ignore_errors=True)
            if connections:
                asked = connections.pop()
                for key in {"host", "user"} & set(given):
                    assert asked[key] == given[key]
