# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An Optuna worker that records the results acknowledged by the server: python worker.py URL STUDY TRIALS LOG."""

import argparse
import socket
import time

import optuna


def main() -> None:
    """Run trials; each line of the log is a trial whose result the server has acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "study", "trials", "log"):
        parser.add_argument(name)
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a trial takes")
    parser.add_argument("--pause", type=float, default=0.0, help="how long it waits after a trial")
    parser.add_argument("--heartbeat", action="store_true", help="have others fail its trials if it seems to be dead")
    parser.add_argument("--random", action="store_true", help="sample at random, which takes less CPU than TPE")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        time.sleep(arguments.seconds)
        return x**2

    def write_down(_study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        print(trial.number, repr(trial.value), socket.gethostname(), file=log, flush=True)
        time.sleep(arguments.pause)

    storage = arguments.url
    if arguments.heartbeat:
        storage = optuna.storages.RDBStorage(arguments.url, heartbeat_interval=10, grace_period=300)
    with open(arguments.log, "a", encoding="utf-8") as log:
        sampler = optuna.samplers.RandomSampler() if arguments.random else None
        study = optuna.load_study(storage=storage, study_name=arguments.study, sampler=sampler)
        study.optimize(objective, n_trials=int(arguments.trials), callbacks=[write_down])


if __name__ == "__main__":
    main()
