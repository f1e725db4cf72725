# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tests' callback module_cache: the second run uses the modules that the first one built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_modules_are_built_once(tmp_path: Path) -> None:
    environment = {
        **os.environ, "HOME": str(tmp_path), "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "tests" / "ansible"),
        "ANSIBLE_CALLBACKS_ENABLED": "module_cache", "ANSIBLE_LOAD_CALLBACK_PLUGINS": "true",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }
    ping = [sys.executable, "-m", "ansible", "adhoc", "localhost", "--connection=local", "--module-name=ping"]

    def archives() -> dict[str, int]:
        subprocess.run(ping, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        found = tmp_path.glob(".cache/mala.hpc_db-modules/*/*ping*")
        return {path.name: path.stat().st_mtime_ns for path in found if path.suffix != ".lock"}

    first = archives()
    assert len(first) == 1
    assert archives() == first
