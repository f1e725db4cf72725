# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL installed by the site, here Debian's: as an environment module, and on a node that lacks a library.

tests/integration/test_backup.py has it at a path.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from target import CLUSTER, Target

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
JOB = {"partition": "work", "time": "01:00:00", "mem": "1000M", "nodelist": "c1"}
WORK = """
import optuna
study = optuna.load_study(storage="postgresql+psycopg2:///?service=hpc_db", study_name="beryllium")
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
print(len(study.trials))
"""
MODULE = """
mkdir -p /opt/site/lib /opt/site/modules/PostgreSQL
mv {libraries}/libpq.so.5* /opt/site/lib
printf '#%%Module\nprepend-path PATH {bindir}\nprepend-path LD_LIBRARY_PATH /opt/site/lib\n' \
  > /opt/site/modules/PostgreSQL/{major}
"""


@pytest.fixture(scope="module")
def settings(bindir: Path) -> dict:
    return {
        "postgres_provider": "system", "postgres_major": int(bindir.parts[-2]), "postgres_bindir": str(bindir),
        "postgres_module_load": f"module use /opt/site/modules && module load PostgreSQL/{bindir.parts[-2]}",
        "server_job_options": JOB, "databases_studies": [{"name": "mala", "studies": [{"name": "beryllium"}]}],
    }


def change(mini: Target, host: str, script: str) -> None:
    """Run a script on a host of the cluster as root."""
    subprocess.run([str(CLUSTER), "exec", host, "--", "sh", "-ec", script], env=mini.environment, check=True)


def test_environment_module(mini: Target, settings: dict) -> None:
    """Only the module provides a library that the programs need, in the job as well."""
    major = settings["postgres_major"]
    for host in ("login", "c1"):
        change(mini, host, MODULE.format(libraries=LIBRARIES, bindir=settings["postgres_bindir"], major=major))
    by_path = {key: value for key, value in settings.items() if key != "postgres_module_load"}

    without = mini.play("hpc_db", by_path)
    played = mini.play("hpc_db", {**settings, "postgres_bindir": ""})
    worked = mini.run(f"hpc_db/hpc_db/python/bin/python - 2>/dev/null <<'EOF'\n{WORK}\nEOF")
    mini.run("scancel --name=hpc_db; while squeue --noheader --me | grep -q .; do sleep 0.2; done")

    assert re.search(r"^mini .* changed=0 .* failed=1", without.stdout, re.MULTILINE), without.stdout
    assert "error while loading shared libraries: libpq.so.5" in " ".join(without.stdout.split())
    assert played.returncode == 0, played.stdout
    assert worked == "1"
    assert mini.run("ls hpc_db/hpc_db").split() == [
        "conf", "data", "dumps", "host", "log", "python", "run", "secrets", f"system-{major}"
    ]


def test_node_that_lacks_a_library_is_told_and_not_tried_again(mini: Target, settings: dict) -> None:
    change(mini, "c1", f"mkdir /opt/aside; mv {LIBRARIES}/libxml2.so.2* /opt/aside")

    played = mini.play("hpc_db", settings)
    queue = mini.run("squeue --noheader --me")
    status = mini.play("status", settings)
    change(mini, "c1", f"mv /opt/aside/* {LIBRARIES}")

    why = re.compile(
        r"failed: postgres does not run on c1: /\S+/bin/postgres: error while loading shared libraries: "
        r"libxml2\.so\.2: cannot open shared object file: No such file or directory"
    )
    assert re.search(r"^mini .* changed=1 .* failed=1", played.stdout, re.MULTILINE), played.stdout
    assert why.search(" ".join(played.stdout.split())), played.stdout
    assert queue == ""
    assert why.search(status.stdout), status.stdout
    assert why.search(mini.run("tail -n 1 hpc_db/hpc_db/log/job.log"))
    assert mini.run("cat hpc_db/hpc_db/run/endpoint.json").split() == ["{}"]
