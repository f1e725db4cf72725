# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A driver's connection and cursor whose server may go away in the middle of a transaction.

A transaction that was cut is decided like this, and only like this:

- The commit was not asked for: the server has rolled it back, or will. It is repeated. What it had read before it
  wrote or locked anything is not asked again: each statement sees what others have committed meanwhile, so it may
  differ in any case.
- The commit was asked for: the server says whether it happened (``pg_xact_status``). If so, it is done; if not, it
  is repeated.
- It cannot be repeated, one of its results differs, or the server cannot say: the error goes up.
"""

from __future__ import annotations

import select
import threading
from typing import Any, Callable, NamedTuple
from weakref import ref

from .journal import Differs, Journal, Step, digest, judge, only_reads
from .patience import GaveUp, Outage, Patience, tell

# A transaction that the server dies of is not what it should be given again and again.
MOST_REPEATS = 5
IN_ERROR = 3  # libpq's PQTRANS_INERROR
IN_THE_FUTURE = "22023"  # what pg_xact_status says of an id that has not been given yet
CANNOT = "a transaction was cut that cannot be repeated"
# The server ended the session: shutdown, crash, idle for too long.
ENDED = {"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"}
# What waiting does not mend. Only the first time: a server that once let us in, and now does not, is another's.
FUTILE = (
    "password authentication failed", "no password supplied", "no pg_hba.conf entry", "authentication failed for user",
    "does not exist", "permission denied for database", "channel binding", "certificate", "invalid connection option",
    "server does not support SSL", "root certificate file",
)

# Optuna stores heartbeats in the session's time zone without naming it, so two workers that differ in PGTZ would take
# each other for dead: every session is in UTC.
FACTS = """
SELECT set_config('TimeZone', 'UTC', false), pg_backend_pid(), s.backend_start::text,
    current_setting('server_version_num')::int, current_setting('transaction_isolation') = 'read committed',
    coalesce(has_function_privilege(
        to_regprocedure('pg_logical_emit_message(boolean, text, text, boolean)')::oid, 'EXECUTE'), false),
    has_function_privilege('pg_control_system()', 'EXECUTE')
FROM pg_stat_activity s WHERE s.pid = pg_backend_pid()
"""
IDENTITY = "SELECT system_identifier::text FROM pg_control_system()"
# The message makes the transaction's id durable before its commit is asked for: after a crash, an id that never
# reached the disk is given to somebody else's transaction, and its status would be taken for ours. (A transactional
# message would not be flushed, whatever its last argument says; this one carries the transaction's id as well.)
MARK = """
SELECT x::text, CASE WHEN x IS NOT NULL THEN pg_logical_emit_message(false, 'hpc_db', '', true) END::text
FROM pg_current_xact_id_if_assigned() x
"""
# What there is before PostgreSQL 17: it can prove that a transaction did not happen, but not that it did.
MARK_WEAKLY = "SELECT pg_current_xact_id_if_assigned()::text, NULL"
STATUS = """
SELECT CASE WHEN pg_current_wal_insert_lsn() >= '{lsn}'::pg_lsn THEN pg_xact_status('{xid}'::xid8) END
"""
# The server may not have noticed that we are gone, and its locks would keep us waiting.
END_OLD = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = {pid} AND backend_start = '{start}'::timestamptz
"""


class Facts(NamedTuple):
    """What has to be known of a session before it is lost."""

    pid: int
    start: str
    direct: bool  # no pooler between us and that process
    system: str  # the data directory's identity; "" if the server does not tell
    mark: str  # the statement that MARK is about; "" if the server has none
    read_committed: bool  # by default, each statement sees what others have committed meanwhile


class Link:
    """How to open and prepare one connection."""

    def __init__(
        self, connect: Callable[[], Any], prepare: Callable[[Any], object], dbapi: Any, patience: Patience,
        others: set[ref[Connection]],
    ) -> None:
        self._connect = connect
        self._prepare = prepare
        self.dbapi = dbapi
        self.patience = patience
        self.others = others  # connections of the same engine

    def open(self, outage: Outage, old: Facts | None, attributes: dict[str, Any]) -> tuple[Any, Facts]:
        """Wait until the server lets us in, end what is left of the old session, and prepare the new one."""
        self.park()
        while True:
            real = None
            try:
                real = self._connect()
                facts = self._facts(real)
                if not facts.direct and hasattr(real, "prepare_threshold"):
                    real.prepare_threshold = None  # psycopg 3's would be prepared on whatever connection was free
                self._prepare(real)
                for name, value in attributes.items():
                    if name == "set_isolation_level":
                        real.set_isolation_level(value)
                    else:
                        setattr(real, name, value)
                if old and old.direct and old.system == facts.system:
                    ask(real, END_OLD.format(pid=old.pid, start=old.start))
            except self.dbapi.Error as error:
                lost = real is None or self.is_lost(real, error)
                close(real)
                if not lost or (real is None and not self._may_pass(error)):
                    raise
                # Workers that each hold one connection, and wait for another until somebody lets go of his, wait
                # for ever.
                for other in [each() for each in list(self.others)]:
                    if other:
                        other.make_room()
                self.pause(outage, error)
            else:
                self.patience.is_over()
                return real, facts

    def park(self, asking: Connection | None = None) -> None:
        """Behind a pooler (PgBouncer in transaction mode) let no thread wait for a connection while it keeps one."""
        for other in [each() for each in list(self.others)]:
            if other and other is not asking:
                other.park()

    def pause(self, outage: Outage, error: BaseException) -> None:
        """Wait a little; raise the driver's error when the budget is used up."""
        try:
            outage.pause(error)
        except GaveUp as gave_up:
            raise self.dbapi.OperationalError(str(gave_up)) from error

    def is_lost(self, real: Any, error: BaseException) -> bool:
        """Tell whether an error means that the session is no more."""
        if not isinstance(error, self.dbapi.Error):
            return False
        return bool(real.closed) or sqlstate(error) in ENDED or (sqlstate(error) or "").startswith("08")

    def _may_pass(self, error: Exception) -> bool:
        if not isinstance(error, self.dbapi.OperationalError):
            return False
        return self.patience.known or not any(each in str(error) for each in FUTILE)

    @staticmethod
    def _facts(real: Any) -> Facts:
        _zone, pid, start, version, is_committed, can_flush, can_identify = ask(real, FACTS)
        system = ask(real, IDENTITY)[0] if can_identify else ""
        mark = MARK if can_flush else MARK_WEAKLY if version >= 130000 else ""
        return Facts(pid, start, real.info.backend_pid == pid, system, mark if system else "", is_committed)


class Connection:
    """What SQLAlchemy takes for the driver's connection. ``real`` is one, and may become another."""

    __slots__ = (
        "real", "_link", "_facts", "_old", "_journal", "_attributes", "_bound", "_outage", "_thread", "_parked",
        "__weakref__",
    )
    # What can be read or called without leaving anything behind in the session.
    _HARMLESS = frozenset((
        "adapters", "autocommit", "broken", "closed", "cursor_factory", "deferrable", "dsn", "encoding", "fileno",
        "get_backend_pid", "get_dsn_parameters", "get_parameter_status", "get_transaction_status", "info",
        "isolation_level", "notices", "protocol_version", "read_only", "readonly", "row_factory", "server_version",
        "status",
    ))

    def __init__(self, link: Link) -> None:
        self._link = link
        self._old: Facts | None = None
        self._journal = Journal()
        self._attributes: dict[str, Any] = {}
        self._bound = ""  # why the session cannot be replaced
        self._outage: Outage | None = None
        self._thread = threading.get_ident()
        self._parked = False
        self.real, self._facts = link.open(Outage(link.patience), None, {})
        link.others.add(ref(self, link.others.discard))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name not in self._HARMLESS and not name.startswith("_"):
            self.bind(f"the driver's own {name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Connection.__slots__:
            object.__setattr__(self, name, value)
        else:
            self.revive()
            setattr(self.real, name, value)
            self._attributes[name] = value

    def set_isolation_level(self, level: Any) -> None:
        """psycopg2's; kept for the next connection."""
        self.revive()
        self.real.set_isolation_level(level)
        self._attributes["set_isolation_level"] = level

    def bind(self, why: str) -> None:
        """From now on the session holds what another one would not have."""
        self._bound = self._bound or why

    def unbind(self) -> None:
        """What was done with the driver's own connection has left nothing behind."""
        self._bound = ""

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """Return a cursor; one on the server is the driver's own, and binds."""
        if arguments or options.get("name"):
            self.revive()
            self.bind("a cursor on the server")
            return self.real.cursor(*arguments, **options)
        return Cursor(self, options)

    def ping(self) -> bool:
        """Tell whether the session is alive.

        A server that ends a session says so. One that is silent needs no question: the next statement is one.
        """
        self._link.park(self)
        try:
            news = select.poll()
            news.register(self.real.fileno(), select.POLLIN)
            if news.poll(0):
                ask(self.real, "SELECT 1")
        except self._link.dbapi.Error:
            self._discard()
            return False
        return True

    def make_room(self) -> None:
        """End the session if the thread that waits for another one has this one as well, and has only read in it."""
        if self._can_be_cut() and not self.real.closed:
            self._discard()

    def park(self) -> None:
        """Give a pooler its connection back if the thread that asks for another one has only read in this one."""
        if self._facts.direct or self.real.closed or not self._journal.began or not self._can_be_cut():
            return
        self._parked = True
        try:
            self.real.rollback()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            self._discard()

    def _can_be_cut(self) -> bool:
        idle = threading.get_ident() == self._thread and not self._bound
        return idle and not self._journal.why_not and not self._journal.steps

    def close(self) -> None:
        self.real.close()

    def rollback(self) -> None:
        """Roll back; a transaction that was cut is rolled back already, or will be."""
        try:
            if not self.real.closed:
                self.real.rollback()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            self._discard()
        self._end()

    def commit(self) -> None:
        """Commit; return only when the transaction is in the database, once."""
        if self._parked:  # it has only read
            self._end()
            return
        if not self._journal.began:
            if not self.real.closed:
                self.real.commit()
            return
        if self.real.autocommit or self.real.info.transaction_status == IN_ERROR:
            self.real.commit()  # which is an error, nothing, or a rollback
        else:
            self._commit()
        self._end()

    def perform(self, cursor: Cursor, method: str, text: str, arguments: tuple, options: dict) -> None:
        """Run a statement on ``cursor``, and if the server goes away, run it on the next connection."""
        why, lasting = judge(text)
        if why and lasting:
            self.bind(why)
        self.revive()
        self._thread = threading.get_ident()
        step = Step(method, text, arguments, options, cursor.options, self._reads_freely() and only_reads(text))
        if self.real.autocommit:
            cursor.run(self.real, step)  # whether it happened nobody could tell, so its error goes up
            return
        journal = self._journal
        self._parked = False  # what it had read need not be read again
        journal.begin(step)
        if why:
            journal.give_up(why)
        try:
            try:
                self._run_in_order(cursor, step)
            except Differs as differs:
                self._give_up(f"{CANNOT}: {differs}", self._link.dbapi.OperationalError(f"hpc_db: {CANNOT}: {differs}"))
            except self._link.dbapi.Error as error:
                if not self._link.is_lost(self.real, error):
                    raise
                self._discard()
                self._repeat(error, lambda: self._run_in_order(cursor, step))
        except self._link.dbapi.Error as error:
            step.outcome = _failure(error)
            if not step.kept:
                journal.give_up("a statement in it failed")
            elif self.real.closed:
                journal.give_up("its error went up before")
            raise
        except BaseException:  # interrupted: what the server has done is not known
            journal.give_up("an interrupted statement")
            raise
        finally:
            journal.add(step)

    def _run_in_order(self, cursor: Cursor, step: Step) -> None:
        self._journal.check_order(step)
        cursor.run(self.real, step)

    def revive(self) -> None:
        """Between transactions, and if nothing binds us to the old session, take another one for a lost one."""
        if self.real.closed and not self._journal.began and not self._bound:
            self._outage = None
            self._open()

    def _reads_freely(self) -> bool:
        """Tell whether a result that was read before any write or lock might as well have changed since."""
        return self._facts.read_committed and not {"isolation_level", "set_isolation_level"} & self._attributes.keys()

    def _commit(self) -> None:
        try:
            while not self._commit_once():
                pass
        except BaseException:
            self._journal.give_up("its commit failed before")
            raise

    def _commit_once(self) -> bool:
        """Commit; return False if the transaction had to be repeated and is still to be committed."""
        asked = False
        xid = lsn = None
        try:
            if self._facts.mark:
                xid, lsn = ask(self.real, self._facts.mark, in_transaction=True)
            asked = not self.real.closed
            self.real.commit()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            before = self._facts
            self._discard()
            if asked and before.mark and xid is None and not self._bound:
                return True  # nothing was written
            if asked and self._has_committed(before, xid, lsn, error):
                return True
            self._repeat(error, lambda: None)
            return False
        return True

    def _has_committed(self, before: Facts, xid: str | None, lsn: str | None, error: Exception) -> bool:
        """Ask new sessions until one can tell; raise ``error`` if none ever can."""
        cannot = "the server cannot tell whether the transaction was committed"
        if not before.mark:
            self._give_up(cannot, error)
        while True:
            self._open()
            if self._facts.system != before.system:
                self._give_up("this is not the data that the commit was sent to", error)
            try:
                status = ask(self.real, STATUS.format(xid=xid, lsn=lsn or "0/0"))[0]
            except self._link.dbapi.Error as again:
                if self._link.is_lost(self.real, again):
                    status = "in progress"  # for all that we know
                elif sqlstate(again) == IN_THE_FUTURE:
                    status = "aborted"  # nothing of it was left after a crash
                else:
                    self._give_up(cannot, error)
            if status == "aborted" or (status == "committed" and lsn):
                if self._bound:
                    self._discard()  # what the session held is gone: let nobody take this one for it
                return status == "committed"
            if status != "in progress":
                self._give_up(cannot, error)
            self._discard()
            self._old = before
            self._link.pause(self._current_outage(), error)

    def _repeat(self, error: Exception, again: Callable[[], None]) -> None:
        """Repeat the transaction on a new connection, and do ``again`` there; else raise ``error``."""
        journal = self._journal
        while True:
            why = self._bound or journal.why_not
            if not why and journal.repeats >= MOST_REPEATS:
                why = f"{MOST_REPEATS} connections lost in it"
            if why:
                self._give_up(f"{CANNOT}: {why}", error)
            journal.repeats += 1
            if self.real.closed:
                self._open()
            try:
                for step in journal.steps:
                    _run_again(self.real, step, self._link, journal)
                again()
                self._outage = None
                return
            except Differs as differs:
                self._give_up(f"{CANNOT}: {differs}", error)
            except self._link.dbapi.Error as another:
                if not self._link.is_lost(self.real, another):
                    raise
                self._discard()
                self._link.pause(self._current_outage(), another)

    def _open(self) -> None:
        self.real, self._facts = self._link.open(self._current_outage(), self._old, self._attributes)
        self._parked = False
        self._old = None

    def _current_outage(self) -> Outage:
        """Return the wait that this connection is in: one budget until the transaction goes on."""
        if self._outage is None:
            self._outage = Outage(self._link.patience)
        return self._outage

    def _discard(self) -> None:
        close(self.real)
        self._old = self._facts

    def _give_up(self, why: str, error: Exception) -> None:
        self._discard()
        tell(f"{why}; the error goes up")
        raise error

    def _end(self) -> None:
        self._parked = False
        self._journal = Journal()
        self._outage = None


class Cursor:
    """What SQLAlchemy takes for the driver's cursor. It has read its result, so that it outlives its connection."""

    _HARMLESS = frozenset((
        "arraysize", "closed", "description", "format", "itersize", "lastrowid", "mogrify", "name", "pgresult", "query",
        "row_factory", "rowcount", "scrollable", "statusmessage", "tzinfo_factory", "withhold",
    ))

    def __init__(self, connection: Connection, options: dict) -> None:
        connection.revive()
        self.connection = connection
        self.options = options
        self.rows: list | None = None
        self.position = 0
        self._of = connection.real
        self._real = self._of.cursor(**options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name not in self._HARMLESS and not name.startswith("_"):
            self.connection.bind(f"the driver's own cursor.{name}")
            self.rows = None
        return value

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def execute(self, statement: Any, *arguments: Any, **options: Any) -> Cursor:
        return self._perform("execute", statement, arguments, options)

    def executemany(self, statement: Any, *arguments: Any, **options: Any) -> Cursor:
        return self._perform("executemany", statement, arguments, options)

    def run(self, real: Any, step: Step) -> None:
        """Run a statement on a real connection and read its result."""
        if self._of is not real:
            self._of, self._real = real, real.cursor(**self.options)
        self.rows, step.outcome = _run(self._real, step)
        self.position = 0

    def fetchone(self) -> Any:
        rows = self._result()
        if self.position >= len(rows):
            return None
        self.position += 1
        return rows[self.position - 1]

    def fetchmany(self, size: int = 0) -> list:
        rows, start = self._result(), self.position
        self.position = min(len(rows), start + (size or self._real.arraysize))
        return rows[start:self.position]

    def fetchall(self) -> list:
        rows, start = self._result(), self.position
        self.position = len(rows)
        return rows[start:]

    def __iter__(self) -> Any:
        return iter(self.fetchone, None)

    @property
    def rownumber(self) -> int:
        return self.position

    def close(self) -> None:
        self.rows = None
        self._real.close()

    def _result(self) -> list:
        return self._real.fetchall() if self.rows is None else self.rows  # the driver says what is wrong

    def _perform(self, method: str, statement: Any, arguments: tuple, options: dict) -> Cursor:
        self.rows = None
        text = statement
        if hasattr(statement, "as_string"):
            text = statement.as_string(self._real)
        elif isinstance(statement, (bytes, bytearray)):
            text = bytes(statement).decode("utf-8", "replace")
        self.connection.perform(self, method, text, (statement, *arguments), options)
        return self


def ask(real: Any, statement: str, in_transaction: bool = False) -> Any:
    """Return the first row of a statement of ours; by itself it leaves no transaction open."""
    toggle = not in_transaction and not real.autocommit
    if toggle:
        real.autocommit = True
    cursor = real.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()
        if toggle and not real.closed:
            real.autocommit = False


def close(real: Any) -> None:
    """Close a connection, whatever state it is in."""
    if real is not None and not real.closed:
        real.close()


def sqlstate(error: BaseException) -> str | None:
    """Return PostgreSQL's code for an error, if it came from there."""
    return getattr(error, "pgcode", None) or getattr(error, "sqlstate", None)


def _run(cursor: Any, step: Step) -> tuple[list | None, bytes]:
    getattr(cursor, step.method)(*step.arguments, **step.options)
    rows = cursor.fetchall() if cursor.description is not None else None
    if step.sequence and step.key is None and rows:
        step.key = int(rows[0][0])
    return rows, digest(cursor.description, cursor.statusmessage, rows) if step.kept else b""


def _run_again(real: Any, step: Step, link: Link, journal: Journal) -> None:
    """Run a statement again; raise Differs if its result is another one, unless it is a key that we have."""
    journal.check_order(step)
    cursor = real.cursor(**step.cursor_options)
    try:
        rows, outcome = _run(cursor, step)
        while step.key is not None and rows and int(rows[0][0]) < step.key:  # a crash has set the sequence back
            rows, outcome = _run(cursor, step)
    except link.dbapi.Error as error:
        if link.is_lost(real, error):
            raise
        outcome = _failure(error)
    else:
        if step.key is not None and rows:
            journal.check_key(step, int(rows[0][0]))
            return  # nobody else was given our key, nor will be
    if outcome != step.outcome:
        raise Differs(f"another result than before ({str(step.arguments[0])[:60]!r})")


def _failure(error: BaseException) -> bytes:
    return b"error " + str(sqlstate(error)).encode()
