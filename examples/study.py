# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One Optuna worker, as in a job of a hyperparameter study: python study.py URL STUDY TRIALS."""

import math
import sys
import time

import optuna


def objective(trial: optuna.Trial) -> float:
    """Return a loss with many local minima; the best one, 0, is at x = y = 0."""
    x = trial.suggest_float("x", -4, 4)
    y = trial.suggest_float("y", -4, 4)
    time.sleep(0.02)  # stands for a training run
    return 20 + x**2 + y**2 - 10 * (math.cos(2 * math.pi * x) + math.cos(2 * math.pi * y))


if __name__ == "__main__":
    url, name, trials = sys.argv[1:]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(storage=url, study_name=name)
    study.optimize(objective, n_trials=int(trials))
