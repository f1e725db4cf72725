# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for the supervisor's tests."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hpc_db_host
import pytest


def oldest_python():
    """Return a Python 3.6, the oldest version that the supervisor supports."""
    managed = glob.glob(os.path.expandvars("$PYENV_ROOT/versions/3.6.*/bin/python3"))
    return os.environ.get("HPC_DB_OLD_PYTHON") or next(iter(managed), None) or shutil.which("python3.6")


@pytest.fixture
def short_folder():
    """A folder for sockets, whose paths may have only 107 bytes: pytest's folders may be too long."""
    with tempfile.TemporaryDirectory(prefix="hpc_db-", dir="/tmp") as folder:
        yield folder


@pytest.fixture(params=["this Python", "the oldest Python"])
def start(request):
    """Start a piece of code that uses the supervisor's package, in a process of its own."""
    python = sys.executable if request.param == "this Python" else oldest_python()
    if not python:
        pytest.skip("no Python 3.6 found, HPC_DB_OLD_PYTHON may name one")
    environment = {**os.environ, "PYTHONPATH": str(Path(hpc_db_host.__file__).parents[1]), "LC_ALL": "C"}
    running = []

    def start(code, *arguments):
        command = [python, "-c", code, *map(str, arguments)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()
