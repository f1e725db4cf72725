# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the playbooks as users do: on this machine as another user, and on the test cluster over ssh."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from target import CHECKOUT, CLUSTER, ROOT, Target, Workstation

# The files that take longest. They start first, so that none of them runs alone at the end.
LONGEST = [
    "test_queue", "test_interrupted", "test_hosting_program", "test_conda_env", "test_dashboard", "test_guide",
    "test_successors", "test_limits", "test_backup", "test_engines", "test_tensorboard", "test_import",
    "test_refusals", "test_inventories", "test_sshfs_mount",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="repeat as often as the targets say")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; pytest-xdist distributes them to its processes in this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def slurm_lines() -> list[str]:
    """Lines of slurm.conf that replace the test cluster's; a test module may override this fixture."""
    return []


@pytest.fixture(scope="module")
def mini(slurm_lines: list[str]) -> Iterator[Target]:
    """The test cluster, with an empty home for alice."""
    if os.geteuid() != 0:
        pytest.skip("the test cluster needs root")
    state = f"/tmp/hpc-db-it-{os.getpid()}"
    cache = ROOT / ".cache"
    build = [str(ROOT / ".venv/bin/python"), "tests/channel/build.py", "--if-needed", str(cache / "channel")]
    subprocess.run(build, cwd=ROOT, check=True)
    brought = {"wheels": cache / "wheels", "channel": cache / "channel", "client": ROOT / "client" / "src",
               "bench": ROOT / "bench", Path(CHECKOUT).name: ROOT}
    mounts = [f"--mount={folder}:/srv/{name}" for name, folder in brought.items()]
    lines = [f"--slurm={line}" for line in slurm_lines]
    subprocess.run([str(CLUSTER), "up", "--state", state, "--nodes", "2", *mounts, *lines], check=True)
    yield Target(
        [ROOT / "molecule" / "default" / "inventory"],
        ["ssh", "-F", f"{state}/ssh_config", "login"],
        {"HPC_DB_CLUSTER": state},
    )
    subprocess.run([str(CLUSTER), "down", "--state", state], check=True)


@pytest.fixture(scope="module")
def workstation(mini: Target) -> Workstation:
    """The workstation of that test cluster, used by alice: ``ssh login`` needs no options there, and pip finds the
    wheels.

    pip.conf also contains settings that several sites have for other installations than this collection's.
    """
    alice = [str(CLUSTER), "exec", "workstation", "--user", "alice", "--", "sh", "-c"]
    target = Workstation([Path("molecule/default/inventory"), Path("~/inventory.json")], alice, mini.environment)
    settings = {"ansible_ssh_common_args": "", "ansible_control_path_dir": "~/.ansible/cp"}
    inventory = json.dumps({"hpc_db": {"hosts": {"mini": settings}}})
    pip = "[global]\\nno-index = true\\nfind-links = /srv/wheels\\n[install]\\nuser = true\\n"
    target.run(f"echo {shlex.quote(inventory)} > inventory.json")
    target.run(f"mkdir -p .config/pip; printf '{pip}' > .config/pip/pip.conf")
    return target


@pytest.fixture(scope="session")
def bindir() -> Path:
    """Debian's newest PostgreSQL, or Ubuntu's."""
    return max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])).parent


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder with a space in its name, readable by other users; pytest's own folders are readable by root alone."""
    folder = Path(tempfile.mkdtemp(prefix="hpc-db it-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def quick_settings(bindir: Path, open_folder: Path) -> dict:
    """Settings of an instance with the system's PostgreSQL, packages from a local folder, and no scheduled dumps."""
    shutil.copytree(ROOT / ".cache" / "wheels", open_folder / "wheels")
    (open_folder / "bin").symlink_to(bindir)
    return {
        "server_dump_minutes": 0, "postgres_python_wheelhouse": str(open_folder / "wheels"),
        "postgres_provider": "system", "postgres_bindir": str(open_folder / "bin"),
        "postgres_major": int(bindir.parts[-2]),
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """This machine, as an ordinary user; if root runs the tests, the user is created for them."""
    settings: dict[str, object] = {"instance_name": f"it{os.getpid()}"}
    shell = ["sh", "-c"]
    user = ""
    if os.geteuid() == 0:
        user = f"hpc-db-it-{os.getpid()}"
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", user], check=True)
        # sudo pipelines, unlike su
        settings.update(ansible_become=True, ansible_become_user=user, ansible_become_method="sudo")
        settings.update(ansible_python_interpreter="/usr/bin/python3")
        shell = ["su", "-", user, "-c"]
    folder = tmp_path_factory.mktemp("inventory")
    (folder / "hosts.yml").write_text(json.dumps({"hpc_db": {"hosts": {"localhost": settings}}}))
    target = Target([ROOT / "inventories" / "local", folder], shell, {})
    target.variables = settings
    yield target
    target.play("stop")
    target.run(f"rm -rf ~/hpc_db/{settings['instance_name']}")
    if user:
        subprocess.run(["userdel", "--remove", user], check=True, capture_output=True)
        with pytest.raises(KeyError):
            pwd.getpwnam(user)


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[..., Browser]]:
    """Start Chromium: ``browser()`` on this machine, ``browser(workstation)`` on that host, with its 127.0.0.1."""
    this_machine = Target([], ["sh", "-c"], {})
    with contextlib.ExitStack() as started:
        yield lambda place=this_machine: started.enter_context(chromium(place))
