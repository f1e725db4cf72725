# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random transactions of many processes while the server is cut, killed, moved, restored and pooled; then check the
history.

``--history-seed=N`` selects other transactions and faults, or those of a run that failed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import history
import pytest
import sqlalchemy
from cutting_proxy import ANSWER_LOST, REQUEST_LOST, SESSION_LEFT, WAYS, Proxy
from real_server import DRIVERS, Pooler, Server, eventually

END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'study'"
OPTIONS = "plugin=hpc_db&hpc_db_patience=120&sslmode=disable&gssencmode=disable"
# Each fault comes once, then they are drawn at random. The first of two restores makes a copy.
FAULTS = [
    *2 * ["cut"], *4 * ["cut_commit"], *2 * ["cut_pooled"], "end", "kill", "crash", "restart", "move", "restart_pooler",
    *2 * ["restore"],
]


class World:
    """The server, the proxies in front of it, and all faults."""

    def __init__(self, server: Server, proxy: Proxy, pooler: Pooler, before_pooler: Proxy) -> None:
        self.server, self.proxy, self.pooler, self.before_pooler = server, proxy, pooler, before_pooler
        self.copies: list[history.Copy] = []
        self._saved: history.Copy | None = None

    def break_it(self, fault: str, chance: random.Random) -> None:
        getattr(self, fault)(chance)

    def cut(self, chance: random.Random) -> None:
        self.proxy.cut({chance.randint(1, 40): chance.choice(WAYS)})

    def cut_commit(self, chance: random.Random) -> None:
        self.proxy.cut_at(b"COMMIT", chance.choice(WAYS))

    def cut_pooled(self, chance: random.Random) -> None:
        self.before_pooler.cut({chance.randint(1, 15): chance.choice([REQUEST_LOST, ANSWER_LOST, SESSION_LEFT])})

    def _sessions(self) -> list[int]:
        found = self.server.ask("SELECT pid FROM pg_stat_activity WHERE datname = 'study' ORDER BY backend_start")
        return [pid for pid, in found]

    def end(self, chance: random.Random) -> None:
        for pid in self._sessions()[:chance.randint(1, 9)]:
            self.server.ask(f"SELECT pg_terminate_backend({pid})")

    def kill(self, chance: random.Random) -> None:
        for pid in chance.sample(pids, 1) if (pids := self._sessions()) else ():
            os.kill(pid, signal.SIGKILL)

    def crash(self, _chance: random.Random) -> None:
        self.server.stop("immediate")
        self.server.start()

    def restart(self, _chance: random.Random) -> None:
        self.server.stop()
        self.server.start()

    def move(self, _chance: random.Random) -> None:
        self.server.stop()
        self.server.move()
        self.proxy.server = self.server.port
        self.server.start()

    def restart_pooler(self, _chance: random.Random) -> None:
        self.pooler.kill()
        self.pooler.start()

    def restore(self, _chance: random.Random) -> None:
        """Copy the database; at the next call, put the copy in the database's place, as restore.yml does."""
        ((data,),) = self.server.ask("SELECT oid::bigint FROM pg_database WHERE datname = 'study'")
        if self._saved is None:
            self.server.ask("ALTER DATABASE study ALLOW_CONNECTIONS false")
            eventually(lambda: not self.server.ask(END_SESSIONS))
            began = time.monotonic()
            self.server.ask("CREATE DATABASE saved TEMPLATE study OWNER study")
            ((saved,),) = self.server.ask("SELECT oid::bigint FROM pg_database WHERE datname = 'saved'")
            tokens = frozenset(token for token, in self.server.ask("SELECT token FROM log", "saved"))
            self._saved = history.Copy(data, saved, began, tokens)
            self.server.ask("ALTER DATABASE study ALLOW_CONNECTIONS true")
            return
        swap = f'ALTER DATABASE study RENAME TO "study-{data}"; ALTER DATABASE saved RENAME TO study'
        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(self.server.ask, swap)
            while not swapping.done():
                self.server.ask(END_SESSIONS)
            swapping.result()
        self.copies.append(self._saved)
        self._saved = None

    def end_of_it(self) -> None:
        for name, in self.server.ask("SELECT datname FROM pg_database WHERE datname ~ '^(study-|saved$)'"):
            self.server.ask(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def world(server: Server, proxy: Proxy, pooler: Pooler) -> Iterator[World]:
    with Proxy(pooler.port, lambda _pid: None) as before_pooler:
        pooler.kill()
        pooler.start(server_port=proxy.port)
        world = World(server, proxy, pooler, before_pooler)
        yield world
        world.end_of_it()


@pytest.fixture
def amount(soak: bool) -> tuple[int, int, int]:
    """Return the numbers of processes, of transactions of each, and of faults."""
    return (8, 1250, 300) if soak else (4, 60, 40)


def test_history_holds(
    world: World, server: Server, amount: tuple[int, int, int], tmp_path: Path, history_seed: int,
) -> None:
    processes, transactions, faults = amount
    chance = random.Random(history_seed)
    owner = sqlalchemy.create_engine(f"postgresql+psycopg2://study@127.0.0.1:{server.port}/study?sslmode=disable")
    with owner.begin() as connection:
        history.create(connection)
    owner.dispose()
    workers = []
    for number in range(processes):
        port = (world.proxy if number % 3 else world.before_pooler).port
        url = f"postgresql+{DRIVERS[number % len(DRIVERS)]}://study@127.0.0.1:{port}/study?{OPTIONS}"
        command = [sys.executable, history.__file__, url, str(1000 * history_seed + number), str(transactions)]
        with open(tmp_path / f"{number}.log", "w") as said:
            workers.append(subprocess.Popen([*command, str(tmp_path / f"{number}.json")], stdout=said, stderr=said))

    try:
        for turn in range(faults):
            time.sleep(chance.uniform(0.05, 0.8))
            fault = FAULTS[turn % len(FAULTS)] if turn < len(FAULTS) else chance.choice(FAULTS)
            world.break_it(fault, chance)
        (tmp_path / history.STOP).touch()
        ended = [worker.wait(300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()

    assert ended == [0] * processes, [(tmp_path / f"{number}.log").read_text()[-500:] for number in range(processes)]
    events = [json.loads(line) for number in range(processes) for line in open(tmp_path / f"{number}.json")]
    owner = sqlalchemy.create_engine(
        f"postgresql+psycopg2://study@127.0.0.1:{server.port}/study?sslmode=disable", future=True
    )
    with owner.connect() as connection:
        wrong = history.check(events, world.copies, connection)
    owner.dispose()
    done = sum(event["said"] == "done" for event in events)
    print(f"{len(events)} transactions, {done} done, {faults} faults, {len(world.copies)} restores")
    assert wrong == [], f"--history-seed={history_seed}"
    assert done >= 0.5 * processes * transactions, [event.get("why") for event in events if event["said"] == "error"]


@pytest.mark.parametrize("wrong, statement", [
    ("doubled", "INSERT INTO log (token, data, kind, one, other, amount) "
                "SELECT token, data, kind, one, other, amount FROM log LIMIT 1"),
    ("lost", "DELETE FROM log WHERE id = (SELECT max(id) FROM log)"),
    ("half done: counter", "UPDATE counters SET n = n + 1 WHERE id = 0"),
    ("half done: accounts", "UPDATE accounts SET balance = balance - 1 WHERE id = 0"),
    ("half done: tasks", "DELETE FROM tasks WHERE id = (SELECT max(id) FROM tasks)"),
    ("half done: claims", "UPDATE tasks SET owner = NULL WHERE id = (SELECT min(id) FROM tasks WHERE owner <> '')"),
    ("done in other data", "UPDATE log SET data = 1 WHERE id = (SELECT max(id) FROM log)"),
])
def test_checker_finds(wrong: str, statement: str, url: str, server: Server) -> None:
    owner = sqlalchemy.create_engine(
        f"postgresql+psycopg2://study@127.0.0.1:{server.port}/study?sslmode=disable", future=True
    )
    with owner.begin() as connection:
        history.create(connection)
    worker = history.Worker(url, 7)
    events = [worker.transaction(number) for number in range(60)]
    with owner.connect() as connection:
        assert history.check(events, [], connection) == []
        connection.rollback()
        connection.execute(sqlalchemy.text(statement))
        found = history.check(events, [], connection)
    owner.dispose()

    assert any(each.startswith(wrong) for each in found), found


def test_checker_finds_stale_answers(url: str) -> None:
    told = {"kind": "counter", "said": "done", "data": 1, "token": "a", "began": 0.0, "ended": 1.0, "result": [0, 5]}
    stale = {**told, "kind": "look", "token": "b", "began": 2.0, "ended": 3.0, "result": [0, 4]}

    assert [each[:5] for each in history._check_answers([told, stale], [])] == ["stale"]
