# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that is killed during a trial."""

import os
import signal

import optuna


def objective(trial: optuna.Trial) -> float:
    """Suggest a parameter, and die."""
    trial.suggest_float("x", -10, 10)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


if __name__ == "__main__":
    study = optuna.load_study(storage=os.environ["HPC_DB_URL"], study_name=os.environ["HPC_DB_STUDY"])
    study.optimize(objective, n_trials=1)
