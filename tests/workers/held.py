# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker like MALA's, whose only trial ends once the file exists: python held.py [FILE]."""

import os
import sys
import time
from pathlib import Path

GO = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("go")
# The server notices a dead node within seconds instead of two minutes.
os.environ["PGOPTIONS"] = "-c tcp_keepalives_idle=3 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=2"

import optuna  # noqa: E402 - with these options


def objective(trial: optuna.Trial) -> float:
    """Suggest MALA's parameters, and wait."""
    rate = trial.suggest_float("learning_rate", 1e-7, 1e-2)
    neurons = trial.suggest_int("ff_neurons_layer_00", 10, 100)
    trial.suggest_categorical("layer_activation_00", ["ReLU", "Sigmoid", "LeakyReLU"])
    trial.report(1.0, 0)
    while not GO.exists():
        time.sleep(0.2)
    return rate * neurons


if __name__ == "__main__":
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(os.environ["HPC_DB_URL"], engine_kwargs={"pool_pre_ping": True}),
        study_name=os.environ["HPC_DB_STUDY"],
        sampler=optuna.samplers.TPESampler(multivariate=True),
        load_if_exists=True,
    )
    study.optimize(objective, n_trials=1)
