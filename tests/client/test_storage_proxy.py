# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's storage proxy as instances run it, killed after it has executed a request and before it answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import optuna
import pytest
import storage_proxy
from cutting_proxy import ANSWER_LOST, Proxy
from hpc_db_client import proxy as client
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState
from real_server import Server, eventually, free_port

FOLDER = Path(__file__).resolve().parents[2] / "roles" / "server" / "files"
# The proxy; if the file "die" exists when it is about to execute a request that writes, it runs the code in the file
# instead, and exits like after kill -9.
PROGRAM = """
import os, sys
sys.path.append(sys.argv.pop(1))  # after a copy without one of the guards
die = sys.argv.pop(1)
import storage_proxy
from optuna.trial import TrialState

def deadly(act):
    def acting(self, request, context):
        if not os.path.exists(die):
            return act(self, request, context)
        storage = self._backend._storage
        with open(die) as stream:
            exec(stream.read(), dict(
                serve=lambda: act(self, request, context), request=request, storage=storage, TrialState=TrialState,
                ask=lambda statement: storage._backend.engine.connect().exec_driver_sql(statement).connection.commit(),
            ))
        os.unlink(die)
        os._exit(9)
    return acting

service = storage_proxy.OptunaStorageProxyService
for name in dir(service):
    if name[0].isupper() and not name.startswith("Get"):
        setattr(service, name, deadly(getattr(service, name)))
storage_proxy.FORGET_SECONDS = 0.2
while True:
    child = os.fork()  # a proxy takes most of its start to import all this
    if not child:
        storage_proxy.main()
    print("began", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
WAITS = 20.0
CERTIFICATE = [
    "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=hpc-db",
    "-addext", "subjectAltName=DNS:hpc-db", "-keyout", "proxy.key", "-out", "proxy.crt",
]


class Instance:
    """The part of an instance directory that the client reads, and the proxy, which is restarted when it ends."""

    def __init__(self, root: Path, server: Server, database: str = "study", port: int = 0) -> None:
        self.root = root
        self.server = server
        self.die = root / "die"
        self.ended: list[int] = []
        (root / "secrets").mkdir()
        (root / "run").mkdir()
        self.certify()
        listen = free_port()
        endpoint = {"proxy": {"host": "127.0.0.1", "port": listen}}
        (root / "run" / "endpoint.json").write_text(json.dumps(endpoint))
        where = f"127.0.0.1:{port or server.port}/{database}?sslmode=disable&gssencmode=disable"
        command = [
            sys.executable, "-c", PROGRAM, str(FOLDER), str(self.die), "--storage",
            f"postgresql+psycopg2://study@{where}", "--listen", "127.0.0.1", "--port", str(listen),
            "--connections", "3",
            f"--certificate={root}/secrets/proxy.crt", f"--key={root}/secrets/proxy.key",
        ]
        self._child = 0
        with open(root / "log", "ab") as log:
            self._program = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._program.stdout
        for line in self._program.stdout:
            what, number = line.split()
            if what == "began":
                self._child = int(number)
            else:
                self.ended.append(int(number))

    def certify(self) -> None:
        """Create a certificate that replaces the previous one."""
        subprocess.run(CERTIFICATE, cwd=self.root / "secrets", check=True, stderr=subprocess.DEVNULL)

    def storage(self, patience: float = 60) -> client.InstanceStorage:
        return client.storage(str(self.root) + "/", patience=patience)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def stop(self) -> None:
        os.killpg(self._program.pid, signal.SIGKILL)
        self._program.wait()
        self._reader.join(60)


@pytest.fixture(scope="module")
def cutting(server: Server) -> Iterator[Proxy]:
    """The proxy between the storage proxy and postgres."""
    with Proxy(server.port, lambda pid: server.ask(f"SELECT pg_terminate_backend({pid})")) as cutting:
        yield cutting


@pytest.fixture(scope="module")
def instance(server: Server, cutting: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    instance = Instance(tmp_path_factory.mktemp("instance"), server, port=cutting.port)
    yield instance
    instance.stop()


@pytest.fixture
def killed(instance: Instance) -> Iterator[Callable[..., None]]:
    """Make the storage proxy die at its next writing request, and check that it has died."""
    before = len(instance.ended)

    def die(does: str = "serve()") -> None:
        instance.die.write_text(does)

    yield die
    assert instance.ended[before:] == [9]


def test_study_is_made_once(instance: Instance, killed: Callable[..., None]) -> None:
    storage = instance.storage()
    killed()

    study = optuna.create_study(storage=storage, study_name="once")

    assert [each.study_name for each in optuna.get_all_study_summaries(storage)].count("once") == 1
    assert optuna.load_study(storage=instance.storage(), study_name="once")._study_id == study._study_id
    with pytest.raises(DuplicatedStudyError):
        optuna.create_study(storage=storage, study_name="once")


def test_trial_is_made_once(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="trial")
    killed()

    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)

    assert [(each.number, each.state) for each in study.trials] == [(0, TrialState.COMPLETE)]


def test_enqueued_trial_is_taken_once(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="enqueued")
    study.enqueue_trial({"x": 0.25})
    killed()

    trial = study.ask()

    assert (trial.number, trial.suggest_float("x", 0, 1)) == (0, 0.25)
    assert Counter(each.state for each in study.trials) == {TrialState.RUNNING: 1}


def test_end_of_a_trial_is_told_once(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="end")
    trial = study.ask()
    killed()

    study.tell(trial, 0.5)

    assert [(each.state, each.value) for each in study.trials] == [(TrialState.COMPLETE, 0.5)]
    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        study.tell(trial, 0.6)


def test_end_that_somebody_else_has_told_is_refused(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="other end")
    trial = study.ask()
    killed("storage.set_trial_state_values(request.trial_id, TrialState.FAIL)")

    with pytest.raises(UpdateFinishedTrialError):
        study.tell(trial, 0.5)

    assert [(each.state, each.value) for each in study.trials] == [(TrialState.FAIL, None)]


def test_trial_is_made_once_though_the_commit_s_answer_was_lost(instance: Instance, cutting: Proxy) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="commit")
    study.tell(study.ask(), 1.0)
    cutting.cut_at(b"COMMIT", ANSWER_LOST, after=b"INSERT INTO hpc_db.requests")

    study.tell(study.ask(), 2.0)

    assert [(each.number, each.value) for each in study.trials] == [(0, 1.0), (1, 2.0)]
    assert cutting.requests and not cutting.due, "it was lost"


def test_study_is_deleted_once(instance: Instance, killed: Callable[..., None]) -> None:
    storage = instance.storage()
    optuna.create_study(storage=storage, study_name="deleted")
    killed()

    optuna.delete_study(study_name="deleted", storage=storage)

    assert "deleted" not in optuna.get_all_study_names(storage)
    with pytest.raises(KeyError):
        optuna.delete_study(study_name="deleted", storage=storage)


def test_attribute_of_a_study_that_another_worker_has_set_since_is_kept(
    instance: Instance, killed: Callable[..., None]
) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="attribute")
    killed("serve(); storage.set_study_user_attr(request.study_id, request.key, 'later')")

    study.set_user_attr("key", "earlier")

    assert study.user_attrs == {"key": "later"}


def test_what_a_worker_sets_in_its_trial_may_be_set_twice(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="twice")
    trial = study.ask()
    x = trial.suggest_float("x", 0, 1)
    trial.report(1.0, step=1)
    trial.set_user_attr("key", "value")
    killed()

    y = trial.suggest_float("y", 0, 1)

    found = study.trials[0]
    assert (found.params, found.intermediate_values, found.user_attrs) == (
        {"x": x, "y": y}, {1: 1.0}, {"key": "value"}
    )


def test_waiting_client_finds_what_was_done_after_weeks(instance: Instance, killed: Callable[..., None]) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="weeks")
    killed("serve(); ask(\"UPDATE hpc_db.requests SET made = made - interval '31 days'\")")

    study.ask()

    assert [each.number for each in study.trials] == [0]


def test_notes_that_nobody_needs_are_deleted(instance: Instance, server: Server) -> None:
    def notes() -> int:
        return server.ask("SELECT count(*) FROM hpc_db.requests", "study")[0][0]

    study = optuna.create_study(storage=instance.storage(), study_name="notes")
    before = notes()

    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=10)

    assert notes() <= before + 1, "those that were answered are deleted with the next"
    server.ask("UPDATE hpc_db.requests SET made = made - interval '91 days'", "study")
    eventually(lambda: notes() == 0, WAITS)


def test_patience_ends_before_the_proxy_forgets(instance: Instance) -> None:
    with pytest.raises(ValueError, match="patience: 2.6784e[+]06 is not allowed; 0 to 2592000 seconds"):
        instance.storage(patience=31 * 86400)


def test_every_request_is_known(instance: Instance) -> None:
    stub = instance.storage()._channel.stub(look=False)
    writing = {name for name in vars(stub) if name[0].isupper() and not name.startswith("Get")}

    assert writing == client.ONCE | client.TWICE and not client.ONCE & client.TWICE
    for name in client.ONCE:  # SetStudyUserAttribute is set_study_user_attr
        method = re.sub("(?<=.)([A-Z])", r"_\1", name).lower().replace("attribute", "attr")
        assert method in vars(storage_proxy.Once)


def test_unknown_request_is_not_sent_again(instance: Instance) -> None:
    class Away(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    class Channel:
        data = ""
        sent = 0

        def stub(self, look: bool) -> Any:
            return self

        def with_call(self, request: str, metadata: tuple) -> None:
            self.sent += 1
            raise Away

        def __getattr__(self, name: str) -> Any:
            return self

    channel = Channel()
    with pytest.raises(Away):
        client._Stub(cast(Any, channel)).SetSomethingNew("request")
    assert channel.sent == 1


def test_repetition_waits_for_the_first_one() -> None:
    class Context:
        def send_initial_metadata(self, _metadata: tuple) -> None:
            pass

    served: list[str] = []

    def serve(request: str, _context: object) -> None:
        time.sleep(0.3 if request == "first" else 0)
        served.append(request)

    serving = storage_proxy.Serving(cast(Any, SimpleNamespace(request=threading.local())), "data")
    threads = [
        threading.Thread(target=serving._serve, args=(serve, what, Context(), {storage_proxy.REQUEST: request}))
        for what, request in (("first", "1"), ("again", "1"), ("another", "2"))
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()

    assert served == ["another", "first", "again"]


def test_other_certificate_at_the_same_address(instance: Instance) -> None:
    storage = instance.storage(patience=WAITS)
    before = len(storage.get_all_studies())
    instance.certify()
    instance.kill()

    assert len(storage.get_all_studies()) == before


@pytest.mark.parametrize("name", ["proxy.crt", "proxy.key"])
def test_client_waits_while_the_certificate_is_made_anew(instance: Instance, name: str) -> None:
    path = instance.root / "secrets" / name
    kept = path.read_bytes()
    storage = instance.storage(patience=WAITS)
    path.unlink()
    with ThreadPoolExecutor(1) as pool:
        studies = pool.submit(storage.get_all_studies)
        time.sleep(0.3)
        assert not studies.done()
        path.touch()
        time.sleep(0.3)
        assert not studies.done()
        path.write_bytes(kept)

        assert studies.result(WAITS)


def test_trial_that_somebody_else_has_taken_is_not_ours(instance: Instance) -> None:
    study = optuna.create_study(storage=instance.storage(), study_name="other")
    study.enqueue_trial({"x": 0.25})
    other = optuna.load_study(storage=instance.storage(), study_name="other")

    assert [study.ask().number, other.ask().number] == [0, 1]


def test_threads_share_a_storage(instance: Instance) -> None:
    storage = instance.storage()
    study = optuna.create_study(storage=storage, study_name="threads")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
    instance.die.write_text("serve()")

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

    with pytest.raises(StorageInternalError, match="the database was restored or replaced"):
        for _turn in range(100):
            trial.report(1.0, step=_turn)
            time.sleep(0.1)
    with pytest.raises(StorageInternalError, match="the database was restored or replaced"):
        study.tell(trial, 1.0)
    assert instance.ended[before:] == [3], "the proxy has begun anew, without what it remembered"
    again = optuna.load_study(storage=instance.storage(), study_name="moved")
    assert again.trials[0].state == TrialState.RUNNING
