# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run optuna-dashboard with workarounds for values that would make whole studies unreadable.

The dashboard keeps categorical choices in sets, which cannot contain lists: such a choice is replaced by its JSON text.
Its responses may contain numbers that are not valid JSON, and then the browser shows nothing. One trial that Optuna
cannot read hides its study, and one unreadable attribute of a study hides all studies.
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

# Matches a JSON string, or a number that JSON does not have; and replacements that a browser can parse.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
NUMBERS = {"Infinity": "1e999", "-Infinity": "-1e999", "NaN": "null"}


def initialise_with_texts(self: CategoricalDistribution, choices: Sequence[Any]) -> None:
    """Initialise a distribution whose choices are hashable."""
    initialise(self, [json.dumps(each) if isinstance(each, (dict, list)) else each for each in choices])


def build_or_why(self: RDBStorage, row: Any) -> FrozenTrial:
    """Return the trial of a row; if it cannot be read, a failed trial with the reason in an attribute."""
    try:
        trial = build(self, row)
        if any(map(math.isnan, trial.values or [])):
            raise ValueError("its value is NaN")
        return trial
    except Exception as error:  # Optuna may raise anything for invalid values
        return FrozenTrial(
            number=row.number, trial_id=row.trial_id, state=TrialState.FAIL, value=None, values=None,
            datetime_start=None, datetime_complete=None, params={}, distributions={}, system_attrs={},
            user_attrs={"cannot be read": f"{type(error).__name__}: {error}"}, intermediate_values={},
        )


def attribute(text: str) -> Any:
    """Return an attribute's value; its text if that is not valid JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_json(value: Any) -> str:
    """Return JSON that a browser can parse."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return TOKEN.sub(lambda found: NUMBERS.get(found[0], found[0]), json.dumps(value))


def prepare() -> None:
    """Replace the functions of Optuna and bottle by those above."""
    CategoricalDistribution.__init__ = initialise_with_texts
    RDBStorage._build_frozen_trial_from_trial_model = build_or_why
    storage.json = SimpleNamespace(loads=attribute, dumps=json.dumps)
    JSONPlugin.__init__ = partialmethod(JSONPlugin.__init__, as_json)


if __name__ == "__main__":
    prepare()
    main()
