# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journal of one transaction: what was asked and what came back, to ask it again on another connection.

It holds statements and parameters as they were given, and a digest of each result: only whether a result is the
same again matters. What cannot be asked again, or not safely, is told by ``judge``.
"""

from __future__ import annotations

import copy
import hashlib
import re
from typing import Any

# A journal is no place for a bulk load.
MOST_STEPS = 10_000
MOST_BYTES = 16 * 1024**2
CHUNK = 1000

# Statements whose whole effect is in the transaction, and whose answer tells whether it is the same again.
_REPEATABLE = re.compile(
    r"(select|insert|update|delete|merge|with|values|table|show|lock|savepoint|release|rollback\s+to"
    r"|set\s+(local|transaction|constraints))\b", re.IGNORECASE,
)
# Their effect is in the transaction as well, but who makes tables wants to see what becomes of it.
_DEFINITION = re.compile(
    r"(create(?!\s+((global|local)\s+)?temp)|alter|drop|comment|grant|revoke|truncate|analyze)\b", re.IGNORECASE
)
# Functions and clauses that leave something in the session, or outside of every transaction.
_BEYOND = re.compile(
    r"\b((pg_(try_)?advisory_(un)?lock\w*|set_config|setval|dblink\w*|lo_\w+|pg_notify|pg_logical_emit_message"
    r"|pg_\w*(replication|backup|restore_point|terminate|cancel|reload)\w*)\s*\(|into\s+temp)", re.IGNORECASE,
)
# It writes nothing and takes no lock, so that nobody could tell whether the transaction was still there.
_ONLY_READS = re.compile(r"(select|show)\b(?!.*\b(for|into)\s)", re.IGNORECASE | re.DOTALL)
_CALL = re.compile(r"""([\w"]+)\s*\(""")
# What may stand before a parenthesis there: a function that is not known may write.
_READING = frozenset((
    "all", "and", "any", "as", "avg", "by", "case", "cast", "coalesce", "count", "current_setting", "distinct", "else",
    "exists", "extract", "filter", "from", "greatest", "having", "in", "join", "least", "length", "lower", "max", "min",
    "not", "now", "numeric", "on", "or", "over", "select", "sum", "then", "union", "upper", "using", "varchar",
    "version", "when", "where",
))
# SQLAlchemy asks for a key in this way: the value is ours from then on, whatever becomes of the transaction.
_NEXT_KEY = re.compile(r"""select nextval\('([^']*?)(\w+)"?'(?:::regclass)?\)""", re.IGNORECASE)


_ONLY_INSERTS = re.compile(r"(insert\s(?!.*\bselect\b)|select nextval\()", re.IGNORECASE | re.DOTALL)
# What stands in a literal is data. Where a backslash may end one or not, nothing is taken for a literal.
_LITERAL = re.compile(r"'[^'\\]*'")


class Differs(Exception):
    """A statement gave another result than before; the message says which."""


def judge(text: str) -> tuple[str, bool]:
    """Return why a statement cannot be repeated ("" if it can), and whether that outlasts its transaction."""
    body = _body(text)
    shown = text.strip()[:40].split("\n")[0]
    if ";" in body:
        return f"several statements in one ({shown}...)", True
    if _BEYOND.search(body):
        return f"a statement whose effect is beyond the transaction ({shown}...)", True
    if _REPEATABLE.match(body):
        return "", False
    return f"a statement that is not repeated ({shown}...)", not _DEFINITION.match(body)


def only_reads(text: str) -> bool:
    """Tell whether a statement certainly leaves nothing that a transaction could lose."""
    body = _body(text)
    return bool(_ONLY_READS.match(body)) and all(name.lower() in _READING for name in _CALL.findall(body))


def _body(text: str) -> str:
    body = text.strip(" \t\r\n;").lstrip("( \t\r\n")
    return body if "\\" in body else _LITERAL.sub("''", body)


class Step:
    """One statement and what came of it."""

    def __init__(
        self, method: str, text: str, arguments: tuple, options: dict, cursor_options: dict, free: bool = False
    ) -> None:
        self.method = method
        self.arguments = arguments
        self.options = options
        self.cursor_options = cursor_options
        self.text = text
        next_key = _NEXT_KEY.fullmatch(text.strip()) if method == "execute" else None
        self.sequence = next_key.group(2) if next_key else ""
        self.free = free  # need not come out the same, unless others depend on it
        self.kept = False
        self.key: int | None = None
        self.outcome = b""

    def keep(self) -> int:
        """Make the parameters ours, as the application may change its own; return about how many bytes they take."""
        self.arguments, self.options = copy.deepcopy((self.arguments, self.options))
        return _size(self.arguments)


class Journal:
    """The statements of the running transaction; ``why_not`` says why they cannot be repeated."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.began = False
        self.why_not = ""
        self.repeats = 0
        self._late: set[str] = set()  # sequences that others were given keys of after ours, before our rows were there
        self._bytes = 0

    def begin(self, step: Step) -> None:
        """Take note of a statement before it is sent."""
        self.began = True
        step.kept = not self.why_not and not (step.free and not self.steps)
        if not step.kept:
            return
        try:
            self._bytes += step.keep()
        except Exception as error:  # whatever a parameter's own class raises
            self.give_up(f"parameters that cannot be copied ({error})")
        if self._bytes > MOST_BYTES or len(self.steps) >= MOST_STEPS:
            self.give_up("more statements than are kept")

    def add(self, step: Step) -> None:
        """Take note of what came back."""
        if step.kept and not self.why_not:
            self.steps.append(step)

    def check_key(self, step: Step, key: int) -> None:
        """Take note of a key that is given now, when the statement is repeated."""
        if step.key is not None and key > step.key + 1:
            self._late.add(step.sequence)

    def check_order(self, step: Step) -> None:
        """Raise Differs if a statement looks at a table where our row comes later than its key says.

        Others may have counted the rows with smaller keys meanwhile: Optuna numbers its trials so.
        """
        words = set() if _ONLY_INSERTS.match(step.text.strip()) else set(re.findall(r"\w+", step.text))
        for sequence in self._late:
            if any(sequence.startswith(f"{word}_") for word in words):
                raise Differs(f"others were given keys of {sequence} meanwhile")

    def give_up(self, why: str) -> None:
        """Drop the statements: from now on they are not complete."""
        self.why_not = self.why_not or why
        self.steps.clear()


def digest(description: Any, status: Any, rows: list | None) -> bytes:
    """Return a fingerprint of a result."""
    hashed = hashlib.blake2b(repr((status, [tuple(column)[:2] for column in description or ()])).encode())
    for start in range(0, len(rows or ()), CHUNK):
        chunk = (rows or [])[start:start + CHUNK]
        text = repr(chunk)
        if "<memory at " in text:  # psycopg2's bytea, whose content the text does not show
            text = repr([[bytes(each) if isinstance(each, memoryview) else each for each in row] for row in chunk])
        hashed.update(text.encode("utf-8", "surrogatepass"))
    return hashed.digest()


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return 64 + len(value)
    if isinstance(value, dict):
        return 64 + sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return 64 + sum(map(_size, value))
    return 64
