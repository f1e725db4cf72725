# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An instance of an earlier version of this collection, with its files' formats, is taken over by the first run."""

from __future__ import annotations

import re

from target import Target

WORK = """
import optuna
study = optuna.create_study(storage="postgresql+psycopg2:///?service=INSTANCE", study_name="s", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
print(len(study.trials))
"""
# That version wrote numbers as text with some versions of Ansible, and a finished command for the successor. Its
# supervisor had other files and wrote no events, and its quick check recorded more.
EARLIER = """
import json, os
os.chdir(os.path.expanduser("~/hpc_db/INSTANCE"))
with open("host/settings.json") as stream:
    settings = json.load(stream)
for name in ("port", "lease_ttl", "stop_notice", "restarts", "dump_minutes", "dump_keep"):
    settings[name] = str(settings[name])
with open("host/settings.json", "w") as stream:
    json.dump(dict(settings, successor=[]), stream)
with open("run/kept.json", "w") as stream:
    json.dump({"settings": "0", "files": {}, "server": {"roles": []}}, stream)
for name in ("scheduler_slurm", "scheduler_gridengine", "scheduler_local"):
    open(f"host/hpc_db_host/{name}.py", "w").close()
os.remove("log/events.jsonl")
"""


def run_python(target: Target, script: str) -> str:
    """Run a script with the instance's Python."""
    instance = target.variables["instance_name"]
    text = script.replace("INSTANCE", str(instance))
    return target.run(f"~/hpc_db/{instance}/python/bin/python - 2>/dev/null <<'EOF'\n{text}\nEOF")


def test_first_run_takes_it_over(here: Target) -> None:
    made = here.play("hpc_db")
    assert made.returncode == 0, made.stdout
    assert run_python(here, WORK) == "3"
    assert here.play("stop").returncode == 0
    run_python(here, EARLIER)

    taken = here.play("hpc_db")
    assert taken.returncode == 0, taken.stdout
    assert run_python(here, WORK) == "6"
    again = here.play("hpc_db", {"server_look_closely": True})
    assert re.search(r"localhost .* changed=0 .* failed=0", again.stdout), again.stdout
    assert here.play("status").returncode == 0


def test_running_server_is_taken_over(here: Target) -> None:
    before = here.run(f"cat ~/hpc_db/{here.variables['instance_name']}/run/endpoint.json")
    run_python(here, EARLIER)

    taken = here.play("hpc_db")
    assert taken.returncode == 0, taken.stdout
    assert here.run(f"cat ~/hpc_db/{here.variables['instance_name']}/run/endpoint.json") == before
    assert run_python(here, WORK) == "9"
