# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Print NUMBER studies and one more, with everything that Optuna can store: python everything.py NUMBER > studies.json.

hypothesis draws them, the same in each run; fill.py creates them.
"""

import json
import math
import sys
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some

LETTERS = some.characters(exclude_categories=["Cs"], exclude_characters="\0")
# Names in the database, and texts within JSON; only the latter may contain surrogates and NUL.
NAMES = some.text(LETTERS, min_size=1, max_size=12) | some.sampled_from(
    ["<script>alert(1)</script>", "Ω" * 512, "%(x)s", "{x}", "{{ x }}", "it's \"x\"", "\\", "\u202e", "constraints",
     "a\u2028\x85b\n\r\x0c"]
)
TEXTS = some.text(LETTERS, max_size=12) | some.sampled_from(["\ud800", "\0", "\udc80.traj", "</script>", "x" * 5000])
NUMBERS = some.floats() | some.floats(-1, 1) | some.sampled_from([math.inf, -math.inf, math.nan, -0.0, 5e-324])
FINITE = some.floats(-1e6, 1e6)
LEAVES = some.none() | some.booleans() | some.integers(-(2**70), 2**70) | NUMBERS | TEXTS
JSON = some.recursive(
    LEAVES, lambda held: some.lists(held, max_size=3) | some.dictionaries(TEXTS, held, max_size=3), max_leaves=6
)
STEPS = some.integers(-(2**31), 2**31 - 1)
# NaN within a list is a choice that Optuna itself cannot find again.
CHOICES = some.recursive(
    some.none() | some.booleans() | some.integers(-9, 9) | FINITE | TEXTS,
    lambda held: some.lists(held, max_size=3) | some.dictionaries(TEXTS, held, max_size=2), max_leaves=4,
)
TIMES = some.floats(0, 2e9) | some.none()


# One trial with many reported values; Optuna takes 3 ms for each.
LONG = {
    "name": "300 steps", "directions": ["minimize"], "user_attrs": {}, "system_attrs": {}, "trials": [{
        "state": "PRUNED", "values": None, "params": {}, "user_attrs": {}, "system_attrs": {},
        "intermediate": [[step, 1 / (step + 1)] for step in range(300)], "start": 1e9, "complete": 1.1e9,
    }],
}


def distribution(name: str, **attributes: Any) -> str:
    """Return a distribution in Optuna's own JSON."""
    return json.dumps({"name": name, "attributes": attributes})


@some.composite
def parameters(draw: some.DrawFn) -> tuple[str, some.SearchStrategy]:
    """Return a distribution, and the numbers that can stand for a value in it; some are out of its range."""
    kind = draw(some.sampled_from(["float", "log", "step", "int", "categorical", "categorical"]))
    if kind == "categorical":
        choices = draw(some.lists(CHOICES, min_size=1, max_size=5))
        choices = [each for number, each in enumerate(choices) if choices.index(each) == number]
        return distribution("CategoricalDistribution", choices=choices), some.integers(0, len(choices) - 1)
    if kind == "int":
        log = draw(some.booleans())
        stride = 1 if log else draw(some.integers(1, 3))
        low, steps = draw(some.integers(1 if log else -(10**9), 10**9)), draw(some.integers(0, 10**9))
        high = low + stride * steps
        held = distribution("IntDistribution", low=low, high=high, step=stride, log=log)
        return held, some.integers(0, steps).map(lambda number: low + stride * number) | some.just(high + 7)
    least, most = sorted([abs(draw(FINITE)) + 1e-9, abs(draw(FINITE)) + 1e-9])
    if kind == "step":
        least, most = float(int(least)), float(int(least)) + 10
    step = 0.25 if kind == "step" else None
    held = distribution("FloatDistribution", low=least, high=most, step=step, log=kind == "log")
    return held, (some.sampled_from([least, most]) if step else some.floats(least, most)) | some.just(most + 7)


@some.composite
def trials(draw: some.DrawFn, objectives: int, space: dict[str, tuple[str, some.SearchStrategy]]) -> dict[str, Any]:
    """Return a trial; a value is missing where Optuna stores none."""
    state = draw(some.sampled_from(["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]))
    values = [draw(NUMBERS.filter(lambda value: not math.isnan(value))) for _objective in range(objectives)]
    names = [name for name in space if draw(some.integers(0, 3))]
    marks = [{}, {}, {"constraints": values}, {"constraints:size": values[0]}, {"note": "\ud800"}]
    return {
        "state": state,
        "values": values if state == "COMPLETE" else None,
        "params": {name: [space[name][0], draw(space[name][1])] for name in names},
        "user_attrs": draw(some.dictionaries(NAMES, JSON, max_size=2)),
        "system_attrs": draw(some.sampled_from(marks)),
        "intermediate": list(draw(some.dictionaries(STEPS, NUMBERS, max_size=3)).items()),
        "start": draw(TIMES),
        "complete": draw(TIMES) if state in ("COMPLETE", "PRUNED", "FAIL") else None,
    }


@some.composite
def studies(draw: some.DrawFn) -> dict[str, Any]:
    """Return a study."""
    directions = draw(some.lists(some.sampled_from(["minimize", "maximize"]), min_size=1, max_size=3))
    space = draw(some.dictionaries(NAMES, parameters(), min_size=1, max_size=4))
    return {
        "name": draw(NAMES),
        "directions": directions,
        "user_attrs": draw(some.dictionaries(NAMES, JSON, max_size=3)),
        "system_attrs": {"study:metric_names": [draw(NAMES) for _each in directions]} if draw(some.booleans()) else {},
        "trials": draw(some.lists(trials(len(directions), space), min_size=6, max_size=12)),
    }


def drawn(number: int) -> list[dict[str, Any]]:
    """Return ``number`` studies, the same each time; hypothesis would like to draw the same parameters repeatedly."""
    found: list[dict[str, Any]] = []
    spaces: list[set[str]] = [set()]

    @settings(
        max_examples=number * 5, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(studies())
    def collect(study: dict[str, Any]) -> None:
        space = {text for trial in study["trials"] for text, _value in trial["params"].values()}
        if space not in spaces and len(found) < number:
            spaces.append(space)
            # Two studies of one name would be one study.
            found.append({**study, "name": f"{len(found)} {study['name']}"[:512]})

    collect()
    return [*found, LONG]


if __name__ == "__main__":
    json.dump(drawn(int(sys.argv[1])), sys.stdout)
