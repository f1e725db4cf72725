# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Built and installed, the collection works without its checkout."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from target import ROOT, Target

Installed = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build and install the collection; return a function that runs Ansible commands with that installation only."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "empty.cfg").touch()

    def run(place: Target, *command: str, **more: str) -> str:
        environment = {
            **place.environment, "ANSIBLE_COLLECTIONS_PATH": str(folder), "ANSIBLE_CONFIG": str(folder / "empty.cfg"),
            **more,
        }
        done = subprocess.run(
            command, cwd=folder, env=environment, check=False, text=True, timeout=300,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    anywhere = Target([], [], {})
    run(anywhere, "ansible-galaxy", "collection", "build", str(ROOT))
    (archive,) = folder.glob("mala-hpc_db-*.tar.gz")
    run(anywhere, "ansible-galaxy", "collection", "install", "--offline", "--no-deps", "-p", str(folder), str(archive))
    community = ROOT / ".cache/collections/ansible_collections/community"
    (folder / "ansible_collections/community").symlink_to(community)
    return run


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A folder of a login session: private, with a short path, and removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as folder:
        yield Path(folder)


def test_built_and_installed(here: Target, installed: Installed) -> None:
    def run(*arguments: str) -> str:
        return installed(here, "ansible-playbook", *inventories, *arguments)

    inventories = [option for option in here.command("hpc_db") if option.startswith("--inventory=")]

    here.run("python3 -m venv env")

    played = run("-e", "client_environment=~/env", "mala.hpc_db.hpc_db")
    (url,) = re.findall(r"^postgresql\+psycopg2:///\?service=\w+&plugin=hpc_db$", played, re.MULTILINE)
    connect = f'import sqlalchemy; sqlalchemy.create_engine("{url}").connect()'
    connected = here.run(f"env/bin/python -c '{connect}' && echo so")
    status = run("mala.hpc_db.status")
    examined = run("mala.hpc_db.doctor")
    stopped = run("mala.hpc_db.stop")

    assert connected == "so"  # the package came with the collection
    # 2 for each of 20 workers with the plugin
    assert re.search(r"^  connections  \d of 60 +\[#?-{19,20}\]$", status, re.MULTILINE)
    assert re.search(r"^  disk         \S+ \wB free of \S+ \wB +\[#+-*\]$", status, re.MULTILINE)
    assert re.search(r"^  URL          postgresql\+psycopg2:///\?service=\w+$", status, re.MULTILINE)
    assert re.search(r"^\w+ on localhost: no problems found$", examined, re.MULTILINE)
    assert "changed=1" in stopped


def test_a_long_home_keeps_nobody_from_connecting(
    mini: Target, installed: Installed, runtime: Path, tmp_path: Path
) -> None:
    home = tmp_path / ((96 - len(str(tmp_path))) * "h")
    home.mkdir()
    state = Path(mini.environment["HPC_DB_CLUSTER"])
    settings = {
        "ansible_host": "login", "ansible_user": "alice", "ansible_ssh_common_args": f"-F {state}/ssh_config",
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"hpc_db": {"hosts": {"mini": settings}}}))
    place = {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
    collections = str(ROOT / ".cache/collections")
    checkout = {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_COLLECTIONS_PATH": collections}
    before = accepted(state)

    for playbook, more in ((f"{ROOT}/playbooks/stop.yml", checkout), ("mala.hpc_db.stop", {})):
        played = installed(mini, "ansible-playbook", f"--inventory={inventory}", playbook, **place, **more)
        assert re.search(r"^mini +: ok=[1-9].* changed=0 +unreachable=0 +failed=0 ", played, re.MULTILINE), played

    (socket,) = runtime.glob("*/*")
    assert socket.is_socket()
    assert accepted(state) == before + 1  # the second playbook reused the connection


def accepted(state: Path) -> int:
    """Return the number of connections that the login node has accepted."""
    return (state / "log" / "login-sshd.log").read_text(errors="replace").count("Accepted publickey")
