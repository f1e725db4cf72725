# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An Optuna worker that writes down what the server acknowledged: python worker.py URL STUDY TRIALS LOG."""

import argparse
import socket
import time

import optuna


def main() -> None:
    """Work; each line of the log is a trial whose result the server has acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "study", "trials", "log"):
        parser.add_argument(name)
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a trial takes")
    parser.add_argument("--retry", action="store_true", help="when the server is gone, try again until it is back")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    left = int(arguments.trials)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        time.sleep(arguments.seconds)
        return x**2

    def write_down(_study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal left
        left -= 1
        print(trial.number, repr(trial.value), socket.gethostname(), file=log, flush=True)

    with open(arguments.log, "a", encoding="utf-8") as log:
        while left:
            try:
                storage = optuna.storages.RDBStorage(arguments.url, engine_kwargs={"pool_pre_ping": True})
                study = optuna.load_study(storage=storage, study_name=arguments.study)
                study.optimize(objective, n_trials=left, callbacks=[write_down])
            except Exception as error:  # a server that is gone shows as UnboundLocalError, too (Optuna's issue 5280)
                if not arguments.retry:
                    raise
                print(f"again after {type(error).__name__}: {error}".partition("\n")[0], flush=True)
                time.sleep(1)


if __name__ == "__main__":
    main()
