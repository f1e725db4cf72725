# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's own transactions, cut at every request: nothing lost, nothing doubled, no error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from cutting_proxy import WAYS, Proxy
from real_server import Server

optuna.logging.set_verbosity(optuna.logging.WARNING)
Ask = Callable[[str], list]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def schema(server: Server) -> None:
    optuna.storages.RDBStorage(f"postgresql+psycopg2://study@127.0.0.1:{server.port}/study?plugin=hpc_db")
    # the worker-tracking trigger, which each study database of this collection has
    spec = importlib.util.spec_from_file_location("_workers", ROOT / "plugins" / "module_utils" / "_workers.py")
    assert spec and spec.loader
    workers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workers)
    server.ask(workers.TAKE_NOTES, "study")


@pytest.fixture
def at_every_request(proxy: Proxy, ways: list[str], soak: bool) -> Callable[[Callable[[int], None]], int]:
    """Repeat some work until each of its requests has been cut; return the number of repetitions."""

    def repeat(work: Callable[[int], None], then: Callable[[], object] = lambda: None) -> int:
        proxy.cut({})
        work(0)
        requests = len(proxy.requests)
        print(requests, "requests")
        # Repetitions add requests. One cut at a time is the clean case, but slow.
        step = requests * 2 if soak and ways[0] in WAYS else 30
        for first in range(1, step):
            chosen = range(first, requests * 2, step)
            proxy.cut({number: ways[(first + turn) % len(ways)] for turn, number in enumerate(chosen)}, then)
            work(first)
        return step

    return repeat


def test_trials(url: str, ways: list[str], at_every_request: Callable, database: Ask) -> None:
    name = f"trials {url} {ways[0]}"
    study = optuna.create_study(storage=url, study_name=name)

    def work(number: int) -> None:
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        layer = trial.suggest_categorical("layer", ["a", "b"])
        trial.report(x, step=1)
        trial.set_user_attr("number", number)
        study.tell(trial, x)
        assert trial.number == number
        expected.append((trial.number, "COMPLETE", x, "ab".index(layer), x, str(number), x))

    expected: list[tuple] = []
    assert at_every_request(work) == len(expected) > 10
    assert database(f"""
        SELECT number, state::text, x.param_value, layer.param_value::int, intermediate_value, value_json, value
        FROM trials JOIN studies USING (study_id) LEFT JOIN trial_params x USING (trial_id)
        LEFT JOIN trial_params layer USING (trial_id) LEFT JOIN trial_intermediate_values USING (trial_id)
        LEFT JOIN trial_user_attributes USING (trial_id) LEFT JOIN trial_values USING (trial_id)
        WHERE study_name = '{name}' AND x.param_name = 'x' AND layer.param_name = 'layer' ORDER BY number
    """) == expected


def test_results_while_others_are_given_keys(
    url: str, ways: list[str], at_every_request: Callable, server: Server
) -> None:
    study = optuna.create_study(storage=url)
    values: dict[int, float] = {}

    def work(number: int) -> None:
        # study.ask() is not in here: it numbers the trial by its key, so it would raise an error.
        trial = optuna.Trial(study, trials[number])
        values[number] = trial.suggest_float("x", 0, 1)
        trial.report(values[number], step=1)
        trial.set_user_attr("number", number)
        study.tell(trial, values[number])

    trials = [study.ask()._trial_id for _turn in range(100)]
    at_every_request(work, lambda: server.ask("SELECT nextval(seqrelid::regclass) FROM pg_sequence", "study"))

    told = {trial.number: trial for trial in study.trials if trial.state.is_finished()}
    assert {number: trial.value for number, trial in told.items()} == values
    assert all(
        trial.params["x"] == trial.intermediate_values[1] == trial.value and trial.user_attrs["number"] == number
        for number, trial in told.items()
    )
    assert len(values) > 10


def test_studies(url: str, ways: list[str], at_every_request: Callable, database: Ask) -> None:
    begin = f"study {url} {ways[0]}"

    def work(number: int) -> None:
        study = optuna.create_study(
            storage=url, study_name=f"{begin} {number}", directions=["minimize", "maximize"], load_if_exists=True
        )
        study.set_user_attr("number", number)

    times = at_every_request(work)

    assert sorted(database(f"""
        SELECT study_name, value_json, string_agg(direction::text, ' ' ORDER BY objective)
        FROM studies JOIN study_directions USING (study_id) LEFT JOIN study_user_attributes USING (study_id)
        WHERE starts_with(study_name, '{begin} ') GROUP BY 1, 2
    """)) == sorted((f"{begin} {number}", str(number), "MINIMIZE MAXIMIZE") for number in range(times))
