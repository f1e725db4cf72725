# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths in scripts that run on the cluster, where ~ is another folder than here."""

import re
import subprocess
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.shell_path import shell_path


@pytest.mark.parametrize("path, word", [
    ("~/be.py", "/home/al ice/be.py"), ("~/my $(studies)/'be'.py", "/home/al ice/my $(studies)/'be'.py"),
    ("/srv/~/be.py", "/srv/~/be.py"), ("python3", "python3"), ("~bob/be.py", "~bob/be.py"), ("a b; c", "a b; c"),
])
def test_shell_path(path, word):
    script = f"printf '<%s>' {shell_path(path)}"

    assert subprocess.check_output(["sh", "-c", script], env={"HOME": "/home/al ice"}, text=True) == f"<{word}>"


def test_scripts_have_no_path_from_the_home_directory_in_quotes():
    """A quoted ~ is not expanded."""
    roles = Path(__file__).resolve().parents[4] / "roles"
    settings = {"server_python", "worker.python", "worker.program"}

    used = [
        (name, filters)
        for path in roles.glob("*/templates/*.sh.j2")
        for name, filters in re.findall(r"{{ (?:hpc_db\.|__)([\w.]+) \| ([\w.]+)", path.read_text(encoding="utf-8"))
        if name in settings
    ]

    asked = (roles / "discover" / "templates" / "pythons.sh.j2").read_text(encoding="utf-8")
    used += re.findall(r"{{ \(hpc_db\.(discover_python) or .*\) \| ([\w.]+)", asked)

    assert {name for name, _filter in used} == settings | {"discover_python"}
    assert {each for _name, each in used} == {"mala.hpc_db.shell_path"}
