# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guarantees of the plugin on one connection, with a real server: when it repeats a transaction or raises the error."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
from cutting_proxy import ANSWER_LOST, CRASHES, REQUEST_LOST, WAYS, Proxy
from hpc_db_client import patience
from hpc_db_client.connection import Link
from real_server import Server, eventually
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

Ask = Callable[[str], list]


@pytest.mark.parametrize("way", WAYS + CRASHES)
def test_commit_that_was_cut_is_done_once(
    way: str, engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    with engine.connect() as connection:
        connection.execute(text("UPDATE t SET word = word || word WHERE n = 1"))
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        proxy.cut_at(b"COMMIT", way)
        connection.commit()

    assert rows() == [(1, "oneone"), (2, "two"), (3, "three")]


def test_transaction_after_one_that_was_ended_in_words_is_not_taken_for_it(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    with engine.connect() as connection:
        connection.execute(text("UPDATE t SET word = 'mine' WHERE n = 1"))
        connection.connection.cursor().execute("COMMIT AND CHAIN")
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        proxy.cut_at(b"COMMIT", REQUEST_LOST)
        with pytest.raises(OperationalError):
            connection.commit()

    assert rows() == [(1, "mine"), (2, "two")]


def test_transaction_that_would_read_something_else_is_not_repeated(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list], database: Ask,
    capfd: pytest.CaptureFixture,
) -> None:
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        assert connection.execute(text("SELECT word FROM t WHERE n = 1")).scalar() == "one"
        database("UPDATE t SET word = 'another' WHERE n = 1")
        proxy.cut_at(b"UPDATE", REQUEST_LOST)
        with pytest.raises(OperationalError):
            connection.execute(text("UPDATE t SET word = 'mine' WHERE n = 1"))

    told = capfd.readouterr().err
    assert "the connection was lost in a transaction that cannot be repeated: another result than before" in told
    assert told.endswith("; raising the error\n")
    assert rows() == [(1, "another"), (2, "two")]
    with engine.connect() as connection:  # and the next one works as usual
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 2


def test_transaction_that_has_only_read_sees_what_others_have_written_as_ever(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list], database: Ask
) -> None:
    with engine.begin() as connection:
        assert connection.execute(text("SELECT word FROM t WHERE n = 1")).scalar() == "one"
        database("UPDATE t SET word = 'another' WHERE n = 1")
        proxy.cut_at(b"n = 2", REQUEST_LOST)
        assert connection.execute(text("SELECT word FROM t WHERE n = 2")).scalar() == "two"
        proxy.cut_at(b"UPDATE", ANSWER_LOST)
        connection.execute(text("UPDATE t SET word = word || '!' WHERE n = 1"))

    assert rows() == [(1, "another!"), (2, "two")]


def test_repeatable_read_is_repeated_or_an_error(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, database: Ask
) -> None:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert connection.execute(text("SELECT word FROM t WHERE n = 1")).scalar() == "one"
        database("UPDATE t SET word = 'another' WHERE n = 1")
        proxy.cut_at(b"n = 2", REQUEST_LOST)
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT word FROM t WHERE n = 2"))


@pytest.mark.parametrize("cut_at, is_known", [("INSERT", False), ("count", True)])
def test_keys_that_count_are_not_kept_when_others_were_given_some(
    cut_at: str, is_known: bool, engine: sqlalchemy.engine.Engine, proxy: Proxy, database: Ask, rows: Callable[[], list]
) -> None:
    database("DROP TABLE IF EXISTS numbered")
    database("CREATE TABLE numbered (id serial PRIMARY KEY, n int); ALTER TABLE numbered OWNER TO study")
    numbered = sqlalchemy.Table(
        "numbered", sqlalchemy.MetaData(),
        sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True), sqlalchemy.Column("n", sqlalchemy.Integer),
    )
    count = text("SELECT count(*) FROM numbered WHERE id < :key")

    def number(connection: sqlalchemy.engine.Connection) -> None:
        """Number the rows as Optuna numbers its trials."""
        connection.execute(text("SELECT 1 FROM t WHERE n = 1 FOR UPDATE"))
        (key,) = connection.execute(numbered.insert()).inserted_primary_key
        connection.execute(text("UPDATE numbered SET n = :n WHERE id = :key"), {
            "n": connection.execute(count, {"key": key}).scalar(), "key": key,
        })

    def other() -> None:
        with other_engine.begin() as connection:
            number(connection)

    other_engine = sqlalchemy.create_engine(engine.url)
    proxy.cut_at(cut_at.encode(), REQUEST_LOST, other)
    with pytest.raises(OperationalError) if is_known else contextlib.nullcontext(), engine.begin() as connection:
        number(connection)
    other()
    other_engine.dispose()

    assert [n for (n,) in database("SELECT n FROM numbered ORDER BY id")] == ([0, 1] if is_known else [0, 1, 2])


def test_error_within_a_transaction_is_the_same_when_it_is_repeated(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        with pytest.raises(IntegrityError), connection.begin_nested():
            connection.execute(text("INSERT INTO t VALUES (1, 'again')"))
        proxy.cut_at(b"(4,", ANSWER_LOST)
        connection.execute(text("INSERT INTO t VALUES (4, 'four')"))

    assert rows() == [(1, "one"), (2, "two"), (3, "three"), (4, "four")]


@pytest.mark.parametrize("statement", [
    "SELECT pg_advisory_lock(7)", "CREATE TEMP TABLE mine (n int)", "SET search_path = public",
])
def test_what_the_session_held_is_not_forgotten_silently(
    statement: str, engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list],
    capfd: pytest.CaptureFixture,
) -> None:
    with engine.connect() as connection:
        connection.execute(text(statement))
        connection.commit()
        proxy.cut_at(b"INSERT", REQUEST_LOST)
        with pytest.raises(DBAPIError):
            connection.execute(text("INSERT INTO t VALUES (3, 'three')"))

    assert statement in capfd.readouterr().err
    assert len(rows()) == 2


def test_without_a_transaction_nobody_can_tell_and_the_error_goes_up(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    for statement in ("INSERT INTO t VALUES (3, 'three')", "UPDATE t SET word = word || '!' WHERE n = 3"):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SELECT 1"))
            proxy.cut_at(statement.encode(), ANSWER_LOST)
            with pytest.raises(OperationalError):
                connection.execute(text(statement))

    assert rows()[2:] == [(3, "three!")]


def test_server_that_cannot_make_sure_is_not_believed(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list], database: Ask,
    capfd: pytest.CaptureFixture,
) -> None:
    function = "FUNCTION pg_logical_emit_message(boolean, text, text, boolean)"
    database(f"REVOKE EXECUTE ON {function} FROM PUBLIC")  # as before PostgreSQL 17, which lacks this function
    engine.dispose()
    try:
        for number, way in enumerate((REQUEST_LOST, ANSWER_LOST)):
            with engine.connect() as connection:
                connection.execute(text(f"INSERT INTO t VALUES ({10 + number}, 'ten')"))
                proxy.cut_at(b"COMMIT", way)
                if way == REQUEST_LOST:
                    connection.commit()
                else:
                    with pytest.raises(OperationalError):
                        connection.commit()
    finally:
        database(f"GRANT EXECUTE ON {function} TO PUBLIC")

    assert "the server cannot tell whether the transaction was committed" in capfd.readouterr().err
    assert len(rows()) == 4


@pytest.mark.parametrize("way", [REQUEST_LOST, ANSWER_LOST])
def test_server_that_does_not_say_which_one_it_is_is_not_asked(
    way: str, engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list], database: Ask,
    server: Server, capfd: pytest.CaptureFixture,
) -> None:
    database("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    other = sqlalchemy.create_engine(engine.url.set(query={**engine.url.query, "plugin": "hpc_db"}), future=True)
    try:
        with other.connect() as connection:
            connection.execute(text("INSERT INTO t VALUES (10, 'ten')"))
            proxy.cut_at(b"COMMIT", way)
            with pytest.raises(OperationalError):
                connection.commit()
    finally:
        other.dispose()
        database("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")

    assert "the server cannot tell whether the transaction was committed" in capfd.readouterr().err
    assert len(rows()) == (2 if way == REQUEST_LOST else 3)


def test_application_can_ask_for_what_it_inserted(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    table = sqlalchemy.Table("t", sqlalchemy.MetaData(), autoload_with=engine)
    with engine.begin() as connection:
        proxy.cut_at(b"INSERT", ANSWER_LOST)
        answer = connection.execute(table.insert().values(n=3, word="three").returning(table.c.word))
        assert answer.all() == [("three",)]

    assert len(rows()) == 3


@pytest.mark.parametrize("options, at_rest", [({}, 1), ({"pool_size": 3}, 3), ({"max_overflow": 0}, 5)])
def test_one_connection_is_kept_unless_the_application_says_how_many(
    options: dict[str, int], at_rest: int, url: str
) -> None:
    engine = sqlalchemy.create_engine(url, **options)
    for _turn in range(2):
        used = [engine.connect() for _connection in range(5)]
        for connection in used:
            connection.close()
        assert engine.pool.checkedin() == at_rest
        engine.dispose()


def test_connection_at_rest_is_alive_after_a_restart(
    engine: sqlalchemy.engine.Engine, server: Server, capfd: pytest.CaptureFixture
) -> None:
    server.stop()
    server.start()

    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("SELECT word FROM t WHERE n = 2")
    assert cursor.fetchone() == ("two",)
    raw.close()


def test_stopped_server_is_waited_for_within_a_transaction_and_told_once(
    engine: sqlalchemy.engine.Engine, server: Server, rows: Callable[[], list], capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Reading capfd now would lose output written while it is being emptied.
    is_told, tell = threading.Event(), patience.tell

    def tell_and_note(line: str) -> None:
        tell(line)
        is_told.set()

    def start_when_told() -> None:
        assert is_told.wait(30)
        server.start()

    monkeypatch.setattr(patience, "tell", tell_and_note)
    starter = threading.Thread(target=start_when_told)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        server.stop("immediate")
        starter.start()
        connection.execute(text("INSERT INTO t VALUES (4, 'four')"))
        starter.join()

    assert len(rows()) == 4
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("hpc_db: waiting up to 60 s for the database server (host 127.0.0.1): ")


def test_server_that_stays_away_is_an_error_that_says_so(
    url: str, server: Server, capfd: pytest.CaptureFixture
) -> None:
    engine = sqlalchemy.create_engine(url.replace("hpc_db_patience=60", "hpc_db_patience=0.5"))
    with engine.connect() as connection:
        server.stop()
        began = time.monotonic()
        with pytest.raises(OperationalError) as told:
            connection.execute(text("SELECT 1"))
        waited = time.monotonic() - began
        server.start()

    assert "the database server (host 127.0.0.1) did not come back within 0.5 s (hpc_db_patience): " in str(told.value)
    assert waited >= 0.5
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("change, says", [
    (("/study?", "/elsewhere?"), 'database "elsewhere" does not exist'),
    (("study@", "stranger@"), 'role "stranger" does not exist'),
])
def test_what_waiting_does_not_mend_is_told_at_once(change: tuple[str, str], says: str, url: str) -> None:
    with pytest.raises(OperationalError, match=says):
        sqlalchemy.create_engine(url.replace(*change)).connect()


def test_worker_needs_one_connection_and_no_other(
    engine: sqlalchemy.engine.Engine, url: str, server: Server, database: Ask
) -> None:
    engine.dispose()
    optuna.storages.RDBStorage(url).engine.dispose()
    used = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'study'"
    eventually(lambda: database(used) == [(0,)])
    server.ask("ALTER ROLE study CONNECTION LIMIT 1")
    try:
        study = optuna.create_study(storage=url)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    finally:
        server.ask("ALTER ROLE study CONNECTION LIMIT -1")

    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert database(used) == [(1,)]


def test_workers_take_turns_where_there_is_room_for_a_third_of_them(
    engine: sqlalchemy.engine.Engine, url: str, server: Server, database: Ask
) -> None:
    name = f"turns {url}"
    optuna.create_study(storage=url, study_name=name)

    def work() -> None:
        storage = optuna.storages.RDBStorage(url)
        study = optuna.load_study(storage=storage, study_name=name)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        storage.engine.dispose()

    workers = [threading.Thread(target=work) for _number in range(9)]
    server.ask("ALTER ROLE study CONNECTION LIMIT 5")  # two are this test's own
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    finally:
        server.ask("ALTER ROLE study CONNECTION LIMIT -1")

    assert database(f"SELECT state::text, count(*) FROM trials JOIN studies USING (study_id) "
                    f"WHERE study_name = '{name}' GROUP BY 1") == [("COMPLETE", 18)]


def test_sessions_are_in_utc_whatever_the_environment_says(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")

    with sqlalchemy.create_engine(url).connect() as connection:
        assert connection.execute(text("SHOW timezone")).scalar() == "UTC"


@pytest.mark.parametrize("kind, is_closed, lost", [
    ("DatabaseError", False, True),  # psycopg2 on a unix socket, if the server is killed
    ("OperationalError", False, True),
    ("ProgrammingError", True, True),
    ("ProgrammingError", False, False),  # an empty query
    ("InterfaceError", False, False),
    ("DataError", False, False),
])
def test_error_without_a_sqlstate_is_libpq_s_own(kind, is_closed, lost):
    driver = pytest.importorskip("psycopg2")
    link = Link(lambda: None, lambda _real: None, SimpleNamespace(dbapi=driver, patience=None, connections=None))
    error = getattr(driver, kind)("server closed the connection unexpectedly")

    assert link.is_lost(SimpleNamespace(closed=is_closed), error) is lost
