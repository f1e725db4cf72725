# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook with everything out of a conda channel: PostgreSQL, Python, psycopg2 and Optuna."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from target import ROOT, Target

WORK = """
import optuna, sys
study = optuna.create_study(storage="URL", study_name="s", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
print(len(study.trials), sys.prefix, optuna.__file__)
"""


@pytest.fixture(scope="module")
def settings() -> dict:
    out, wheels = ROOT / ".cache/channel", ROOT / ".cache/wheels"
    build = [sys.executable, ROOT / "tests/channel/build.py", "--if-needed", out, "--python-wheels", wheels]
    subprocess.run(build, check=True)
    return {
        "postgres_provider": "rattler",
        "postgres_major": 17,
        "postgres_channels": [out.as_uri()],
        "postgres_python_provider": "conda",
        "postgres_python_wheelhouse": str(wheels),  # for py-rattler
    }


def test_server_and_trial(here: Target, settings: dict) -> None:
    played = here.play("hpc_db", settings)
    assert played.returncode == 0, played.stdout
    again = here.play("hpc_db", settings)
    assert re.search(r"localhost .* changed=0 .* failed=0", again.stdout), again.stdout

    url = re.search(r"^postgresql\S+service=(\w+)$", again.stdout, re.MULTILINE)
    assert url
    root = here.run(f"cd ~/hpc_db/{url[1]}; pwd -P")
    script = WORK.replace("URL", url[0])
    worked = here.run(f"{root}/python/bin/python - 2>/dev/null <<'EOF'\n{script}\nEOF").split()
    assert worked[:2] == ["1", f"{root}/python"] and worked[2].startswith(f"{root}/python/lib/")
    assert here.run(f"ls {root}/python/conda-meta").count("optuna-") == 1
