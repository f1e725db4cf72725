# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""client_package against environments that record pip's actions; tests/integration has a real one."""

import base64
import csv
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._pip import Failed
from ansible_collections.mala.hpc_db.plugins.modules import client_package
from ansible_collections.mala.hpc_db.plugins.modules.client_package import ensure_client

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLIENT = Path(__file__).parents[4] / "client"
PROJECT = (CLIENT / "pyproject.toml").read_text()
FILES = {str(path.relative_to(CLIENT / "src")): path.read_text() for path in (CLIENT / "src").rglob("*.py")}
VERSION = tomllib.loads(PROJECT)["project"]["version"]


class FakeEnvironment:
    """Answers like the environment's Python, and installs like its pip."""

    def __init__(self, *, pip=True, writable=True, managed=False, version=(3, 11, 2), driver="", **packages):
        self.held = {
            "version": list(version), "executable": "/env/bin/python", "machine": "x86_64", "glibc": "2.36", "pip": pip,
            "site": "/env/lib/site-packages", "writable": writable, "managed": managed, "driver": driver, "files": {},
            "entry_points": {}, "packages": {name.replace("_", "-"): value for name, value in packages.items()},
        }
        self.installed = []
        self.metadata = ""

    def __call__(self, command):
        if "install" not in command:
            return f"Welcome\nhpc_db {json.dumps(self.held)}\n"
        self.installed.append([each for each in command[command.index("install") + 1 :] if each != "--quiet"])
        if not command[-1].endswith(".whl"):
            for each in command[command.index("--only-binary=:all:") + 1 :]:
                if not each.startswith("-"):
                    self.held["packages"][client_package.project_of(each)[0]] = "2.9"
            return ""
        with zipfile.ZipFile(command[-1]) as wheel:
            names = wheel.namelist()
            self.metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
            self.held["files"] = {
                name: hashlib.sha256(wheel.read(name)).hexdigest() for name in names if name.endswith(".py")
            }
        self.held["packages"]["hpc-db-client"] = VERSION
        self.held["entry_points"] = dict(client_package.read_project(PROJECT).plugins)
        return ""


@pytest.fixture
def params(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    return {
        "environment": str(tmp_path), "project": PROJECT, "files": FILES, "index_url": None, "wheelhouse": "/wheels",
    }


def test_installs_what_is_missing_once(params):
    environment = FakeEnvironment(sqlalchemy="2.0.30", optuna="4.2.0")

    checked = ensure_client(params, environment, check_mode=True)
    assert environment.installed == []
    first = ensure_client(params, environment, check_mode=False)
    second = ensure_client(params, environment, check_mode=False)

    assert [each["changed"] for each in (checked, first, second)] == [True, True, False]
    assert checked["missing"] == first["missing"] == ["psycopg2-binary>=2.9"] and second["missing"] == []
    assert checked["diff"]["after"] == f"hpc-db-client {VERSION}\noptuna 4.2.0\npsycopg2-binary to be installed\n" \
        "sqlalchemy 2.0.30\n"
    assert first["python"] == f"{params['environment']}/bin/python"
    assert environment.installed[0] == [
        "--only-binary=:all:", "--no-index", "--find-links=/wheels", "psycopg2-binary>=2.9"
    ]
    assert environment.installed[1][:3] == ["--no-index", "--no-deps", "--force-reinstall"]
    assert len(environment.installed) == 2


def test_driver_of_conda_is_a_driver(params):
    environment = FakeEnvironment(sqlalchemy="2.0.30", psycopg2="2.9.9")

    ensure_client(params, environment, check_mode=False)

    assert len(environment.installed) == 1
    assert "Requires-Dist: psycopg2>=2.9\n" in environment.metadata  # otherwise pip check complains


@pytest.mark.parametrize("damage", [
    lambda held: held["packages"].update({"hpc-db-client": "0.0.1"}),
    lambda held: held["files"].update({"hpc_db_client/plugin.py": "0" * 64}),
    lambda held: held["files"].pop("hpc_db_client/plugin.py"),
    lambda held: held["entry_points"].clear(),
])
def test_another_client_is_replaced(damage, params):
    environment = FakeEnvironment(sqlalchemy="2.1.9", psycopg2_binary="2.9.13")
    ensure_client(params, environment, check_mode=False)
    damage(environment.held)

    assert ensure_client(params, environment, check_mode=False)["changed"]
    assert not ensure_client(params, environment, check_mode=False)["changed"]


@pytest.mark.parametrize("environment, says", [
    ({"version": (3, 8, 1)}, "is Python 3.8.1, but the client package needs 3.9 or newer"),
    ({"sqlalchemy": "1.3.24"}, "sqlalchemy 1.3.24 there is not allowed; .* needs SQLAlchemy>=1.4.24,<2.2"),
    ({"sqlalchemy": "2.2.0b1"}, "sqlalchemy 2.2.0b1 there is not allowed"),
    ({"psycopg2": "2.8.6"}, "psycopg2 2.8.6 there is not allowed; .* needs psycopg2-binary>=2.9"),
    ({"psycopg2": "2.9.9", "driver": "libpq.so.5: cannot open"}, "cannot import psycopg2.*libpq.so.5: cannot open"),
    ({"writable": False}, "is not yours to write to .*-m venv --system-site-packages DIR"),
    ({"managed": True}, "belongs to the operating system; make an environment of your own"),
    ({"pip": False}, "it has no pip; install it there, as with: /env/bin/python -m ensurepip"),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_unfit_environments_are_refused(check_mode, environment, says, params):
    fake = FakeEnvironment(**{"sqlalchemy": "2.0.30", **environment})

    with pytest.raises(Failed, match=says):
        ensure_client(params, fake, check_mode)
    assert fake.installed == []


@pytest.mark.parametrize("given, says", [
    ("env", "'env' is not absolute"), ("/no/such", "/no/such does not exist; give the folder of a conda"),
])
def test_what_is_no_environment_is_refused(given, says, params):
    def asked(command):
        raise Failed("asked")

    with pytest.raises(Failed, match=says):
        ensure_client({**params, "environment": given}, asked, check_mode=True)


def test_project_is_read_as_toml(params):
    project = tomllib.loads(PROJECT)["project"]

    assert client_package.read_project(PROJECT) == (
        project["name"], project["version"], project["requires-python"], project["dependencies"],
        project["entry-points"]["sqlalchemy.plugins"],
    )
    in_lines = PROJECT.replace("dependencies = [", "dependencies = [\n  ").replace('9"]', '9",\n]')
    assert in_lines != PROJECT and client_package.read_project(in_lines) == client_package.read_project(PROJECT)


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", PROJECT.replace('"SQL', '\\"SQL')])
def test_what_is_no_project_is_refused(text):
    with pytest.raises(Failed, match="project: "):
        client_package.read_project(text)


@pytest.mark.parametrize("versions, version, allowed", [
    (">=1.4.24,<2.2", "1.4.24", True), (">=1.4.24,<2.2", "1.4.23", False), (">=1.4.24,<2.2", "2.1.9", True),
    (">=1.4.24,<2.2", "2.2", False), (">=1.4.24,<2.2", "10.0", False), (">=2.9", "2.9.13", True),
    (">=2.9", "2.9.9 (dt dec pq3 ext lo64)", True), ("", "0.1", True), (">=2.9", "unknown", False),
])
def test_versions(versions, version, allowed):
    assert client_package.allows(versions, version) is allowed


def test_wheel_is_the_same_each_time_and_complete(tmp_path):
    project = client_package.read_project(PROJECT)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = client_package.write_wheel(str(tmp_path / folder), project, FILES)
        assert Path(path).name == f"hpc_db_client-{VERSION}-py3-none-any.whl"

    assert (tmp_path / "a" / Path(path).name).read_bytes() == Path(path).read_bytes()
    with zipfile.ZipFile(path) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist()}
    record = held[f"hpc_db_client-{VERSION}.dist-info/RECORD"].decode()
    assert {name for name, _digest, _size in csv.reader(io.StringIO(record))} == set(held)
    for name, digest, size in csv.reader(io.StringIO(record)):
        if not name.endswith("RECORD"):
            assert int(size) == len(held[name])
            assert digest[7:] == base64.urlsafe_b64encode(hashlib.sha256(held[name]).digest()).decode().rstrip("=")
    assert held[f"hpc_db_client-{VERSION}.dist-info/entry_points.txt"].startswith(b"[sqlalchemy.plugins]\nhpc_db = ")
    licence = tomllib.loads(PROJECT)["project"]["license"]["text"]
    assert f"License: {licence}" in held[f"hpc_db_client-{VERSION}.dist-info/METADATA"].decode().splitlines()


def test_role_brings_every_file():
    """The role copies the files of one folder; more folders would need more tasks."""
    assert {str(Path(name).parent) for name in FILES} == {"hpc_db_client"}
    assert all(path.suffix == ".py" for path in (CLIENT / "src").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts and "egg-info" not in str(path))
