# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The additions to optuna-dashboard, with stand-ins for it and Optuna; tests/integration has the real ones."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parents[3] / "roles/dashboard/files/dashboard.py"


class Distribution:
    def __init__(self, choices):
        self.choices = choices


class Storage:
    def _build_frozen_trial_from_trial_model(self, row):
        return SimpleNamespace(values=row.read())


class Plugin:
    def __init__(self, json_dumps=json.dumps):
        self.answer = json_dumps


@pytest.fixture
def prepared(monkeypatch):
    module = SimpleNamespace(json=json)
    for name, held in {
        "bottle": {"JSONPlugin": Plugin}, "optuna.distributions": {"CategoricalDistribution": Distribution},
        "optuna.storages": {"RDBStorage": Storage}, "optuna_dashboard._cli": {"main": None},
        "optuna.trial": {"FrozenTrial": SimpleNamespace, "TrialState": SimpleNamespace(FAIL="FAIL")},
        "optuna.storages._rdb": {"storage": module}, "optuna": {}, "optuna_dashboard": {},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**held))
    for each, method in ((Plugin, "__init__"), (Distribution, "__init__"),
                         (Storage, "_build_frozen_trial_from_trial_model")):
        monkeypatch.setattr(each, method, getattr(each, method))
    runpy.run_path(str(PROGRAM))["prepare"]()
    return module


@pytest.mark.parametrize("value, answer", [
    ({"a": [1.5, "Infinity"]}, '{"a": [1.5, "Infinity"]}'),
    ([math.inf, -math.inf, math.nan, 'NaN "Infinity', "\\"], r'[1e999, -1e999, null, "NaN \"Infinity", "\\"]'),
])
def test_answer_is_what_a_browser_reads(value, answer, prepared):
    assert Plugin().answer(value) == answer
    assert json.loads(answer, parse_constant=pytest.fail)


def test_choices_can_be_in_a_set(prepared):
    assert Distribution(choices=[[64, 64], {"a": 1}, "b", None]).choices == ["[64, 64]", '{"a": 1}', "b", None]


@pytest.mark.parametrize("text, value", [('{"a": NaN}', {"a": math.nan}), ("{cut", "{cut"), ("", "")])
def test_attribute_that_is_no_json_is_the_text_that_is_there(text, value, prepared):
    assert repr(prepared.json.loads(text)) == repr(value)


@pytest.mark.parametrize("read, why", [
    (lambda: "one".split()[7], "IndexError: list index out of range"),
    (lambda: [math.nan], "ValueError: its value is NaN"),
])
def test_trial_that_cannot_be_read_is_a_failed_one(read, why, prepared):
    trial = Storage()._build_frozen_trial_from_trial_model(SimpleNamespace(number=3, trial_id=9, read=read))

    assert (trial.number, trial.state, trial.user_attrs) == (3, "FAIL", {"cannot be read": why})


@pytest.mark.parametrize("values", [None, [1.0, math.inf]])
def test_other_trials_are_as_optuna_reads_them(values, prepared):
    trial = Storage()._build_frozen_trial_from_trial_model(SimpleNamespace(read=lambda: values))

    assert vars(trial) == {"values": values}
