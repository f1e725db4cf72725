# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""optuna-dashboard, as its own command starts it, but with lists among a parameter's choices as their text.

It keeps choices in sets, where a list cannot be, and would answer 500 for the whole study.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna_dashboard._cli import main

initialise = CategoricalDistribution.__init__


def initialise_with_texts(self: CategoricalDistribution, choices: Sequence[Any]) -> None:
    """Make a distribution of choices that can be in a set."""
    initialise(self, [json.dumps(each) if isinstance(each, (dict, list)) else each for each in choices])


if __name__ == "__main__":
    CategoricalDistribution.__init__ = initialise_with_texts
    main()
