# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Built and installed, the collection works without its checkout."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from target import ROOT, Target


def test_built_and_installed(here: Target, tmp_path: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=False, text=True, timeout=300,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    (tmp_path / "empty.cfg").touch()
    environment = {**here.environment, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path),
                   "ANSIBLE_CONFIG": str(tmp_path / "empty.cfg")}
    run("ansible-galaxy", "collection", "build", str(ROOT))
    (archive,) = tmp_path.glob("mala-hpc_db-*.tar.gz")
    run("ansible-galaxy", "collection", "install", "--offline", "--no-deps", "-p", str(tmp_path), str(archive))
    community = ROOT / ".cache/collections/ansible_collections/community"
    (tmp_path / "ansible_collections/community").symlink_to(community)
    inventories = [option for option in here.command("hpc_db") if option.startswith("--inventory=")]

    here.run("python3 -m venv env")

    played = run("ansible-playbook", *inventories, "-e", "client_environment=~/env", "mala.hpc_db.hpc_db")
    (url,) = re.findall(r"^postgresql\+psycopg2:///\?service=\w+&plugin=hpc_db$", played, re.MULTILINE)
    connect = f'import sqlalchemy; sqlalchemy.create_engine("{url}").connect()'
    connected = here.run(f"env/bin/python -c '{connect}' && echo so")
    status = run("ansible-playbook", *inventories, "mala.hpc_db.status")
    examined = run("ansible-playbook", *inventories, "mala.hpc_db.doctor")
    stopped = run("ansible-playbook", *inventories, "mala.hpc_db.stop")

    assert connected == "so"  # the package came with the collection
    # 2 for each of 20 workers with the plugin
    assert re.search(r"^  connections  \d of 60 +\[#?-{19,20}\]$", status, re.MULTILINE)
    assert re.search(r"^  disk         \S+ \wB free of \S+ \wB +\[#+-*\]$", status, re.MULTILINE)
    assert re.search(r"^  URL          postgresql\+psycopg2:///\?service=\w+$", status, re.MULTILINE)
    assert re.search(r"^\w+ on localhost: nothing found$", examined, re.MULTILINE)
    assert "changed=1" in stopped
