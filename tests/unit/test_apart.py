# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests have a home directory of their own, and never touch instances of the user who runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "home"
SHOW = "import json, os; print(json.dumps({**os.environ, '~': os.path.expanduser('~')}))"
OWN = ["PGSERVICEFILE", "PGPASSFILE", "ANSIBLE_HOME", "ANSIBLE_INVENTORY", "XDG_DATA_HOME", "XDG_STATE_HOME"]


@pytest.fixture
def users_home(tmp_path: Path) -> Path:
    """A home directory with typical files of a user."""
    for name in (".pg_service.conf", "hpc_db/demo/run/endpoint.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def apart(home: Path, *command: str) -> str:
    """Run a command of that user through tools/apart."""
    environment = {**os.environ, **dict.fromkeys(OWN, str(home)), "HOME": str(home)}
    command = (str(ROOT / "tools" / "apart"), *command)
    return subprocess.run(command, env=environment, cwd="/", check=True, stdout=subprocess.PIPE, text=True).stdout


def test_nothing_of_the_users_is_there(users_home: Path) -> None:
    found = json.loads(apart(users_home, sys.executable, "-c", SHOW))

    assert found["~"] == found["HOME"] == str(HOME)
    assert Path(found["XDG_RUNTIME_DIR"]).stat().st_mode & 0o777 == 0o700
    assert set(OWN) & set(found) == set()


@pytest.mark.parametrize(("stage", "ends"), [
    (":", "stages: 1 passed, 0 failed"),
    ("mkdir -p $USERS_HOME/hpc_db/demo/run; echo '{}' > $USERS_HOME/hpc_db/demo/run/endpoint.json",
     "stages: 1 passed, 1 failed"),
])
@pytest.mark.parametrize("has_instances", [True, False])
def test_what_changes_a_users_instance_fails(tmp_path: Path, users_home: Path, has_instances: bool, stage: str,
                                             ends: str) -> None:
    home = users_home if has_instances else tmp_path / "nobody"
    home.mkdir(exist_ok=True)
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "tools", clone / "tools")
    script = f"stage_any() {{ {stage}; }}; export -f stage_any; exec {clone}/tools/test any"

    done = subprocess.run(["bash", "-c", script], env={**os.environ, "HOME": str(home), "CI": "true"},
                          stdout=subprocess.PIPE, text=True, check=False)

    assert done.stdout.splitlines()[-1] == ends, done.stdout
    assert (done.returncode == 0) == ends.endswith(" 0 failed")


def test_these_tests_run_there() -> None:
    assert os.path.expanduser("~") == str(HOME)
    assert not {name for name in os.environ if name.startswith(("PGSERVICE", "PGPASS"))}


def test_by_itself_molecule_runs_there() -> None:
    configuration = yaml.safe_load((ROOT / ".config" / "molecule" / "config.yml").read_text())

    home = configuration["ansible"]["env"]["HOME"]
    assert home.replace("${MOLECULE_PROJECT_DIRECTORY}", str(ROOT)) == str(HOME)
