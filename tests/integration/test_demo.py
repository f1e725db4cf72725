# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What make demo runs; not make itself, whose setup would touch what other tests are using."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from target import ROOT


def test_demo(quick_settings: dict) -> None:
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": Path(quick_settings["postgres_python_wheelhouse"]).as_uri()}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **wheels}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    said = run(".venv/bin/python", "examples/demo.py")
    (stop,) = re.findall("^stop it: +(.*)", said, re.MULTILINE)
    run(*stop.split())
    for user in re.findall(r"\(userdel -r (\S+) removes it\)", said):
        run("userdel", "--remove", user)

    assert re.search(r"^trials: +40 complete$", said, re.MULTILINE), said
