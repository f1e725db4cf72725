# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fill a database with studies that contain everything Optuna can store: python fill.py URL TRIALS [FILE].

FILE has more of them, as printed by everything.py.
"""

import json
import math
import random
import sys
import warnings
from datetime import datetime
from typing import Any, Optional

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

SPACE = [
    ("rate", FloatDistribution(1e-300, 1e300, log=True)),
    ("layers", IntDistribution(1, 9, step=2)),
    ("activation", CategoricalDistribution(["ReLU", "Tanh", None, 0.1, "Ω'\"\\"])),
]
WHEN = datetime(2026, 1, 31, 12, 30, 15, 250000)
STATES = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


def some_trial(number: int, objectives: int, chance: random.Random) -> FrozenTrial:
    """Return a trial with values that are easily corrupted."""
    state = STATES[number % len(STATES)]
    name, distribution = SPACE[number % len(SPACE)]
    value = math.inf if number == 4 else chance.uniform(-1, 1) * 10.0 ** chance.randint(-300, 300)
    layer = chance.choice([None, 0.1, "Ω'\"\\"])
    choices = {"rate": 10.0 ** chance.uniform(-299, 299), "layers": 7, "activation": layer}
    trial = create_trial(
        state=state,
        values=[value, 1 / 3][:objectives] if state == TrialState.COMPLETE else None,
        params={name: choices[name]},
        distributions={name: distribution},
        # Optuna takes 2 ms for each of these.
        user_attrs={"note": ["a\\b'c\"d\nΩ", chance.random()]} if number % 2 else {},
        system_attrs={"constraints": [-1e-17]} if number % 10 == 0 else {},
        intermediate_values={7: [math.nan, math.inf, chance.random()][number % 3]} if objectives == 1 else {},
    )
    trial.datetime_start = trial.datetime_complete = WHEN  # the same in every file
    return trial


def time_of(seconds: "Optional[float]") -> "Optional[datetime]":
    """Return a time as Optuna stores it."""
    return None if seconds is None else datetime.fromtimestamp(seconds)


def make(storage: Any, described: "dict[str, Any]") -> None:
    """Create a study, including invalid trials, which Study.add_trial would refuse."""
    study = optuna.create_study(storage=storage, study_name=described["name"], directions=described["directions"])
    held = storage.get_study_id_from_name(described["name"])
    for key, value in described["user_attrs"].items():
        study.set_user_attr(key, value)
    for key, value in described["system_attrs"].items():
        storage.set_study_system_attr(held, key, value)
    for number, trial in enumerate(described["trials"]):
        params = {name: (json_to_distribution(text), value) for name, (text, value) in trial["params"].items()}
        storage.create_new_trial(held, FrozenTrial(
            number=number, trial_id=number, state=TrialState[trial["state"]], value=None, values=trial["values"],
            datetime_start=time_of(trial["start"]), datetime_complete=time_of(trial["complete"]),
            params={name: kind.to_external_repr(value) for name, (kind, value) in params.items()},
            distributions={name: kind for name, (kind, _value) in params.items()},
            user_attrs=trial["user_attrs"], system_attrs=trial["system_attrs"],
            intermediate_values=dict(trial["intermediate"]),
        ))


def storage_of(url: str) -> Any:
    """Return the storage at a URL, or of a journal file."""
    if "://" in url:
        return optuna.storages.RDBStorage(url)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(url))


def main() -> None:
    """Create the studies, one of them with TRIALS trials, and those of FILE."""
    url, trials = sys.argv[1], int(sys.argv[2])
    warnings.simplefilter("ignore")  # about choices that are lists
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = storage_of(url)
    if sys.argv[3:]:
        with open(sys.argv[3], encoding="utf-8") as stream:
            for described in json.load(stream):
                make(storage, described)
    chance = random.Random(1)
    studies = {"many": (["minimize"], trials), "two Ω": (["minimize", "maximize"], 20), "empty": (["maximize"], 0)}
    for name, (directions, count) in studies.items():
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        study.set_user_attr("cutoff", {"radius": 4.67637, "notes": ["'", None]})
        study.add_trials([some_trial(number, len(directions), chance) for number in range(count)])


if __name__ == "__main__":
    main()
