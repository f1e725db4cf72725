# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record the statements that Optuna sends: PYTHON tests/client/record_statements.py, once with each environment's
Python.

Adds the statements of the installed versions of Optuna and SQLAlchemy, through each driver, to optuna_statements.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import optuna
import sqlalchemy
from real_server import Server

FILE = Path(__file__).with_name("optuna_statements.json")


def use(url: str) -> None:
    """Make Optuna send every statement it has."""
    storage = optuna.storages.RDBStorage(url, heartbeat_interval=1, grace_period=2)
    optuna.storages.RDBStorage(url)
    for name, directions in (("one", ["minimize"]), ("two", ["minimize", "maximize"])):
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        study.set_user_attr("note", "a note")
        study.set_user_attr("note", "another one")
        if hasattr(study, "set_metric_names"):
            study.set_metric_names(["value"] * len(directions))
        study.enqueue_trial({"x": 0.5})
        for number in range(4):
            trial = study.ask()
            x = trial.suggest_float("x", 0, 1, log=False)
            trial.suggest_int("n", 1, 9)
            trial.suggest_categorical("c", ["a", "b"])
            trial.set_user_attr("attribute", number)
            trial.set_user_attr("attribute", number + 1)
            storage.set_trial_system_attr(trial._trial_id, "system", 1)
            storage.record_heartbeat(trial._trial_id)
            storage.record_heartbeat(trial._trial_id)
            if len(directions) == 1:
                trial.report(x, 1)
                trial.report(x, 1)
                trial.report(float("inf"), 2)
                trial.should_prune()
            if number < 3:
                study.tell(trial, [x] * len(directions))
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
        study.add_trial(optuna.trial.create_trial(
            values=[1.0] * len(directions), user_attrs={"a": 1}, system_attrs={"b": 2},
        ))
        study.add_trial(optuna.trial.create_trial(
            values=[1.0] * len(directions), params={"x": 0.1},
            distributions={"x": optuna.distributions.FloatDistribution(0, 1)}, intermediate_values={1: 0.5},
        ))
        print(len(study.best_trials), len(study.get_trials(states=(optuna.trial.TrialState.RUNNING,))))
        if len(directions) == 1:
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        time.sleep(2.5)
        optuna.storages.fail_stale_trials(study)
        fresh = optuna.load_study(storage=url, study_name=name)
        print(len(fresh.trials), fresh.user_attrs, storage.get_n_trials(study._study_id))
    print([summary.n_trials for summary in optuna.get_all_study_summaries(storage)])
    optuna.copy_study(from_study_name="one", from_storage=url, to_storage=url, to_study_name="copy")
    optuna.delete_study(study_name="copy", storage=url)


def recorder(statements: set[str]) -> Callable:
    """Return a listener that adds each statement to ``statements``."""

    def note(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        statements.add(statement)

    return note


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="client-"))
    folder.chmod(0o755)
    server = Server(folder)
    said = json.loads(FILE.read_text()) if FILE.exists() else {"versions": [], "statements": []}
    try:
        for driver in ("psycopg2", "psycopg") if sqlalchemy.__version__ > "2" else ("psycopg2",):
            if not find_spec(driver):
                continue
            server.ask("DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION study", "study")
            statements: set[str] = set()
            note = recorder(statements)
            sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", note)
            use(f"postgresql+{driver}://study@127.0.0.1:{server.port}/study")
            sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", note)
            by = f"Optuna {optuna.__version__}, SQLAlchemy {sqlalchemy.__version__}, {driver}"
            said["versions"] = sorted({*said["versions"], by})
            said["statements"] = sorted(statements.union(said["statements"]))
    finally:
        server.stop("immediate")
        shutil.rmtree(folder)
    FILE.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
