# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker that runs random transactions and records the result of each, and a checker of all these records.

Every writing transaction also adds a line to the table ``log``, under a token of its own. So the database can be
compared with the acknowledgements: transactions that are lost, doubled, half done, or done in other data than they
were meant for.

PYTHON history.py URL SEED COUNT FILE
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import sqlalchemy as sa

COUNTERS, ACCOUNTS, BALANCE = 3, 6, 100
OTHER_DATA = "the database was restored or replaced"
KINDS = ["counter", "counter", "blind", "blind", "transfer", "transfer", "put", "claim", "bulk", "look", "sum"]
# Seconds between transactions, during which no session is open.
MOST_REST = 0.02
# A file beside the worker's output: once it exists, the worker may end after COUNT transactions.
STOP = "stop"

TABLES = sa.MetaData()
counters = sa.Table("counters", TABLES, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))
accounts = sa.Table(
    "accounts", TABLES, sa.Column("id", sa.Integer, primary_key=True), sa.Column("balance", sa.Integer)
)
tasks = sa.Table(
    "tasks", TABLES, sa.Column("id", sa.Integer, primary_key=True), sa.Column("payload", sa.String),
    sa.Column("owner", sa.String),
)
log = sa.Table(
    "log", TABLES, sa.Column("id", sa.Integer, primary_key=True), sa.Column("token", sa.String),
    sa.Column("data", sa.BigInteger), sa.Column("kind", sa.String), sa.Column("one", sa.Integer),
    sa.Column("other", sa.Integer), sa.Column("amount", sa.Integer),
)


def create(connection: Any) -> None:
    """Create the tables in their state before the first transaction."""
    TABLES.drop_all(connection)
    TABLES.create_all(connection)
    connection.execute(counters.insert(), [{"id": number, "n": 0} for number in range(COUNTERS)])
    connection.execute(accounts.insert(), [{"id": number, "balance": BALANCE} for number in range(ACCOUNTS)])


class Worker:
    """Runs transactions on one engine until an error reports that the data has been replaced; then on a new engine."""

    def __init__(self, url: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.name = f"w{seed}"
        self._url = url
        self._engine: sa.engine.Engine | None = None
        self.data = 0

    def transaction(self, number: int) -> dict:
        """Run one transaction; return its result."""
        kind = self.random.choice(KINDS)
        event: dict[str, Any] = {"token": f"{self.name}-{number}", "kind": kind, "began": time.monotonic()}
        try:
            if self._engine is None:
                self._engine = sa.create_engine(self._url, future=True)
                with self._engine.connect() as connection:
                    (self.data,) = connection.execute(
                        sa.text("SELECT oid::bigint FROM pg_database WHERE datname = current_database()")
                    ).one()
            event["data"] = self.data
            with self._engine.connect() as connection, connection.begin():
                event["result"] = getattr(self, kind)(connection, event["token"])
            event["said"] = "done"
        except sa.exc.DBAPIError as error:
            event["said"], event["why"] = "error", str(error.orig).splitlines()[0]
            if OTHER_DATA in event["why"]:
                event["said"] = "refused"
                self._engine = None
        event["ended"] = time.monotonic()
        return event

    def note(self, connection: Any, token: str, kind: str, one: int, other: int = 0, amount: int = 0) -> None:
        line = {"token": token, "data": self.data, "kind": kind, "one": one, "other": other, "amount": amount}
        connection.execute(log.insert().values(**line))

    def counter(self, connection: Any, token: str) -> list[int]:
        one = self.random.randrange(COUNTERS)
        count = counters.update().where(counters.c.id == one).values(n=counters.c.n + 1).returning(counters.c.n)
        n = connection.execute(count).scalar_one()
        self.note(connection, token, "counter", one, n)
        return [one, n]

    def blind(self, connection: Any, token: str) -> list[int]:
        """Count without reading anything back: only the outcome of the commit tells whether it is done."""
        one = self.random.randrange(COUNTERS)
        connection.execute(sa.text("UPDATE counters SET n = n + 1 WHERE id = :one"), {"one": one})
        connection.execute(
            sa.text("INSERT INTO log (token, data, kind, one) VALUES (:token, :data, 'counter', :one)"),
            {"token": token, "data": self.data, "one": one},
        )
        return [one]

    def transfer(self, connection: Any, token: str) -> list[int]:
        one, other = self.random.sample(range(ACCOUNTS), 2)
        locked = sa.select(accounts).where(accounts.c.id.in_([one, other])).order_by(accounts.c.id).with_for_update()
        balances = dict(tuple(row) for row in connection.execute(locked))
        amount = self.random.randint(1, 9)
        for account, change in ((one, -amount), (other, amount)):
            connection.execute(
                accounts.update().where(accounts.c.id == account).values(balance=balances[account] + change)
            )
        self.note(connection, token, "transfer", one, other, amount)
        return [one, other, amount]

    def put(self, connection: Any, token: str) -> list[int]:
        (task,) = connection.execute(tasks.insert().values(payload=token)).inserted_primary_key
        self.note(connection, token, "put", task)
        return [task]

    def bulk(self, connection: Any, token: str) -> list[int]:
        connection.execute(tasks.insert(), [{"payload": token} for _task in range(3)])
        self.note(connection, token, "bulk", 3)
        return [3]

    def claim(self, connection: Any, token: str) -> list[int]:
        free = sa.select(tasks.c.id).where(tasks.c.owner.is_(None)).order_by(tasks.c.id).limit(1)
        task = connection.execute(free.with_for_update(skip_locked=True)).scalar_one_or_none()
        if task is None:
            return []
        connection.execute(tasks.update().where(tasks.c.id == task).values(owner=token))
        self.note(connection, token, "claim", task)
        return [task]

    def look(self, connection: Any, _token: str) -> list[int]:
        one = self.random.randrange(COUNTERS)
        return [one, connection.execute(sa.select(counters.c.n).where(counters.c.id == one)).scalar_one()]

    def sum(self, connection: Any, _token: str) -> list[int]:
        return [connection.execute(sa.select(sa.func.sum(accounts.c.balance))).scalar_one()]


class Copy(NamedTuple):
    """A database that has replaced another one."""

    source: int  # the oid of the replaced database
    data: int  # its own oid
    began: float  # time of the copy
    tokens: frozenset[str]


def check(events: list[dict], copies: list[Copy], connection: Any) -> list[str]:
    """Return the errors in the database at the end."""
    (data,) = connection.execute(
        sa.text("SELECT oid::bigint FROM pg_database WHERE datname = current_database()")
    ).one()
    lines = [row._asdict() if hasattr(row, "_asdict") else dict(row) for row in connection.execute(sa.select(log))]
    times = Counter(line["token"] for line in lines)
    copied = copies[-1].tokens if copies else frozenset()
    wrong = [f"doubled: {token}" for token, count in times.items() if count > 1]
    wrong += [
        f"done in other data: {line}" for line in lines if line["data"] != data and line["token"] not in copied
    ]
    writes = [event for event in events if event["kind"] not in ("look", "sum")]
    for event in writes:
        token, there = event["token"], event["token"] in times
        if event["said"] == "refused" and there and event.get("data") == data:
            wrong.append(f"refused, and there: {event}")
        if event["said"] != "done" or event["result"] == []:
            continue
        if event["data"] == data and not there:
            wrong.append(f"lost: {event}")
        for copy in copies:
            if event["data"] == copy.source and event["ended"] < copy.began and token not in copy.tokens:
                wrong.append(f"lost before the copy: {event}")
    wrong += _check_effects(lines, connection)
    wrong += _check_answers(events, lines)
    return wrong


def _check_effects(lines: list[dict], connection: Any) -> list[str]:
    """Compare the tables with the log: each transaction is there as a whole or not at all."""
    wrong = []
    of = Counter((line["kind"], line["one"]) for line in lines)
    for one, n in connection.execute(sa.select(counters.c.id, counters.c.n)):
        if n != of["counter", one]:
            wrong.append(f"half done: counter {one} is {n}, with {of['counter', one]} lines")
    balances = dict.fromkeys(range(ACCOUNTS), BALANCE)
    for line in lines:
        if line["kind"] == "transfer":
            balances[line["one"]] -= line["amount"]
            balances[line["other"]] += line["amount"]
    found = dict(tuple(row) for row in connection.execute(sa.select(accounts)))
    if found != balances:
        wrong.append(f"half done: accounts {found} instead of {balances}")
    there = {task: (payload, owner) for task, payload, owner in connection.execute(sa.select(tasks))}
    made = Counter(payload for payload, _owner in there.values())
    wanted = Counter({line["token"]: 3 if line["kind"] == "bulk" else 1 for line in lines
                      if line["kind"] in ("put", "bulk")})
    if made != wanted:
        wrong.append(f"half done: tasks {(made - wanted) + (wanted - made)}")
    claims = {line["one"]: line["token"] for line in lines if line["kind"] == "claim"}
    if claims != {task: owner for task, (_payload, owner) in there.items() if owner}:
        wrong.append("half done: claims")
    wrong += [f"other key than it was told: {line}" for line in lines
              if line["kind"] == "put" and there.get(line["one"], ("",))[0] != line["token"]]
    return wrong


def _check_answers(events: list[dict], lines: list[dict]) -> list[str]:
    """Compare the workers' results with the log, and with earlier results."""
    wrong = []
    by_token = {line["token"]: line for line in lines}
    done = [event for event in events if event["said"] == "done"]
    for event in done:
        line = by_token.get(event["token"])
        if line and event["kind"] == "counter" and event["result"] != [line["one"], line["other"]]:
            wrong.append(f"told something else: {event}, {line}")
        if line and event["kind"] in ("put", "claim") and event["result"] != [line["one"]]:
            wrong.append(f"told something else: {event}, {line}")
        if event["kind"] == "sum" and event["result"] != [ACCOUNTS * BALANCE]:
            wrong.append(f"seen by halves: {event}")
    counted: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for event in done:
        if event["kind"] == "counter":
            counted.setdefault((event["data"], event["result"][0]), []).append((event["ended"], event["result"][1]))
    for event in done:
        if event["kind"] in ("look", "counter"):
            before = [n for ended, n in counted.get((event["data"], event["result"][0]), ()) if ended < event["began"]]
            if before and event["result"][1] < max(before) + (event["kind"] == "counter"):
                wrong.append(f"stale: {event}, after {max(before)}")
    return wrong


def main() -> None:
    url, seed, count, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    worker = Worker(url, seed)
    number = 0
    with open(path, "w", encoding="utf-8") as stream:
        while number < count or not os.path.exists(os.path.join(os.path.dirname(path), STOP)):
            stream.write(json.dumps(worker.transaction(number)) + "\n")
            stream.flush()
            time.sleep(worker.random.uniform(0, MOST_REST))
            number += 1


if __name__ == "__main__":
    main()
