# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL that the site has installed, here Debian's: by path, by environment module, and on a node without it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import CLUSTER
from target import Target

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
        "server_job_options": JOB,
    }


def change(mini: Target, host: str, script: str) -> None:
    """Change a host of the cluster, as its root."""
    subprocess.run([str(CLUSTER), "exec", host, "--", "sh", "-ec", script], env=mini.environment, check=True)


def serves(mini: Target, settings: dict, trials: int) -> None:
    """Run the playbook, and a worker with the URL."""
    played = mini.play("hpc_db", settings)
    assert played.returncode == 0, played.stdout
    assert mini.run(f"hpc_db/hpc_db/python/bin/python - 2>/dev/null <<'EOF'\n{WORK}\nEOF") == str(trials)


def test_path(mini: Target, settings: dict) -> None:
    serves(mini, settings, trials=1)

    dumped = mini.play("backup", settings)
    mini.run("scancel --name=hpc_db; while squeue --noheader --me | grep -q .; do sleep 0.2; done")

    assert re.search(r"^mala: 1 trials in ", dumped.stdout, re.MULTILINE), dumped.stdout
    assert mini.run("ls hpc_db/hpc_db").split() == [
        "conf", "data", "dumps", "host", "log", "python", "run", "secrets"
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
    assert played.returncode != 0
    assert why.search(" ".join(played.stdout.split())), played.stdout
    assert queue == ""
    assert why.search(status.stdout), status.stdout
    assert why.search(mini.run("tail -n 1 hpc_db/hpc_db/log/job.log"))
    assert mini.run("ls -A hpc_db/hpc_db/run").split().count("endpoint.json") == 0


def test_environment_module(mini: Target, settings: dict) -> None:
    """Where it alone brings a library that the programs need, in the job as well."""
    major = settings["postgres_major"]
    for host in ("login", "c1"):
        change(mini, host, MODULE.format(libraries=LIBRARIES, bindir=settings["postgres_bindir"], major=major))

    without = mini.play("hpc_db", settings)
    load = f"module use /opt/site/modules && module load PostgreSQL/{major}"
    with_it = {**settings, "postgres_bindir": "", "postgres_module_load": load}
    serves(mini, with_it, trials=2)
    again = mini.play("hpc_db", with_it)

    assert re.search(r"^mini .* changed=0 .* failed=1", without.stdout, re.MULTILINE), without.stdout
    assert re.search(r"^mini .* changed=0 .* failed=0", again.stdout, re.MULTILINE), again.stdout
    assert "error while loading shared libraries: libpq.so.5" in " ".join(without.stdout.split())


def test_unfit_programs_are_refused_before_anything_changes(
    here: Target, bindir: Path, settings: dict, tmp_path: Path
) -> None:
    """One host a case, in one play."""
    home = here.run("cd; pwd -P")
    here.run(f"mkdir ~/bin; ln -s {bindir}/[!i]* ~/bin")
    major = settings["postgres_major"]
    given = {
        "missing": ({"postgres_bindir": "/nowhere"}, r"postgres_bindir: /nowhere has no program postgres, initdb, "),
        "incomplete": ({"postgres_bindir": f"{home}/bin"}, rf"postgres_bindir: {home}/bin has no program initdb; it "),
        "major": ({"postgres_major": 14}, rf"postgres_major: 14 is not allowed; {bindir} holds .*, so set {major}"),
        "ancient": ({"postgres_major": 9}, "postgres_major: 9 is not allowed; 14 or newer"),
        "relative": ({"postgres_bindir": "bin"}, "postgres_bindir: 'bin' is not absolute"),
        "nothing": ({"postgres_bindir": ""}, "postgres_bindir: neither it nor postgres_module_load says where"),
        "no_module": ({"postgres_bindir": "", "postgres_module_load": "module load PostgreSQL/0"},
                      "postgres_module_load: 'module load PostgreSQL/0' failed in a login shell: .*PostgreSQL/0"),
        "other": ({"postgres_bindir": "", "postgres_module_load": "PATH=/usr/bin:/bin"},
                  "postgres_module_load: '.*' brings no program postgres onto the PATH; set postgres_bindir"),
        "conda": ({"postgres_python_provider": "conda"}, "postgres_python_provider: conda with .* no conda packages"),
    }
    hosts = {
        name: {**here.variables, "ansible_connection": "local", **settings, "postgres_tls": True, **changes}
        for name, (changes, _says) in given.items()
    }
    inventory = tmp_path / "hosts.json"
    inventory.write_text(json.dumps({"hpc_db": {"hosts": hosts}}))
    before = here.files()

    played = here.play("hpc_db", None, f"--inventory={inventory}", f"--limit={','.join(given)}", "--forks=9")

    for name, (_changes, says) in given.items():
        said = re.findall(rf"^(?:fatal|failed): \[{name}\].*(?:\n .*)*", played.stdout, re.MULTILINE)
        assert len(said) == 1, played.stdout
        assert re.search(says, " ".join(said[0].replace("''", "'").split())), said
        assert re.search(rf"^{name} .* changed=0 .* failed=1 ", played.stdout, re.MULTILINE)
    assert here.files() == before
