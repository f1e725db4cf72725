# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run that is interrupted at any task and repeated ends as an undisturbed run does; a dry run changes nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from target import ROOT, Target

WORK = """
import optuna
study = optuna.create_study(storage="postgresql+psycopg2:///?service=INSTANCE", study_name="s", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
print(len(study.trials))
"""
DATABASES = """
import psycopg2
cursor = psycopg2.connect("service=INSTANCE").cursor()
cursor.execute("SELECT datname FROM pg_database WHERE NOT datistemplate ORDER BY datname")
print(*[name for name, in cursor])
"""
SHOW = """
import psycopg2
cursor = psycopg2.connect("service=INSTANCE").cursor()
cursor.execute("SHOW log_min_duration_statement")
print(*cursor.fetchone())
"""
TASK = re.compile(r"TASK \[(.*)\] \*")


def tasks_of(output: str) -> list[str]:
    return TASK.findall(output)


def play_until(target: Target, task: int, end_with: signal.Signals, settings: dict | None = None) -> bool:
    """Run the playbook, and stop it within the task of that number. Return False if it ended by itself.

    Ansible may wait forever for one of its processes that SIGINT has ended; then it is killed, as a user would do.
    """
    with subprocess.Popen(
        target.command("hpc_db", settings), cwd=ROOT, env={**target.environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as running:
        seen = 0
        for line in running.stdout or ():
            if TASK.search(line):
                seen += 1
            if seen == task:
                # A task takes at least 0.3 s: it is running now, at a different point each time.
                time.sleep(0.05 * (task % 7))
                os.killpg(running.pid, end_with)
                break
        (running.stdout or open(os.devnull)).close()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
    return seen == task


@pytest.fixture
def nothing_left(here: Target) -> Iterator[None]:
    """Kill Ansible's processes of an interrupted run, which have their own sessions and may wait for ever."""
    yield
    own = here.command("hpc_db")[2].encode()  # the option that names the test's inventory
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            if own in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def run_python(target: Target, script: str) -> str:
    """Run a script with the instance's Python."""
    instance = target.variables["instance_name"]
    text = script.replace("INSTANCE", str(instance))
    return target.run(f"~/hpc_db/{instance}/python/bin/python - 2>/dev/null <<'EOF'\n{text}\nEOF")


@pytest.mark.usefixtures("nothing_left")
def test_interrupted_at_each_task_and_run_again(here: Target) -> None:
    before = here.files()
    checked = here.play("hpc_db", None, "--check")
    assert checked.returncode == 0, checked.stdout
    assert here.files() == before

    names = tasks_of(checked.stdout)
    begins = ": Ensure the instance directory exists"
    first = next(number for number, name in enumerate(names, 1) if name.endswith(begins))
    for task in range(first, len(names) + 1):
        if "Validating arguments" in names[task - 1]:
            continue
        play_until(here, task, signal.SIGKILL if task % 2 else signal.SIGINT)

    played = here.play("hpc_db")
    assert played.returncode == 0, played.stdout
    again = here.play("hpc_db")
    assert re.search(r"localhost .* changed=0 .* failed=0", again.stdout), again.stdout

    url = re.search(r"^postgresql\S+service=(\w+)$", again.stdout, re.MULTILINE)
    assert url
    assert url.group(1) == here.variables["instance_name"]
    assert run_python(here, WORK) == "3"
    # only the job's server: no temporary server is left
    assert here.run(f"pgrep -fc 'postgres -c [c]onfig_file=.*/{here.variables['instance_name']}/'") == "1"


@pytest.mark.usefixtures("nothing_left")
def test_configuration_of_an_interrupted_run_is_loaded_by_the_next(here: Target) -> None:
    changed = {"postgres_settings": {"log_min_duration_statement": "77s", "max_worker_processes": 9}}
    names = tasks_of(here.play("hpc_db", changed, "--check").stdout)
    written = next(number for number, name in enumerate(names, 1) if ": Write the configuration after" in name)

    assert play_until(here, written + 2, signal.SIGKILL, changed)
    before = run_python(here, SHOW)
    played = here.play("hpc_db", changed)

    assert played.returncode == 0, played.stdout
    assert (before, run_python(here, SHOW)) == ("-1", "77s")
    assert "The running server applies max_worker_processes" in played.stdout
    assert here.play("hpc_db").returncode == 0


def test_dry_run_beside_a_server_makes_no_database(here: Target) -> None:
    played = here.play("hpc_db")
    assert played.returncode == 0, played.stdout
    before = run_python(here, DATABASES)
    another = {"name": "another", "studies": [{"name": "beryllium"}]}

    checked = here.play("hpc_db", {"databases_studies": [{"name": "studies"}, another]}, "--check")

    assert checked.returncode == 0, checked.stdout
    assert re.search(r"^changed: .*item=another", checked.stdout, re.MULTILINE), checked.stdout
    assert run_python(here, DATABASES) == before
