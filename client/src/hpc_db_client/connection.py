# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""A driver's connection and cursor that survive the loss of the server in the middle of a transaction.

Only these rules decide what happens to an interrupted transaction:

- No commit was sent: the server has rolled the transaction back, or will do so. The transaction is repeated. Its reads
  before the first write or lock are not repeated: each statement sees the latest commits of others anyway, so their
  results could always have changed.
- A commit was sent: the server is asked whether it succeeded (``pg_xact_status``). If not, the transaction is repeated.
- The transaction is not known to be repeatable, one of its results differs, or the server does not know the outcome:
  the error is raised.

Each line that prevents double or partial execution is marked ``guard: NAME``; ``tests/client/guards.py`` removes them
one at a time and checks that a test fails.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any, Callable, NamedTuple
from weakref import ref

from . import catalog
from .journal import Differs, Journal, Step, digest
from .patience import GaveUp, Outage, Patience, in_short, tell
from .refusal import is_futile
from .sql import Judgement, judge, sequence_asked, with_values

# A transaction that crashes the server must not be repeated indefinitely.
MOST_REPEATS = 5
# If a sequence is further away from our keys than this, it does not count as expected.
MOST_KEYS = 1000
# Maximum number of names kept for a session.
MOST_NAMES = 5000
IN_TRANSACTION, IN_ERROR = 2, 3  # libpq's PQTRANS_INTRANS, PQTRANS_INERROR
IN_THE_FUTURE = "22023"  # the error of pg_xact_status for an id that was not assigned yet
CANNOT = "the connection was lost in a transaction that cannot be repeated"
LOST = "hpc_db: the transaction was interrupted and is not repeated; roll it back"
# SQLSTATEs of a session that the server has ended: shutdown, crash, idle timeouts.
ENDED = {"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"}

# Optuna stores heartbeats in the session's time zone without naming it, so workers with different PGTZ would fail each
# other's trials as stale. So every session uses UTC.
GENERATION = """
coalesce((
    SELECT setting FROM pg_db_role_setting, unnest(setconfig) setting
    WHERE setdatabase = {0} AND setrole = 0 AND left(setting, 18) = 'hpc_db.generation='
), '')
"""
FACTS = f"""
SELECT set_config('TimeZone', 'UTC', false), pg_backend_pid(), s.backend_start::text,
    current_setting('server_version_num')::int, current_setting('transaction_isolation') = 'read committed',
    current_setting('standard_conforming_strings') = 'on', current_setting('search_path'),
    (SELECT coalesce(stats_reset::text, '') FROM pg_stat_bgwriter),
    coalesce(has_function_privilege(
        to_regprocedure('pg_logical_emit_message(boolean, text, text, boolean)')::oid, 'EXECUTE'), false),
    has_function_privilege('pg_control_system()', 'EXECUTE'), pg_is_in_recovery(), s.datid::bigint,
    {GENERATION.format("s.datid")}
FROM pg_stat_activity s WHERE s.pid = pg_backend_pid()
"""
IDENTITY = "SELECT system_identifier::text FROM pg_control_system()"
# The message makes the transaction's id durable before the commit. After a crash, an id that never reached the disk is
# given to another transaction, and its status would be taken for ours. (A transactional message is not flushed,
# regardless of its last argument; this one also carries the transaction's id.)
MARK = """
SELECT x::text, CASE WHEN x IS NOT NULL THEN pg_logical_emit_message(false, 'hpc_db', '', true) END::text
FROM {id} x
"""
# Before PostgreSQL 17: this can prove that a transaction was not committed, but not that it was.
MARK_WEAKLY = "SELECT {id}::text, NULL"
# ID_IF_ANY returns no id for a transaction that has written nothing.
ANY_ID, ID_IF_ANY = "pg_current_xact_id()", "pg_current_xact_id_if_assigned()"
# A pooler may silently have replaced the session by one to other data.
DATA = f"""
SELECT d.oid::bigint, {GENERATION.format("d.oid")} FROM pg_database d WHERE d.datname = current_database()
"""
MARK_OF_DATA = f"SELECT m.*, d.* FROM ({{mark}}) m, ({DATA}) d"
STATUS = """
SELECT CASE WHEN pg_current_wal_insert_lsn() >= '{lsn}'::pg_lsn THEN pg_xact_status('{xid}'::xid8) END
"""
# Ends the old session: the server may not have noticed that it is lost, and its locks would block us.
END_OLD = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = {pid} AND backend_start = '{start}'::timestamptz
"""


class Identity(NamedTuple):
    """The identity of the data in a session. README.md explains how the generation is changed."""

    system: str  # the data directory's identifier; "" if we may not read it
    database: int
    generation: str


class Facts(NamedTuple):
    """Properties of a session that have to be known before it is lost."""

    pid: int
    start: str
    direct: bool  # no pooler between us and the server process
    identity: Identity
    mark: str  # MARK or a variant of it; "" if the server supports none
    read_committed: bool  # by default, each statement sees the latest commits of others
    standard_strings: bool  # a backslash in a literal is not an escape
    path: str  # the search_path of a new session
    crash: str  # the start of the server's statistics, which a crash resets


class Engine:
    """State that the connections of one engine share."""

    def __init__(self, dbapi: Any, patience: Patience) -> None:
        self.dbapi = dbapi
        self.patience = patience
        self.connections: set[ref[Connection]] = set()
        self._identity: Identity | None = None

    def check(self, identity: Identity) -> None:
        """Raise an error if a session sees other data than the first one.

        The new data may lack objects that the application has cached, such as Optuna's trials.
        """
        if self._identity is None:
            self._identity = identity
        if identity != self._identity:  # guard: identity
            raise self.dbapi.OperationalError(
                "hpc_db: the database was restored or replaced:"
                f" now {_in_words(identity)}, before {_in_words(self._identity)}; restart this program"
            )


def _in_words(identity: Identity) -> str:
    generation = identity.generation.partition("=")[2] or "none"
    return f"system {identity.system or 'unknown'}, database {identity.database}, generation {generation}"


class Link:
    """Opens and prepares one connection."""

    def __init__(self, connect: Callable[[], Any], prepare: Callable[[Any], object], engine: Engine) -> None:
        self._connect = connect
        self._prepare = prepare
        self._engine = engine
        self.dbapi = engine.dbapi
        self.patience = engine.patience
        self.others = engine.connections

    def open(self, outage: Outage, old: Facts | None, attributes: dict[str, Any]) -> tuple[Any, Facts]:
        """Connect, waiting for the server; end the old session if it still exists, and prepare the new one."""
        self.park()
        while True:
            real = None
            try:
                real = self._connect()
                if real.info.transaction_status == IN_TRANSACTION:
                    real.commit()  # creator= has left a transaction open
                facts = self._facts(real)
                self._engine.check(facts.identity)
                if not facts.direct and hasattr(real, "prepare_threshold"):
                    real.prepare_threshold = None  # psycopg 3 would prepare on any of the pooler's connections
                self._prepare(real)
                facts = facts._replace(read_committed=reads_committed(real, facts.read_committed))
                for name, value in attributes.items():
                    if name == "set_isolation_level":
                        real.set_isolation_level(value)
                    else:
                        setattr(real, name, value)
                if old and old.direct:
                    ask(real, END_OLD.format(pid=old.pid, start=old.start))
            except self.dbapi.Error as error:
                lost = real is None or self.is_lost(real, error)
                close(real)
                if not lost or (real is None and not self._may_pass(error)):
                    raise
                # Avoid a deadlock of workers that each hold one connection and wait for a second one.
                for other in [each() for each in list(self.others)]:
                    if other:
                        other.make_room()
                self.pause(outage, error)
            except BaseException:
                close(real)
                raise
            else:
                self.patience.is_over()
                return real, facts

    def check(self, system: str, *data: Any) -> None:
        """Raise an error if the data are not the same as before."""
        if data:
            self._engine.check(Identity(system, *data))

    def park(self, asking: Connection | None = None) -> None:
        """Behind a pooler (PgBouncer in transaction mode), ensure that no thread keeps a connection while it waits."""
        for other in [each() for each in list(self.others)]:
            if other and other is not asking:
                other.park()

    def pause(self, outage: Outage, error: BaseException) -> None:
        """Wait a little; after the max outage, raise an error of the driver's type."""
        try:
            outage.pause(error)
        except GaveUp as gave_up:
            raise self.dbapi.OperationalError(str(gave_up)) from error

    def is_lost(self, real: Any, error: BaseException) -> bool:
        """Return whether an error means that the session is lost."""
        if not isinstance(error, self.dbapi.Error):
            return False
        if real.closed:
            return True
        # libpq's own errors have no SQLSTATE. On a unix socket, psycopg2 may leave the connection open after one.
        if sqlstate(error) is None and type(error) in (self.dbapi.DatabaseError, self.dbapi.OperationalError):
            return True
        state = sqlstate(error) or ""  # a function in the database can raise any of them
        severity = getattr(getattr(error, "diag", None), "severity_nonlocalized", None)
        return (state in ENDED or state.startswith("08")) and severity != "ERROR"

    def _may_pass(self, error: Exception) -> bool:
        if not isinstance(error, self.dbapi.OperationalError):
            return False
        # Only before the first success: if a server refuses us later, it is not our server but another one.
        return self.patience.known or not is_futile(error) or bool(self.patience.outlook.next_job())

    @staticmethod
    def _facts(real: Any) -> Facts:
        (
            _zone, pid, start, version, is_committed, standard_strings, path, crash, can_flush, can_identify,
            standby, database, generation,
        ) = ask(real, FACTS)
        system = ask(real, IDENTITY)[0] if can_identify else ""
        mark = MARK if can_flush else MARK_WEAKLY if version >= 130000 else ""
        direct = real.info.backend_pid == pid
        if mark and not direct:
            mark = MARK_OF_DATA.replace("{mark}", mark)
        if standby or not system:
            mark = ""
        identity = Identity(system, database, generation)
        return Facts(pid, start, direct, identity, mark, is_committed, standard_strings, path, crash)


# All connections of this process: a forked child must not touch their sessions.
_connections: set[ref[Connection]] = set()
_parent_s: list[Any] = []


class Connection:
    """Takes the place of the driver's connection for SQLAlchemy. ``real`` is the driver's; it may be replaced."""

    __slots__ = (
        "real", "_link", "_facts", "_old", "_journal", "_attributes", "_bound", "_outage", "_thread", "_parked",
        "_lost", "_names", "_relations", "_mark", "_closed", "_checked", "looks", "__weakref__",
    )
    # Attributes and methods that leave no state in the session.
    _HARMLESS = frozenset((
        "autocommit", "broken", "closed", "cursor_factory", "deferrable", "dsn", "encoding", "fileno",
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
        self._closed = False  # by the application
        self._checked = False  # the identity of the data was compared in this transaction
        self._lost = False  # the transaction is not, or not completely, in the session
        self._mark: tuple | None = None  # the transaction's id, and the position of its mark in the WAL
        self._names: set[str] = set()  # in all statements of this session
        self._relations: set[str] = set()
        self.looks = False  # SQLAlchemy queries the server's properties, and leaves no state
        self.real: Any
        self._facts: Facts
        self._open()
        link.others.add(ref(self, link.others.discard))
        _connections.add(ref(self, _connections.discard))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name not in self._HARMLESS and not name.startswith("_"):
            self.bind(f"the driver's own {name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            self.revive()
            setattr(self.real, name, value)
            self._keep(name, value)

    def _keep(self, name: str, value: Any) -> None:
        """Remember an attribute for later sessions. They set all attributes in the order of the last assignments."""
        self._attributes.pop(name, None)
        self._attributes[name] = value

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: object, _error: object, _trace: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()
        if hasattr(self.real, "pgconn"):  # as psycopg 3 does
            self.close()

    def set_isolation_level(self, level: Any) -> None:
        """See psycopg2: this rolls back. The level is kept for later sessions."""
        self.rollback()
        self.revive()
        self.real.set_isolation_level(level)
        self._keep("set_isolation_level", level)

    def bind(self, why: str) -> None:
        """Note that the session now holds state that another one would lack, so it cannot be replaced."""
        if not self.looks:
            self._bound = self._bound or why

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """Return a cursor; a server-side cursor is the driver's own and binds the session."""
        if arguments or options.get("name"):
            self.revive()
            self.bind("a cursor on the server")
            return self.real.cursor(*arguments, **options)
        return Cursor(self, options)

    def ping(self) -> bool:
        """Return whether the session is alive.

        A server that ends a session sends a message. Without one, no query is needed here: the next statement will
        detect a loss.
        """
        self._link.park(self)
        try:
            if self.real.closed:
                return False
            news = select.poll()
            news.register(self.real.fileno(), select.POLLIN)
            status = self.real.info.transaction_status
            if (self._bound or news.poll(0)) and status != IN_ERROR:
                ask(self.real, "SELECT 1", in_transaction=status == IN_TRANSACTION)
        except self._link.dbapi.Error:
            self._discard()
            return False
        return True

    def make_room(self) -> None:
        """End the session if the thread that waits for another one owns it and has only read in it."""
        if self._can_be_cut():
            self._discard()
            self._lost = False  # the reads need not be repeated

    def park(self) -> None:
        """Return the pooler's connection if the thread that needs another one owns this one and has only read in it."""
        if self._facts.direct or not self._journal.began or not self._can_be_cut():
            return
        self._parked = True
        self._checked = False
        try:
            self.real.rollback()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            self._discard()
            self._lost = False

    def _can_be_cut(self) -> bool:
        idle = threading.get_ident() == self._thread and not self._bound and not self.real.closed and not self._lost
        if not idle or self._journal.why_not or self._journal.steps or self._journal.isolated:
            return False
        if not self._journal.began:
            return True
        if self._journal.clock or self.real.autocommit or self.real.info.transaction_status == IN_ERROR:
            return False
        try:
            return not self._find_unknown(in_transaction=True)
        except self._link.dbapi.Error:
            return False  # it is already lost

    def _find_unknown(self, in_transaction: bool = False) -> str:
        """Return the first unknown code that this session's statements may have called in the database; "" if none."""
        if not self._names:
            return ""
        timed = catalog.JUDGES if self._journal.clock else ("view",) if self._journal.began else ()
        try:
            return catalog.follow(
                lambda statement, parameters: ask_all(self.real, statement, parameters, in_transaction),
                self._names, self._relations, timed,
            )[0]
        except self._link.dbapi.Error as error:
            if self._link.is_lost(self.real, error):
                raise
            return str(error).splitlines()[0]

    def disown(self) -> None:
        """In a forked child: detach from the session and its transaction, which belong to the parent.

        Closing or deleting the driver's connection would send a message on the socket and end the parent's session.
        """
        real = self.real
        with contextlib.suppress(Exception):
            number = real.fileno()
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            os.close(nowhere)
        _parent_s.append(real)
        self.real = _Gone(self._link.dbapi)
        self._old = None
        self._facts = self._facts._replace(direct=False)
        if self._journal.began:
            self._journal.give_up("it belongs to the process that forked this one")
            self._lost = True

    def close(self) -> None:
        """Close the connection; its session is not replaced any more."""
        self._closed = True
        self.real.close()

    def rollback(self) -> None:
        """Roll back; for an interrupted transaction, the server does that anyway."""
        try:
            if not self.real.closed:
                self.real.rollback()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            self._discard()
        self._end()

    def commit(self) -> None:
        """Commit; return only when the transaction is in the database exactly once."""
        self._refuse_part()
        journal = self._journal
        if self._parked and not self._bound:  # the transaction has only read
            self._end()
            return
        if not journal.began or self._parked:
            if self._bound or not self.real.closed:  # commit also statements on the driver's own
                if self._bound and not self.real.closed and self.real.info.transaction_status == IN_TRANSACTION:
                    self._check_data(in_transaction=True)
                self.real.commit()
            self._end()
            return
        if self.real.autocommit or (not self.real.closed and self.real.info.transaction_status == IN_ERROR):
            self.real.commit()  # an error, nothing, or a rollback
        else:
            self._commit()
            return
        self._end()

    def perform(self, cursor: Cursor, step: Step) -> None:
        """Run a statement on ``cursor``; if the session is lost, repeat the transaction on a new one."""
        judged = step.judged
        self._refuse_part()
        if judged.binds:  # guard: what may stay in the session
            self.bind(judged.why)
        try:
            step.keep()
        except Exception as error:  # a parameter's class may raise any exception
            why = f"a parameter that is not known ({error})"
            self.bind(why)  # guard: parameters
            self._journal.give_up(why)
        if step.method == "executemany" and (judged.returns or step.options):
            self._journal.give_up("an executemany that returns rows, or has options")  # guard: rows of an executemany
        self._note(judged)
        self.revive()
        self._thread = threading.get_ident()
        if self.real.autocommit:
            self._check_data()
            cursor.run(self.real, step)  # its outcome cannot be found out, so errors are raised
            return
        step.free = judged.free and self._reads_freely()
        journal = self._journal
        if not journal.began:
            journal.path, journal.crash = self._facts.path, self._facts.crash
        self._parked = False  # the reads need not be repeated
        journal.begin(step)
        try:
            try:
                self._run_in_order(cursor, step)
            except Differs as differs:
                self._give_up(f"{CANNOT}: {differs}", self._link.dbapi.OperationalError(f"hpc_db: {CANNOT}: {differs}"))
            except self._link.dbapi.Error as error:
                if not self._link.is_lost(self.real, error):
                    raise
                self._discard()
                self._repeat(error, lambda: self._run_in_order(cursor, step), step)
        except self._link.dbapi.Error as error:
            step.outcome, step.done = _failure(error), True
            if not step.kept:
                journal.give_up("a statement in it failed")
            elif self._lost:
                journal.give_up("its error has already been raised")
            raise
        except BaseException:  # interrupted: the outcome is unknown
            journal.give_up("an interrupted statement")
            raise

    def _run_in_order(self, cursor: Cursor, step: Step) -> None:
        self._journal.check_order(step, partial(catalog.follow, _asking(self.real)))
        if self._journal.clock_twice and self._journal.repeats:  # guard: clock of a new transaction
            raise Differs("it has already read the clock")
        self._mark_early(step)
        cursor.run(self.real, step)

    def _mark_early(self, step: Step) -> None:
        """Set the mark before the transaction locks anything, so that others do not wait while it is flushed.

        Behind a pooler, the mark also returns the identity of the data; without a mark, that is queried separately.
        """
        if step.judged.writes and not self._mark and self._facts.mark:
            self._mark = self._set_mark(ANY_ID)
        elif not self._checked:
            self._check_data(in_transaction=True)

    def _set_mark(self, which: str) -> tuple:
        xid, lsn, *data = ask(self.real, self._facts.mark.replace("{id}", which), in_transaction=True)
        self._link.check(self._facts.identity.system, *data)  # guard: data behind a pooler
        self._checked = True
        return xid, lsn

    def _check_data(self, in_transaction: bool = False) -> None:
        """Raise an error if a pooler has replaced the session by one to other data."""
        if not self._facts.direct:
            data = ask(self.real, DATA, in_transaction)
            self._link.check(self._facts.identity.system, *data)  # guard: data behind a pooler, without a mark
        self._checked = True

    def judge(self, text: str, has_arguments: bool) -> Judgement:
        return judge(text, has_arguments, self._facts.standard_strings)

    def _note(self, judged: Judgement) -> None:
        if not (judged.names <= self._names and judged.relations <= self._relations):
            self._names |= judged.names
            self._relations |= judged.relations
            if len(self._names) > MOST_NAMES:
                self.bind("too many names to remember")

    def revive(self) -> None:
        """Replace a lost session between transactions, or after reads that need no repetition, unless it was bound."""
        if self._closed or self._bound:
            return
        if self.real.closed and not self._journal.steps and not self._journal.why_not:
            if self._journal.began and not self._reads_freely():
                return
            self._outage = None
            while self.real.closed:
                self._open()
                try:
                    self._check_known()
                except Differs as differs:
                    self.bind(str(differs))
                    self._discard()
                    return
                except self._link.dbapi.Error as error:
                    if not self._link.is_lost(self.real, error):
                        raise
                    self._discard()
                    self._link.pause(self._current_outage(), error)

    def _reads_freely(self) -> bool:
        """Return whether results read before any write or lock need not be repeated (see the module's rules)."""
        return (
            self._facts.read_committed and not self._journal.isolated
            and "isolation_level" not in self._attributes and "set_isolation_level" not in self._attributes
        )

    def _refuse_part(self) -> None:
        """Raise an error if the connection is closed, or if a part of the transaction is lost."""
        if self._closed:  # guard: closed
            self.real.commit()  # raises the driver's error
        if self._lost:  # guard: half a transaction
            self._discard()
            raise self._link.dbapi.InterfaceError(LOST)

    def _commit(self) -> None:
        try:
            while not self._commit_once():
                pass
            self._end()
        except BaseException:  # at any point, the transaction may already be committed
            self._journal.give_up("its commit has already failed")
            raise

    def _commit_once(self) -> bool:
        """Try to commit; return False if the transaction had to be repeated and is not committed yet."""
        asked = False
        xid = lsn = None
        journal = self._journal
        writes = bool(journal.steps or journal.why_not or self._bound or not self._reads_freely())
        try:
            if self._facts.mark and writes:
                early = not (self._bound or journal.why_not) and self._mark  # guard: mark of this transaction
                xid, lsn = early or self._set_mark(ID_IF_ANY)
            elif writes:
                self._check_data(in_transaction=True)
            asked = not self.real.closed
            self.real.commit()
        except self._link.dbapi.Error as error:
            if not self._link.is_lost(self.real, error):
                raise
            before = self._facts
            self._discard()
            if asked and before.mark and writes and xid is None and not self._bound and self._reads_freely():
                return True  # nothing was written
            if asked and writes and self._has_committed(before, xid, lsn, error):
                return True
            self._repeat(error, lambda: None)
            return not writes
        return True

    def _has_committed(self, before: Facts, xid: str | None, lsn: str | None, error: Exception) -> bool:
        """Return whether the transaction was committed, asking new sessions; raise ``error`` if that is unknown."""
        cannot = "the server cannot tell whether the transaction was committed"
        if not before.mark:
            self._give_up(cannot, error)
        if xid is None:
            return False
        while True:
            self._open()
            try:
                status = ask(self.real, STATUS.format(xid=xid, lsn=lsn or "0/0"))[0]
            except self._link.dbapi.Error as again:
                if self._link.is_lost(self.real, again):
                    status = "in progress"  # as far as known
                elif sqlstate(again) == IN_THE_FUTURE:
                    status = "aborted"  # a crash has removed all of it
                else:
                    self._give_up(cannot, error)
            if status == "aborted" or (status == "committed" and lsn):
                if self._bound:
                    self._discard()  # the bound session's state is lost: do not use this one instead
                return status == "committed"
            if status != "in progress":
                self._give_up(cannot, error)
            self._discard()
            self._old = before
            self._link.pause(self._current_outage(), error)

    def _repeat(self, error: Exception, again: Callable[[], None], current: Step | None = None) -> None:
        """Repeat the transaction on a new session, with ``again`` for the step ``current``; else raise ``error``."""
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
                self._check_known()
                users = _ask_for_keys(self.real, journal, journal.crash != self._facts.crash)
                for step in journal.steps:
                    if step is current:
                        break
                    if not step.done:
                        raise Differs("an interrupted statement")
                    self._mark_early(step)
                    _note_late(self.real, journal, users.get(id(step), ()))
                    _run_again(self.real, step, self._link, journal)
                self._lost = False
                again()
                self._outage = None
                return
            except Differs as differs:
                self._give_up(f"{CANNOT}: {differs}", error)
            except self._link.dbapi.Error as another:
                if not self._link.is_lost(self.real, another):
                    self._give_up(f"{CANNOT}: {in_short(another)}", error)
                self._discard()
                self._link.pause(self._current_outage(), another)

    def _check_known(self) -> None:
        """Raise Differs if the transaction cannot be repeated on this session."""
        unknown = self._find_unknown()
        if unknown:  # guard: what names mean
            raise Differs(unknown)
        if self._journal.began and self._journal.path != self._facts.path:  # guard: search_path
            raise Differs(f"the search_path is {self._facts.path} now and was {self._journal.path}")
        if self._journal.clock_twice:  # guard: clock
            raise Differs("it has already read the clock")

    def _open(self) -> None:
        self.real, self._facts = self._link.open(self._current_outage(), self._old, self._attributes)
        self._parked = self._checked = False
        self._old = self._mark = None
        if "pg_temp" in self._facts.path:
            self.bind("a search_path that names pg_temp")

    def _current_outage(self) -> Outage:
        """Return this connection's current outage, with one time limit until the transaction continues."""
        if self._outage is None:
            self._outage = Outage(self._link.patience)
        return self._outage

    def _discard(self) -> None:
        self._lost = self._journal.began
        close(self.real)
        self._old = self._facts

    def _give_up(self, why: str, error: Exception) -> None:
        self._discard()
        tell(f"{why}; raising the error")
        raise error

    def _end(self) -> None:
        self._parked = self._lost = self._checked = False
        self._mark = None
        self._journal = Journal()
        self._outage = None


_OWN = frozenset(Connection.__slots__)


class Cursor:
    """Takes the place of the driver's cursor for SQLAlchemy. It holds its whole result, so it survives its session."""

    __slots__ = ("connection", "options", "attributes", "rows", "position", "_of", "_made", "_rowcount", "__weakref__")
    _HARMLESS = frozenset((
        "closed", "description", "lastrowid", "mogrify", "name", "pgresult", "query", "statusmessage",
    ))

    def __init__(self, connection: Connection, options: dict) -> None:
        self.connection = connection
        self.options = options
        self.attributes: dict[str, Any] = {}  # set by the application
        self.rows: list | None = None
        self.position = 0
        self._of: Any = None
        self._made: Any = None
        self._rowcount: int | None = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name in self._HARMLESS or name.startswith("_"):
            return value
        if callable(value):
            return self._wrap(name, value)
        self.connection.bind(f"the driver's own cursor.{name}")
        return value

    def _wrap(self, name: str, method: Callable) -> Callable:
        """Wrap a method of the driver's cursor: a call binds the session and replaces the result."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.connection.bind(f"the driver's own cursor.{name}")
            self.rows, self.position = None, 0
            return method(*arguments, **options)

        return call

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    @property
    def _real(self) -> Any:
        """The driver's cursor, on the session that gave the result, or on the current one."""
        if self._made is None:
            self.connection.revive()
            self._of, self._made = self.connection.real, self.make(self.connection.real)
        return self._made

    def make(self, real: Any) -> Any:
        """Return a new cursor of the driver with the application's attributes."""
        made = real.cursor(**self.options)
        for name, value in self.attributes.items():
            setattr(made, name, value)
        return made

    def execute(self, query: Any, *arguments: Any, **options: Any) -> Cursor:
        return self._perform("execute", query, arguments, options)

    def executemany(self, query: Any, *arguments: Any, **options: Any) -> Cursor:
        return self._perform("executemany", query, arguments, options)

    def run(self, real: Any, step: Step) -> None:
        """Run a statement on a real connection and read its result."""
        if self._of is not real or self._made is None:
            self._of, self._made = real, self.make(real)
        self.rows = _run(self._made, step, step.text)
        self._rowcount = step.rowcount
        self.position = 0

    @property
    def rowcount(self) -> int:
        return self._real.rowcount if self._rowcount is None else self._rowcount

    def fetchone(self) -> Any:
        rows = self._result()
        if self.position >= len(rows):
            return None
        self.position += 1
        return rows[self.position - 1]

    def fetchmany(self, size: int | None = None) -> list:
        rows, start = self._result(), self.position
        if size is None or (not size and hasattr(self._real, "pgresult")):
            size = self._real.arraysize
        self.position = min(len(rows), start + size)
        return rows[start:self.position]

    def fetchall(self) -> list:
        rows, start = self._result(), self.position
        self.position = len(rows)
        return rows[start:]

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> Any:
        row = self.fetchone()
        if row is None:
            raise StopIteration
        return row

    def scroll(self, value: int, mode: str = "relative") -> None:
        place = value + (self.position if mode == "relative" else 0)
        if mode not in ("relative", "absolute") or not 0 <= place < len(self._result()):
            self._real.scroll(-1, "absolute")  # raises the driver's error
        self.position = place

    @property
    def rownumber(self) -> int:
        return self.position

    def close(self) -> None:
        self.rows = None
        self._real.close()

    def _result(self) -> list:
        if self.rows is None:
            self.rows, self.position = self._real.fetchall(), 0  # or raises the driver's error
        return self.rows

    def _perform(self, method: str, query: Any, arguments: tuple, options: dict) -> Cursor:
        self.rows = self._rowcount = None
        for name in ("params", "params_seq", "vars", "vars_list"):
            if name in options:
                arguments = (options.pop(name), *arguments)
        if method == "executemany" and arguments and not isinstance(arguments[0], (list, tuple)):
            arguments = (list(arguments[0]), *arguments[1:])  # guard: an iterator gives its items once
        text = query
        if hasattr(query, "as_string"):
            text = query = query.as_string(self._real)
        elif isinstance(query, (bytes, bytearray)):
            with contextlib.suppress(UnicodeDecodeError):
                text = query.decode()
        judged = self.connection.judge(
            text if isinstance(text, str) else "", bool(arguments) and arguments[0] is not None
        )
        step = Step(method, query, arguments, options, judged, self.make)
        self.connection.perform(self, step)
        return self


def _passed_on(name: str) -> property:
    """Return a property for an attribute of the driver's cursor; assigned values are also set on later cursors."""

    def put(cursor: Cursor, value: Any) -> None:
        setattr(cursor._real, name, value)
        cursor.attributes[name] = value

    return property(lambda cursor: getattr(cursor._real, name), put)


for _name in ("arraysize", "format", "itersize", "row_factory", "scrollable", "tzinfo_factory", "withhold"):
    setattr(Cursor, _name, _passed_on(_name))


class _Gone:
    """Takes the place of a connection that belongs to the parent process."""

    closed = True
    autocommit = False
    isolation_level = None

    def __init__(self, dbapi: Any) -> None:
        self._dbapi = dbapi

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise self._dbapi.InterfaceError("hpc_db: this connection belongs to the process that forked this one")


def _disown_all() -> None:
    for each in list(_connections):
        connection = each()
        if connection:
            connection.disown()


os.register_at_fork(after_in_child=_disown_all)  # guard: fork


def reads_committed(real: Any, default: bool) -> bool:
    """Return whether transactions of this driver connection are READ COMMITTED; ``default`` is that of the server."""
    level = real.isolation_level
    if level is None:
        return default
    if hasattr(real, "pgconn"):
        return level.name in ("READ_COMMITTED", "READ_UNCOMMITTED")
    return level in (0, 1, 4)  # psycopg2's AUTOCOMMIT, READ_COMMITTED, READ_UNCOMMITTED


def ask(real: Any, statement: str, in_transaction: bool = False) -> Any:
    """Run an internal statement and return its first row; unless ``in_transaction``, no transaction is left open."""
    rows = ask_all(real, statement, None, in_transaction)
    return rows[0] if rows else None


def ask_all(real: Any, statement: str, parameters: tuple | None, in_transaction: bool = False) -> list:
    """Run an internal statement and return its rows; see ``ask``."""
    toggle = not in_transaction and not real.autocommit
    try:
        if toggle:
            real.autocommit = True
        with contextlib.closing(_plain_cursor(real)) as cursor:
            if parameters is None:
                cursor.execute(statement)
            else:
                cursor.execute(statement, parameters)
            return cursor.fetchall()
    finally:
        if toggle and not real.closed:
            try:
                real.autocommit = False
            except Exception:  # interrupted during the statement
                real.close()


def _plain_cursor(real: Any) -> Any:
    """Return a cursor whose rows are tuples, regardless of the application's settings."""
    if hasattr(real, "pgconn"):
        from psycopg.rows import tuple_row  # type: ignore[import-not-found,unused-ignore]

        return real.cursor(row_factory=tuple_row)
    from psycopg2.extensions import cursor

    return real.cursor(cursor_factory=cursor)


def close(real: Any) -> None:
    """Close a connection, if there is one and it is open."""
    if real is not None and not real.closed:
        real.close()


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, if it came from the server."""
    return getattr(error, "pgcode", None) or getattr(error, "sqlstate", None)


def _run(cursor: Any, step: Step, text: Any) -> list | None:
    """Run a statement and return its rows; a digest of the result becomes the step's outcome."""
    judged = step.judged
    if step.method == "executemany" and step.kept and not judged.adds and not judged.returns and step.parameters[0]:
        _run_each(cursor, step)
        step.done = True
        return None
    getattr(cursor, step.method)(text, *step.parameters, **step.options)
    rows = cursor.fetchall() if cursor.description is not None else None
    if step.kept:
        step.outcome = digest(cursor.description, (cursor.statusmessage, cursor.rowcount), rows)
        if rows and isinstance(rows[0], (tuple, list)):
            if judged.sequence and step.key is None:
                step.key = int(rows[0][0])
            elif judged.insert and step.rows is None:
                step.rows = rows
    step.done = True
    return rows


def _run_each(cursor: Any, step: Step) -> None:
    """Send the statement once per set of parameters, as psycopg2 does, to know the result of each."""
    said = []
    count = 0
    for parameters in step.parameters[0]:
        cursor.execute(step.text, parameters)
        said.append(cursor.statusmessage)
        count += max(cursor.rowcount, 0)
    step.rowcount = count
    step.outcome = digest(None, said, None)  # guard: each set of parameters


def _run_again(real: Any, step: Step, link: Link, journal: Journal) -> None:
    """Repeat a statement; raise Differs if its result differs. A statement that only got a key is not repeated."""
    journal.check_order(step, partial(catalog.follow, _asking(real)))
    if step.key is not None:
        return  # the key is ours: no other session gets it
    before = step.outcome
    text = step.text
    if step.given and step.judged.insert:
        text = with_values(text if isinstance(text, str) else text.decode(), step.judged.insert, step.given)
    cursor = step.make_cursor(real)
    try:
        _run(cursor, step, text)
    except link.dbapi.Error as error:
        if link.is_lost(real, error):
            raise
        step.outcome = _failure(error)
    finally:
        after, step.outcome = step.outcome, before
    if after != before:  # guard: results
        raise Differs(f"another result than before ({str(step.text)[:60]!r})")


def _ask_for_keys(
    real: Any, journal: Journal, crashed: bool
) -> dict[int, list[tuple[catalog.Sequence, str, set[str]]]]:
    """Find the values to pass to repeated INSERTs, and advance the sequences beyond our keys.

    ``crashed`` says that the server has crashed, which may have set sequences back. Return for each step the sequences
    of its keys, with their names in the journal and the tables that use the keys.
    """
    asking = _asking(real)
    names: dict[int, list[str]] = {}
    tables: dict[str, set[str]] = {}
    for step in journal.steps:
        if step.key is not None:
            if crashed:  # guard: keys that a crash gives twice
                raise Differs("the server has crashed, and may have given its key to another session")
            names[id(step)] = [step.judged.sequence]
            journal.keys.setdefault(step.judged.sequence, set()).add(step.key)
        elif step.judged.insert and step.rows:
            names[id(step)] = _find_given(step, journal, asking, crashed)
            for name in names[id(step)]:
                tables.setdefault(name, set()).add(step.judged.insert.table)
    sequences: dict[str, catalog.Sequence] = {}
    for name in {each for some in names.values() for each in some}:
        sequence = catalog.sequence(asking, name)
        if sequence is None:
            raise Differs(f"the sequence {name} is gone")
        sequences[name] = sequence
        tables.setdefault(name, set((sequence.tables or "").split("/")))  # "" stands for any table
        _is_late(asking, sequence, journal.keys[name])
    return {step: [(sequences[name], name, tables[name]) for name in some] for step, some in names.items()}


def _note_late(real: Any, journal: Journal, users: Iterable[tuple[catalog.Sequence, str, set[str]]]) -> None:
    """Record tables for which other sessions got keys after ours.

    To be called right before a row is inserted again: only then does the transaction hold its locks again.
    """
    asking = _asking(real)
    for sequence, name, tables in users:
        # guard: order of keys, when the locks are held
        if not tables <= journal.late and _is_late(asking, sequence, journal.keys[name]):
            journal.late |= tables


def _asking(real: Any) -> Callable[[str, tuple], list]:
    return lambda statement, parameters: ask_all(real, statement, parameters, in_transaction=True)


def _find_given(step: Step, journal: Journal, asking: Callable[[str, tuple], list], crashed: bool) -> list[str]:
    """Record the values to pass to a repeated INSERT; return the sequences of its keys."""
    insert, rows = step.judged.insert, step.rows
    if not insert or not rows or not isinstance(step.text, (str, bytes)):
        return []
    if insert.rows and len(insert.rows) != len(rows):
        return []
    settable = catalog.settable_columns(asking, insert.relation)
    text = step.text if isinstance(step.text, str) else step.text.decode()
    names = []
    for place, column in enumerate(insert.returning):
        known = settable.get(column)
        if not known or column in insert.conflict or "constraint" in insert.conflict:
            continue
        sequence: str | None = known.sequence
        values, fills = [row[place] for row in rows], known.fills
        if column in insert.columns:
            said = {text[slice(*row[insert.columns[column]])] for row in insert.rows}
            if said != {"DEFAULT"}:
                sequence, fills = sequence_asked(said), True
        if sequence and (not all(type(value) is int for value in values) or (crashed and not known.unique)):
            continue
        if fills and sequence is not None:  # guard: keys that something else gives
            step.given[column] = known.kind, values
            if sequence:
                journal.keys.setdefault(sequence, set()).update(values)
                names.append(sequence)
    return names


def _is_late(asking: Callable[[str, tuple], list], sequence: catalog.Sequence, keys: set[int]) -> bool:
    """Advance a sequence beyond our keys; return whether other sessions got keys after our first one."""
    if sequence.cycles:  # guard: sequences that begin again
        raise Differs(f"{sequence.name} begins again")
    first, last = (min(keys), max(keys)) if sequence.step > 0 else (max(keys), min(keys))
    for _turn in range(MOST_KEYS):
        given = asking("SELECT nextval(%s::regclass)", (sequence.name,))[0][0]
        between = (given - first) // sequence.step
        if between >= 0:
            keys.add(given)
        if (given - last) // sequence.step >= 0:
            return between >= len(keys) or sequence.caches
    raise Differs(f"{sequence.name} is not where it was")


def _failure(error: BaseException) -> bytes:
    return b"error " + str(sqlstate(error)).encode()
