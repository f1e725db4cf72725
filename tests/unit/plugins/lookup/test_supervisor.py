# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role copies the whole package, which runs under its name on a cluster."""

import subprocess
import sys

from ansible_collections.mala.hpc_db.plugins.lookup.supervisor import PACKAGE, LookupModule


def test_package_runs_where_it_is_copied_to(tmp_path):
    files = LookupModule().run(["host/hpc_db_host"])
    for file in files:
        path = tmp_path / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file["content"])

    call = [sys.executable, "-m", "hpc_db_host", "--help"]
    done = subprocess.run(call, cwd=tmp_path / "host", capture_output=True, text=True, check=True)

    assert len(files) == len(list(PACKAGE.rglob("*.py")))
    assert "serve" in done.stdout
