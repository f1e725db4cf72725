# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of real studies, in a real browser without a network. PostgreSQL is Debian's."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Browser
from selenium.common.exceptions import NoAlertPresentException
from target import ROOT, Target

NAME = f"it{os.getpid()}"
HOSTILE = "<script>alert(1)</script>"

WORK = """
import optuna
storage = "postgresql+psycopg2:///?service={name}"
hostile = {hostile!r}

def objective(trial):
    x = trial.suggest_float("x<b>", -1, 1)
    kind = trial.suggest_categorical("kind", ["plain", hostile, None, 3])
    if kind == "plain":
        trial.suggest_int("only plain", 1, 9, log=True)
    trial.set_user_attr("note", hostile)
    for step in range(3):
        trial.report(float("nan") if step == 1 else x, step)
    if trial.number % 5 == 4:
        raise optuna.TrialPruned
    if trial.number % 7 == 6:
        raise RuntimeError("no")
    return float("inf") if trial.number == 7 else x ** 2

study = optuna.create_study(storage=storage, study_name=hostile)
study.optimize(objective, n_trials=40, catch=RuntimeError)
study.ask().suggest_float("x<b>", -1, 1)
study.enqueue_trial({{"x<b>": 0.5}})
both = optuna.create_study(storage=storage, study_name="both", directions=["minimize", "maximize"])
both.optimize(lambda trial: (trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)), n_trials=12)
only = optuna.create_study(storage=storage, study_name="only failed")
only.optimize(lambda trial: float("nan"), n_trials=2)
optuna.create_study(storage=storage, study_name="empty")
odd = optuna.create_study(storage=storage, study_name="odd")
odd.set_user_attr("file", "\\udce4.traj")
odd.enqueue_trial({{"x": 2.0}})
odd.optimize(lambda trial: trial.suggest_float("x", 5, 10) + sum(
    trial.suggest_categorical("layers", [[64, 64], [128], [32, 32, 32]])), n_trials=12)
trial = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL)
trial.datetime_complete = None
optuna.storages.RDBStorage(storage).create_new_trial(odd._study_id, trial)
"""
COUNTS = "42 trials: 28 complete, 4 fail, 8 pruned, 1 running, 1 waiting"


@pytest.fixture(scope="module")
def settings(quick_settings: dict, open_folder: Path) -> dict:
    """Settings of the instance, and of a workstation whose folder has an unusual name."""
    return {**quick_settings, "report_root": str(open_folder / "work station")}


@pytest.fixture(scope="module")
def studies(here: Target, settings: dict) -> Target:
    """A server with studies of all kinds."""
    here.environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(ROOT / ".cache" / "wheels"))
    played = here.play("hpc_db", settings)
    assert played.returncode == 0, played.stdout
    script = WORK.format(name=NAME, hostile=HOSTILE)
    here.run(f"~/hpc_db/{NAME}/python/bin/python - 2>/dev/null <<'EOF'\n{script}\nEOF")
    return here


def report(target: Target, settings: dict, *options: str) -> tuple[Path, int]:
    """Run the playbook; return the report's path and the number of changed tasks."""
    played = target.play("report", settings, *options)
    assert played.returncode == 0, played.stdout
    (file,) = re.findall(r"^(/.*\.html)$", played.stdout, re.MULTILINE)
    return Path(file), int(re.findall(r" changed=(\d+) ", played.stdout)[-1])


def look(browser: Browser, file: Path) -> str:
    """Open the report without a network; return its text after checking for requests and errors."""
    browser.requests()
    browser.complaints()
    browser.go_offline()
    browser.open(file.as_uri())
    browser.wait_for_text("Running trials")
    places = browser.driver.find_elements("css selector", ".plot")
    for place in places:
        browser.driver.execute_script("arguments[0].scrollIntoView()", place)
        browser.wait_for(lambda place=place: place.find_elements("css selector", ".main-svg .trace"))
    with pytest.raises(NoAlertPresentException):
        browser.driver.switch_to.alert  # noqa: B018
    assert {address.partition(":")[0] for address in browser.requests()} <= {"file", "data", "blob"}
    assert browser.complaints() == []
    assert "cannot be drawn" not in browser.text()
    return browser.text()


@pytest.fixture(scope="module")
def page(browser: Callable[..., Browser]) -> Browser:
    return browser()


def test_a_report_of_all_studies(studies: Target, settings: dict, page: Browser) -> None:
    file, _changed = report(studies, settings)
    text = look(page, file)

    for said in (
        f"studies/{HOSTILE}", COUNTS, "Complete trials with an infinite value, which are not drawn: 1.",
        "studies/both", "12 trials: 12 complete", "Pareto front", "Optimisation history of objective 1",
        "studies/only failed", "2 trials: 2 fail", "No trial is complete with a finite value",
        "studies/empty", "no trials yet", "13 trials: 12 complete, 1 fail", r"\udce4.traj", "layers = [",
        "trial 0 has x = 2.0 outside of FloatDistribution", "trial 12 is FAIL without an end time",
        f"note = {HOSTILE}", "connections", "The studies were read from the running server.",
    ):
        assert said in text, (said, text)
    assert len(page.driver.find_elements("css selector", "#plot-0-1 .point")) > 20
    assert len(page.driver.find_elements("css selector", ".plot")) == 18
    page.driver.execute_script("scrollTo(0, 0)")
    page.screenshot("report", 1500)


def test_the_report_is_the_user_s_and_without_a_password(studies: Target, settings: dict) -> None:
    file = Path(settings["report_root"], f"{NAME}-report.html")
    passwords = {line.rsplit(":", 1)[1] for line in studies.run(f"cat ~/hpc_db/{NAME}/secrets/pgpass").splitlines()}

    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    assert passwords and not any(password in file.read_text() for password in passwords)
    assert studies.run(f"cd ~/hpc_db/{NAME}; ls -d .trials-* 2>/dev/null || echo none") == "none"


def test_the_report_stays_as_it_is_while_nothing_changes(studies: Target, settings: dict) -> None:
    file = Path(settings["report_root"], f"{NAME}-report.html")
    before = file.stat().st_mtime_ns

    assert report(studies, settings, "--check") == (file, 0)
    assert file.stat().st_mtime_ns == before


def test_without_a_server_the_studies_are_read_all_the_same(
    studies: Target, settings: dict, page: Browser, tmp_path: Path
) -> None:
    assert studies.play("stop", settings).returncode == 0

    text = look(page, report(studies, {**settings, "report_file": str(tmp_path / "mine.html")})[0])

    assert "none in the queue: the server is not running" in text
    assert COUNTS in text
    assert re.search(r"UTC still going on [\d:]+ away stopped by SIGTERM", text), text
