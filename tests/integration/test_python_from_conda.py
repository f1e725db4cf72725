# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks with everything from a conda channel: PostgreSQL, Python, psycopg2 and Optuna."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from growing import GROW
from target import ROOT, Target

WORK = """
import optuna, sys
study = optuna.create_study(storage="URL", study_name="s", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
print(len(study.trials), sys.prefix, optuna.__file__)
"""


@pytest.fixture(scope="module")
def settings(here: Target, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out, wheels = ROOT / ".cache/channel", ROOT / ".cache/wheels"
    build = [sys.executable, ROOT / "tests/channel/build.py", "--if-needed", out, "--python-wheels", wheels]
    subprocess.run(build, check=True)
    publish(here, hidden="17.10")
    return {
        "postgres_provider": "rattler",
        "postgres_major": 17,
        "postgres_channels": [f"file://{here.run('pwd -P')}/channel"],
        "postgres_lock_file": str(tmp_path_factory.mktemp("beside") / "lock/postgresql-17.txt"),
        "postgres_python_provider": "conda",
        "postgres_python_wheelhouse": str(wheels),  # for py-rattler
    }


def publish(here: Target, hidden: str) -> None:
    here.run(f"python3 -c '{GROW}' {ROOT}/.cache/channel ~/channel {hidden}")


@pytest.fixture(scope="module")
def url(here: Target, settings: dict) -> str:
    """The URL of a running server."""
    played = here.play("hpc_db", settings)
    found = re.search(r"^postgresql\S+service=\w+$", played.stdout, re.MULTILINE)
    assert played.returncode == 0 and found, played.stdout
    return found[0]


@pytest.fixture(scope="module")
def root(here: Target, url: str) -> str:
    return here.run(f"cd ~/hpc_db/{url.partition('service=')[2]}; pwd -P")


def test_server_and_trial(here: Target, settings: dict, url: str, root: str) -> None:
    again = here.play("hpc_db", settings)
    assert re.search(r"localhost .* changed=0 .* failed=0", again.stdout), again.stdout

    script = WORK.replace("URL", url)
    worked = here.run(f"{root}/python/bin/python - 2>/dev/null <<'EOF'\n{script}\nEOF").split()
    assert worked[:2] == ["1", f"{root}/python"] and worked[2].startswith(f"{root}/python/lib/")
    assert here.run(f"ls {root}/python/conda-meta").count("optuna-") == 1


def test_locked_and_updated(here: Target, settings: dict, root: str) -> None:
    lock_file = Path(settings["postgres_lock_file"])

    def play(name: str) -> str:
        played = here.play(name, settings)
        assert played.returncode == 0, played.stdout
        return played.stdout

    def refusal(name: str) -> str:
        """Return the message of a playbook that changes nothing of PostgreSQL."""
        listing = f"find {root}/postgresql-17* -printf '%p %s %T@ %C@\n' | sort"
        before = here.run(listing)
        played = here.play(name, settings)
        assert played.returncode != 0 and here.run(listing) == before, played.stdout
        return " ".join(played.stdout.split())

    def version() -> str:
        return here.run(f"{root}/postgresql-17/bin/psql --version").split()[-1]

    locked = lock_file.read_text()
    assert version() == "17.9" and "/postgresql-17.9-relabelled_1.conda#sha256:" in locked
    publish(here, hidden="none")
    assert re.search(r"server_job_name: job \d+ \(\w+\) hosts the server; stop it with .* stop.yml", refusal("update"))
    play("stop")

    lock_file.unlink()
    assert f"PostgreSQL 17.10 in {root}/postgresql-17" in play("update")
    assert version() == "17.10" and "/postgresql-17.10-" in lock_file.read_text()
    assert "changed=0" in play("update")
    lock_file.write_text(locked)
    assert re.search("lock: it differs from .*17.10.* instead of .*17.9.*playbooks/update.yml", refusal("hpc_db"))
