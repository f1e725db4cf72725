# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One Optuna worker; job.sh starts many. Put your own objective here: this file is yours and is never overwritten."""

import os

import optuna


def objective(trial: optuna.Trial) -> float:
    """Train a model and return the loss."""
    x = trial.suggest_float("x", -10, 10)
    return (x - 2) ** 2


def storage() -> optuna.storages.RDBStorage:
    """Return the storage; with heartbeats if the client waits during outages of the server."""
    url = os.environ["HPC_DB_URL"]
    outage = int(os.environ["HPC_DB_OUTAGE"] or 0)
    if not outage:
        return optuna.storages.RDBStorage(url)
    # A waiting worker sends no heartbeats. An outage fails no trial, since a starting server renews all heartbeats. But
    # a single worker that cannot reach the running server waits for up to the max outage.
    heartbeat = {"heartbeat_interval": 60, "grace_period": outage + 2 * 60}
    # Optuna 4.9 renamed the callback.
    if hasattr(optuna.storages, "RetryHeartbeatStaleTrialCallback"):
        retry = {"heartbeat_stale_trial_callback": optuna.storages.RetryHeartbeatStaleTrialCallback()}
    else:
        retry = {"failed_trial_callback": optuna.storages.RetryFailedTrialCallback()}
    return optuna.storages.RDBStorage(url, **heartbeat, **retry)


def main() -> None:
    """Run trials until the study has as many complete ones as wanted."""
    complete = (optuna.trial.TrialState.COMPLETE,)
    wanted = int(os.environ["HPC_DB_TRIALS"])
    study = optuna.create_study(storage=storage(), study_name=os.environ["HPC_DB_STUDY"], load_if_exists=True)
    if len(study.get_trials(deepcopy=False, states=complete)) < wanted:
        study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(wanted, states=complete)])


if __name__ == "__main__":
    main()
