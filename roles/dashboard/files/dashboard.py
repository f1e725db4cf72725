# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna-dashboard, as its own command starts it, but with what else would cost a whole study.

It keeps choices in sets, where a list cannot be: such a choice is its text here. It answers with numbers that a browser
does not read, which then shows nothing. And it does not read a study with a trial, nor any of them with a study's
attribute, that Optuna cannot read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

from bottle import JSONPlugin
from optuna.distributions import CategoricalDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import storage
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard._cli import main

initialise = CategoricalDistribution.__init__
build = RDBStorage._build_frozen_trial_from_trial_model

# A text, or a number that is none in JSON; and what a browser reads as such.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
NUMBERS = {"Infinity": "1e999", "-Infinity": "-1e999", "NaN": "null"}


def initialise_with_texts(self: CategoricalDistribution, choices: Sequence[Any]) -> None:
    """Make a distribution of choices that can be in a set."""
    initialise(self, [json.dumps(each) if isinstance(each, (dict, list)) else each for each in choices])


def build_or_why(self: RDBStorage, row: Any) -> FrozenTrial:
    """Return the trial of a row, or a failed one whose attribute tells why it cannot be read."""
    try:
        trial = build(self, row)
        if any(map(math.isnan, trial.values or [])):
            raise ValueError("its value is NaN")
        return trial
    except Exception as error:  # whatever Optuna raises for a value that it has not written
        return FrozenTrial(
            number=row.number, trial_id=row.trial_id, state=TrialState.FAIL, value=None, values=None,
            datetime_start=None, datetime_complete=None, params={}, distributions={}, system_attrs={},
            user_attrs={"cannot be read": f"{type(error).__name__}: {error}"}, intermediate_values={},
        )


def attribute(text: str) -> Any:
    """Return an attribute's value; the text that is there if it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_json(value: Any) -> str:
    """Return JSON that a browser reads."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return TOKEN.sub(lambda found: NUMBERS.get(found[0], found[0]), json.dumps(value))


def prepare() -> None:
    """Put these in the place of Optuna's and bottle's own."""
    CategoricalDistribution.__init__ = initialise_with_texts
    RDBStorage._build_frozen_trial_from_trial_model = build_or_why
    storage.json = SimpleNamespace(loads=attribute, dumps=json.dumps)
    JSONPlugin.__init__ = partialmethod(JSONPlugin.__init__, as_json)


if __name__ == "__main__":
    prepare()
    main()
