# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage proxy as instances run it, killed after it has done what it was asked for and before it says so."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from hpc_db_client import proxy as client
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState
from real_server import Server

HOST = Path(__file__).resolve().parents[2] / "roles" / "server" / "files"
# The proxy; if the file "die" is there, it ends as if by kill -9 when it has done one of these, or before it does, when
# somebody else has ended the trial.
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
die = sys.argv.pop(1)
from hpc_db_host import storage_proxy
from optuna.trial import TrialState

def deadly(act):
    def acting(*arguments, **options):
        if not os.path.exists(die):
            return act(*arguments, **options)
        if os.path.getsize(die):
            arguments[0]._storage.set_trial_state_values(arguments[1], TrialState.FAIL)
        else:
            act(*arguments, **options)
        os.unlink(die)
        os._exit(9)
    return acting

for name in ("create_new_study", "create_new_trial", "set_trial_state_values"):
    setattr(storage_proxy.Once, name, deadly(getattr(storage_proxy.Once, name)))
storage_proxy.main()
"""
CERTIFICATE = [
    "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=hpc-db",
    "-addext", "subjectAltName=DNS:hpc-db", "-keyout", "proxy.key", "-out", "proxy.crt",
]


class Instance:
    """An instance directory as far as the client looks at it, and the proxy, which is started again when it ends."""

    def __init__(self, root: Path, server: Server, database: str = "study") -> None:
        self.root = root
        self.server = server
        self.die = root / "die"
        self.ended: list[int | None] = []
        (root / "secrets").mkdir()
        (root / "run").mkdir()
        subprocess.run(CERTIFICATE, cwd=root / "secrets", check=True, stderr=subprocess.DEVNULL)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        endpoint = {"proxy": {"host": "127.0.0.1", "port": port}}
        (root / "run" / "endpoint.json").write_text(json.dumps(endpoint))
        url = f"postgresql+psycopg2://study@127.0.0.1:{server.port}/{database}?sslmode=disable&gssencmode=disable"
        self._command = [
            sys.executable, "-c", PROGRAM, str(HOST), str(self.die), "--storage", url, "--listen", "127.0.0.1",
            "--port", str(port), "--connections", "3",
            f"--certificate={root}/secrets/proxy.crt", f"--key={root}/secrets/proxy.key",
        ]
        self._stopping = False
        self._child: subprocess.Popen | None = None
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._stopping:
            with open(self.root / "log", "ab") as log:
                self._child = subprocess.Popen(self._command, stdout=log, stderr=log)
            self.ended.append(self._child.wait())

    def storage(self) -> client.InstanceStorage:
        return client.storage(str(self.root) + "/", patience=60)

    def stop(self) -> None:
        self._stopping = True
        if self._child:
            self._child.kill()
        self._keeper.join(60)


@pytest.fixture(scope="module")
def instance(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    instance = Instance(tmp_path_factory.mktemp("instance"), server)
    yield instance
    instance.stop()


@pytest.fixture
def killed(instance: Instance) -> Iterator[Callable[[], None]]:
    """Have the proxy die of what it does next, and see that it has."""
    before = len(instance.ended)
    yield instance.die.touch
    assert instance.ended[before:] == [9]


def test_study_is_made_once(instance: Instance, killed: Callable[[], None]) -> None:
    storage = instance.storage()
    killed()

    study = optuna.create_study(storage=storage, study_name="once")

    assert [each.study_name for each in optuna.get_all_study_summaries(storage)].count("once") == 1
    assert optuna.load_study(storage=instance.storage(), study_name="once")._study_id == study._study_id
    with pytest.raises(DuplicatedStudyError):
        optuna.create_study(storage=storage, study_name="once")


def test_trial_is_made_once(instance: Instance, killed: Callable[[], None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="trial")
    killed()

    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)

    assert [(each.number, each.state) for each in study.trials] == [(0, TrialState.COMPLETE)]


def test_enqueued_trial_is_taken_once(instance: Instance, killed: Callable[[], None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="enqueued")
    study.enqueue_trial({"x": 0.25})
    killed()

    trial = study.ask()

    assert (trial.number, trial.suggest_float("x", 0, 1)) == (0, 0.25)
    assert Counter(each.state for each in study.trials) == {TrialState.RUNNING: 1}


def test_end_of_a_trial_is_told_once(instance: Instance, killed: Callable[[], None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="end")
    trial = study.ask()
    killed()

    study.tell(trial, 0.5)

    assert [(each.state, each.value) for each in study.trials] == [(TrialState.COMPLETE, 0.5)]
    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        study.tell(trial, 0.6)


def test_end_that_somebody_else_has_told_is_refused(instance: Instance, killed: Callable[[], None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="other end")
    trial = study.ask()
    instance.die.write_text("somebody else")

    with pytest.raises(UpdateFinishedTrialError):
        study.tell(trial, 0.5)

    assert [(each.state, each.value) for each in study.trials] == [(TrialState.FAIL, None)]


def test_trial_that_somebody_else_has_taken_is_not_ours(instance: Instance) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="other")
    study.enqueue_trial({"x": 0.25})
    other = optuna.load_study(storage=instance.storage(), study_name="other")

    assert [study.ask().number, other.ask().number] == [0, 1]


def test_threads_share_a_storage(instance: Instance) -> None:
    storage = instance.storage()
    study = optuna.create_study(storage=storage, study_name="threads")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
    instance.die.touch()

    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=30, n_jobs=6)

    assert Counter(each.state for each in study.trials) == {TrialState.COMPLETE: 35}
    assert sorted(each.number for each in study.trials) == list(range(35))


def test_clients_are_told_that_the_database_is_another_one(instance: Instance, server: Server) -> None:
    storage = instance.storage()
    study = optuna.create_study(storage=storage, study_name="moved")
    trial = study.ask()
    before = len(instance.ended)

    server.ask("ALTER DATABASE study SET hpc_db.generation = 'restored'")
    server.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'study'")

    with pytest.raises(StorageInternalError, match="the database is another one now"):
        for _turn in range(100):
            trial.report(1.0, step=_turn)
            time.sleep(0.1)
    with pytest.raises(StorageInternalError, match="the database is another one now"):
        study.tell(trial, 1.0)
    assert instance.ended[before:] == [3], "the proxy has begun anew, without what it remembered"
    again = optuna.load_study(storage=instance.storage(), study_name="moved")
    assert again.trials[0].state == TrialState.RUNNING
