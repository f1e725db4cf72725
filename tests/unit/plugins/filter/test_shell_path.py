# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths in scripts that run on the cluster, where ~ is another folder than here."""

import subprocess

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.shell_path import shell_path


@pytest.mark.parametrize("path, word", [
    ("~/be.py", "/home/al ice/be.py"), ("~/my $(studies)/'be'.py", "/home/al ice/my $(studies)/'be'.py"),
    ("/srv/~/be.py", "/srv/~/be.py"), ("python3", "python3"), ("~bob/be.py", "~bob/be.py"), ("a b; c", "a b; c"),
])
def test_shell_path(path, word):
    script = f"printf '<%s>' {shell_path(path)}"

    assert subprocess.check_output(["sh", "-c", script], env={"HOME": "/home/al ice"}, text=True) == f"<{word}>"
