# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The journal of one transaction: its statements and results, to repeat it on another connection.

It holds the statements and parameters, but only a digest of each result, since results are only compared.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import hashlib
import ipaddress
import pickle
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .sql import Judgement

# A bulk load is too large for a journal.
MOST_STEPS = 10_000
MOST_BYTES = 16 * 1024**2
CHUNK = 1000

# Immutable types, which each driver writes in only one way.
_CONSTANT = frozenset((
    type(None), bool, int, float, str, bytes, decimal.Decimal, uuid.UUID,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta,
    ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network,
    ipaddress.IPv4Interface, ipaddress.IPv6Interface,
))
# Modules whose subclasses of these types are written in the same way.
_AS_GOOD = ("numpy", "sqlalchemy.sql.elements", "sqlalchemy.sql._elements_constructors")
# Wrappers by the drivers and SQLAlchemy, and the attribute that holds the value.
_WRAPPED = {
    ("psycopg2._json", "Json"): "adapted", ("psycopg2.extensions", "Binary"): "adapted",
    ("psycopg.dbapi20", "Binary"): "obj",
    ("psycopg.types.json", "Json"): "obj", ("psycopg.types.json", "Jsonb"): "obj",
}
_RANGES = ("psycopg2._range", "psycopg.types.range")


class Differs(Exception):
    """A repeated transaction would not be the same as before; the message says why."""


class Step:
    """One statement and its result."""

    __slots__ = (
        "method", "text", "parameters", "options", "judged", "make_cursor", "free", "size", "kept", "done", "key",
        "rows", "given", "outcome", "rowcount",
    )

    def __init__(
        self, method: str, text: Any, parameters: tuple, options: dict, judged: Judgement,
        make_cursor: Callable[[Any], Any],
    ) -> None:
        self.method = method
        self.text = text
        self.parameters = parameters  # none or one, as passed to the driver's method
        self.options = options
        self.judged = judged
        self.make_cursor = make_cursor
        self.free = False  # its result may differ, unless later statements depend on it
        self.size = len(text) if isinstance(text, (str, bytes)) else 0
        self.kept = False
        self.done = False  # its outcome is known
        self.key: int | None = None
        self.rows: list | None = None  # the rows that an INSERT has returned
        self.given: dict[str, tuple[str, list]] = {}  # values to pass on a repetition, with their types
        self.outcome = b""
        self.rowcount: int | None = None  # for an executemany that was sent one by one

    def keep(self) -> None:
        """Copy the parameters, since the application may change them; raise TypeError for an unknown type.

        Unknown types are not safe to repeat: psycopg2 lets an object write any text into the statement.
        """
        if self.parameters:
            mine, size = _copied(self.parameters[0])
            self.parameters = (mine, *self.parameters[1:])
            self.size += size


class Journal:
    """The statements of the running transaction; ``why_not`` says why they cannot be repeated, if so."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.began = False
        self.why_not = ""
        self.repeats = 0
        self.clock = False  # the clock was read by a statement whose result is not checked
        self.clock_twice = False
        self.isolated = False  # all statements may see the same snapshot (SET TRANSACTION)
        self.path = ""  # the search_path at the beginning
        self.crash = ""  # Facts.crash when it began
        self.keys: dict[str, set[int]] = {}  # for each sequence, the keys given to this transaction
        self.late: set[str] = set()  # tables where others got later keys before our rows were inserted
        self._bytes = 0

    def begin(self, step: Step) -> None:
        """Record a statement before it is sent."""
        self.began = True
        judged = step.judged
        if judged.why:  # guard: unknown statements
            self.give_up(judged.why)
        self.isolated = self.isolated or judged.isolates
        self.clock_twice = self.clock_twice or (judged.clock and self.clock)
        step.kept = not self.why_not and not (step.free and not self.steps and not self.isolated)
        if not step.kept:
            self.clock = self.clock or judged.clock
            return
        self._bytes += step.size
        if self._bytes > MOST_BYTES or len(self.steps) >= MOST_STEPS:
            self.give_up("too many statements to remember")
        if not self.why_not:
            self.steps.append(step)

    def check_order(self, step: Step, follow: Callable[[Iterable[str]], tuple[str, set[str]]]) -> None:
        """Raise Differs if a statement reads a table where our row was inserted later than its key suggests.

        Others may have counted the rows with smaller keys meanwhile, as Optuna does to number its trials. ``follow`` is
        ``catalog.follow``; a statement may read such a table through a view, a trigger or a partition.
        """
        is_rollback = step.judged.head == "rollback" and not step.judged.why  # the only statement of its text
        if not self.late or is_rollback:
            return
        why, seen = follow(step.judged.names)  # guard: order of keys, behind views
        if why:
            raise Differs(why)
        if not (step.judged.gives or step.judged.sequence):
            seen |= step.judged.names
        for table in self.late:
            if table in seen or (seen and not table):
                raise Differs(f"other sessions have received keys of {table or 'a sequence'} since")

    def give_up(self, why: str) -> None:
        """Drop the statements, since they will not be complete any more."""
        self.why_not = self.why_not or why
        self.steps.clear()


def digest(description: Any, status: Any, rows: list | None) -> bytes:
    """Return a digest of a result."""
    hashed = hashlib.blake2b(repr((status, [tuple(column)[:2] for column in description or ()])).encode())
    for start in range(0, len(rows or ()), CHUNK):
        chunk = (rows or [])[start:start + CHUNK]
        if not all(type(row) is tuple and _CONSTANT.issuperset(map(type, row)) for row in chunk):
            chunk = _shown(chunk)  # guard: values whose text is not all of them
        hashed.update(repr(chunk).encode("utf-8", "surrogatepass"))
    return hashed.digest()


def _shown(value: Any) -> Any:
    """Return a value whose repr is complete; those of numpy's arrays and psycopg2's bytea are abbreviated."""
    if type(value) in _CONSTANT:
        return value
    if isinstance(value, Mapping):
        return [(_shown(name), _shown(each)) for name, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    if isinstance(value, memoryview):
        return bytes(value)
    try:
        return pickle.dumps(value)
    except Exception:  # a class may raise any exception
        return uuid.uuid4()  # differs from any other result


def _copied(value: Any) -> tuple[Any, int]:
    """Return a private copy of a value, and its approximate size in bytes; raise TypeError for an unknown type."""
    kind = type(value)
    if kind in _CONSTANT:
        return value, 64 + (len(value) if kind in (str, bytes) else 0)
    if kind is list or kind is tuple:
        pairs = [_copied(each) for each in value]
        return kind(pair[0] for pair in pairs), 64 + sum(pair[1] for pair in pairs)
    if isinstance(value, Mapping) and not hasattr(kind, "__missing__"):
        size = 64
        mine = {}
        for name, each in value.items():
            mine[name], more = _copied(each)
            size += more
        return mine, size
    if kind in (bytearray, memoryview):
        return kind(bytes(value)), 64 + len(value)
    if isinstance(value, (int, float, str)) and kind.__module__ in _AS_GOOD:
        return value, 64 + len(str(value))
    inner = _WRAPPED.get((kind.__module__, kind.__name__))
    if inner:
        held = getattr(value, inner)
        _mine, size = _copied(held)
        return value if type(held) in _CONSTANT else copy.deepcopy(value), size
    if kind.__module__ in _RANGES:
        return copy.deepcopy(value), 256
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")
