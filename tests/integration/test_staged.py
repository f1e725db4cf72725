# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A login node that reads neither channel nor wheels: the workstation solves, fetches and brings everything."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from target import ROOT, Target

ASK = '~/hpc_db/hpc_db/postgresql-17/bin/psql "service=hpc_db user=alice dbname=mala" -Atc "show server_version"'
ENDPOINT = "hpc_db/hpc_db/run/endpoint.json"


def test_workstation_brings_everything(mini: Target, tmp_path: Path) -> None:
    workstation = tmp_path / "of root alone"
    workstation.mkdir(mode=0o700)
    shutil.copytree(ROOT / ".cache/channel", workstation / "channel", ignore=shutil.ignore_patterns("wheels", "*-18.*"))
    shutil.copytree(ROOT / ".cache/wheels", workstation / "wheels")
    mini.environment["XDG_CACHE_HOME"] = str(workstation / "cache")
    lock_file = workstation / "postgresql-17.lock"
    settings = {
        "postgres_staged": True,
        "postgres_channels": [(workstation / "channel").as_uri()],
        "postgres_python_wheelhouse": str(workstation / "wheels"),
        "databases_studies": [{"name": "mala", "studies": [{"name": "beryllium"}]}],
        "server_pooler": True, "server_proxy": True,
    }
    for folder in ("channel/linux-64", "wheels"):
        assert mini.run(f"ls '{workstation}/{folder}' 2>/dev/null || echo unreadable") == "unreadable"
    before = mini.files()

    planned = mini.play("hpc_db", settings, "--check")
    assert planned.returncode == 0, planned.stdout
    assert mini.files() == before and not (workstation / "cache").exists()

    played = mini.play("hpc_db", {**settings, "postgres_lock_file": str(lock_file)})
    assert played.returncode == 0, played.stdout
    assert mini.run(ASK) == "17.10"
    mini.run(f"until grep -q pooler {ENDPOINT} && grep -q proxy {ENDPOINT}; do sleep 0.2; done")
    assert mini.run(ASK.replace("service=hpc_db user=alice", "service=hpc_db-pooled")) == "17.10"
    assert mini.run("cd ~/hpc_db/hpc_db; ls -d staged */*.packages 2>/dev/null || :") == ""
    locked = re.findall(r"^\S+(?=#sha256:)", lock_file.read_text(), re.MULTILINE)
    begin = f"{(workstation / 'channel').as_uri()}/linux-64"
    assert [url.rpartition("-")[0] for url in locked] == [f"{begin}/libpq-17.10", f"{begin}/postgresql-17.10"]

    again = mini.play("hpc_db", settings)  # without the lock file
    assert re.search(r"^mini .* changed=0 .* failed=0", again.stdout, re.MULTILINE), again.stdout
