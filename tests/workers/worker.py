# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An Optuna worker that writes down what the server acknowledged: python worker.py URL STUDY TRIALS LOG."""

import socket
import sys

import optuna


def main() -> None:
    """Work; each line of the log is a trial whose result the server has acknowledged."""
    url, name, trials, path = sys.argv[1:]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(storage=url, study_name=name)
    with open(path, "a", encoding="utf-8") as log:

        def write_down(_study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            print(trial.number, repr(trial.value), socket.gethostname(), file=log, flush=True)

        study.optimize(
            lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=int(trials), callbacks=[write_down]
        )


if __name__ == "__main__":
    main()
