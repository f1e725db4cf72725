# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Special behaviour of psycopg2 and psycopg, and keys that servers change: the plugin breaks neither."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from cutting_proxy import ANSWER_LOST, KILLED, REQUEST_LOST, Proxy
from real_server import DRIVER_ERRORS, IS_OLD, Ask, Make, Server
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

PSYCOPG2 = pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)


def dbapi_of(raw: Any) -> Any:
    return raw.connection if IS_OLD else raw.dbapi_connection


def open_serializable(driver: str, port: int) -> Any:
    where = f"host=127.0.0.1 port={port} user=study dbname=study sslmode=disable gssencmode=disable"
    if driver == "psycopg2":
        import psycopg2

        connection = psycopg2.connect(where)
        connection.set_session(isolation_level="SERIALIZABLE")
    else:
        import psycopg  # type: ignore[import-not-found,unused-ignore]

        connection = psycopg.connect(where)
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
    return connection


@PSYCOPG2
def test_isolation_level_that_is_set_ends_the_transaction_as_the_driver_does(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, rows: Callable[[], list]
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("INSERT INTO t VALUES (10, 'rolled back')")
    dbapi_of(raw).set_isolation_level(1)
    cursor.execute("UPDATE t SET word = word || '!' WHERE n = 1")
    proxy.cut_at(b"COMMIT", ANSWER_LOST)
    raw.commit()
    raw.close()
    assert rows() == [(1, "one!"), (2, "two")]


def test_isolation_level_of_a_creator_is_kept(
    driver: str, make: Make, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy, rows: Callable[[], list]
) -> None:
    engine = make(creator=lambda: open_serializable(driver, proxy.port))
    with pytest.raises(OperationalError), engine.begin() as connection:
        word = connection.execute(text("SELECT word FROM t WHERE n = 1")).scalar()
        database("UPDATE t SET word = 'other' WHERE n = 1")
        proxy.cut_at(b"UPDATE", REQUEST_LOST)
        connection.execute(text("UPDATE t SET word = :word WHERE n = 1"), {"word": f"{word} more"})
    assert rows() == [(1, "other"), (2, "two")]


def test_attributes_are_set_again_in_their_order(
    driver: str, engine: sqlalchemy.engine.Engine, cut: Callable, rows: Callable[[], list]
) -> None:
    raw = engine.raw_connection()
    connection = dbapi_of(raw)
    connection.autocommit = True
    if driver == "psycopg2":
        connection.set_isolation_level(0)
    connection.autocommit = False
    cut()
    connection.cursor().execute("INSERT INTO t VALUES (5)")
    connection.rollback()
    assert rows() == [(1, "one"), (2, "two")]


def test_insert_is_not_told_what_a_trigger_has_made(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    schema("""
        CREATE TABLE made (id int PRIMARY KEY, word text DEFAULT 'abc', raw text);
        CREATE FUNCTION make() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.raw := NEW.word; NEW.word := upper(NEW.word); RETURN NEW; END';
        CREATE TRIGGER make BEFORE INSERT ON made FOR EACH ROW EXECUTE FUNCTION make();
    """)
    for statement in ("(id) VALUES (1)", "(id, word) VALUES (2, 'abc')"):
        with contextlib.suppress(OperationalError), engine.begin() as connection:
            connection.execute(text(f"INSERT INTO f.made {statement} RETURNING id, word"))
            proxy.cut_at(b"COMMIT", REQUEST_LOST)
    assert set(database("SELECT word, raw FROM f.made")) == {("ABC", "abc")}


def test_upsert_is_given_what_the_program_gave(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    schema("CREATE TABLE stock (item text PRIMARY KEY, last int, total int); INSERT INTO stock VALUES ('a', 5, 100)")
    with engine.begin() as connection:
        connection.execute(text(
            "INSERT INTO f.stock AS s (item, last, total) VALUES ('a', 1, 0) ON CONFLICT (item)"
            " DO UPDATE SET total = s.total + excluded.last RETURNING item, last"
        ))
        proxy.cut_at(b"COMMIT", REQUEST_LOST)
    assert database("SELECT total FROM f.stock") == [(101,)]


@PSYCOPG2
def test_infinite_date_is_no_date_of_the_last_year(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    schema("CREATE TABLE valid (id serial PRIMARY KEY, until date DEFAULT 'infinity')")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO f.valid DEFAULT VALUES RETURNING id, until"))
        proxy.cut_at(b"COMMIT", REQUEST_LOST)
    assert database("SELECT until::text FROM f.valid") == [("infinity",)]


def test_text_that_a_sequence_counts_is_no_key(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    schema("CREATE SEQUENCE s; CREATE TABLE bills (id int, no text DEFAULT 'R' || nextval('f.s'))")
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("INSERT INTO f.bills VALUES (1) RETURNING no"))
        proxy.cut_at(b"COMMIT", REQUEST_LOST)
    assert database("SELECT * FROM f.bills") == []


@pytest.mark.parametrize("crash", [True, False])
def test_key_that_a_crash_may_have_given_twice_is_not_kept(
    crash: bool, url: str, proxy: Proxy, server: Server, make: Make, engine: sqlalchemy.engine.Engine, database: Ask,
    schema: Callable,
) -> None:
    schema("CREATE SEQUENCE s; CREATE TABLE tickets (n int, who text)")
    server.ask("CHECKPOINT")
    others = make(url=url.replace(f":{proxy.port}/", f":{server.port}/"))

    def take(connection: sqlalchemy.engine.Connection, who: str) -> None:
        key = connection.execute(text("SELECT nextval('f.s')")).scalar()
        if who == "ours":
            proxy.cut_at(b"hpc_db", *((KILLED, take_another) if crash else (REQUEST_LOST,)))
        connection.execute(text("INSERT INTO f.tickets VALUES (:key, :who)"), {"key": key, "who": who})

    def take_another() -> None:
        with others.begin() as connection:
            take(connection, "other")

    with pytest.raises(OperationalError) if crash else contextlib.nullcontext(), engine.begin() as connection:
        take(connection, "ours")
    found = [key for (key,) in database("SELECT n FROM f.tickets")]
    assert found == [1]


def test_rows_that_are_mappings_are_compared_whole(
    driver: str, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    schema("CREATE TABLE b (id int PRIMARY KEY, data bytea, n int); INSERT INTO b VALUES (1, '\\x00', 10)")
    if driver == "psycopg2":
        from psycopg2.extras import RealDictCursor

        cursor = engine.raw_connection().cursor(cursor_factory=RealDictCursor)
    else:
        from psycopg.rows import dict_row  # type: ignore[import-not-found,unused-ignore]

        cursor = engine.raw_connection().cursor()
        cursor.row_factory = dict_row
    cursor.execute("SELECT id, data, n FROM f.b WHERE id = 1 FOR UPDATE")
    n = cursor.fetchone()["n"]
    proxy.cut_at(b"UPDATE f.b", REQUEST_LOST, lambda: database("UPDATE f.b SET n = n + 100"))
    with pytest.raises(DRIVER_ERRORS):
        cursor.execute("UPDATE f.b SET n = %s WHERE id = 1", (n + 1,))
    assert database("SELECT n FROM f.b") == [(110,)]


class Vague(int):
    """Like a long array of numpy, its repr does not show its whole value."""

    def __repr__(self) -> str:
        return "vague"


@PSYCOPG2
def test_values_that_do_not_show_what_they_are_are_compared(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, proxy: Proxy
) -> None:
    from psycopg2 import extensions

    schema("CREATE TABLE b (n bigint); INSERT INTO b VALUES (10)")
    extensions.register_type(extensions.new_type((20,), "VAGUE", lambda value, _cursor: Vague(value)))
    try:
        with pytest.raises(OperationalError), engine.begin() as connection:
            n = connection.execute(text("SELECT n FROM f.b FOR UPDATE")).scalar()
            proxy.cut_at(b"UPDATE f.b", REQUEST_LOST, lambda: database("UPDATE f.b SET n = n + 100"))
            connection.execute(text("UPDATE f.b SET n = :n"), {"n": int(n) + 1})
    finally:
        extensions.register_type(extensions.LONGINTEGER)
    assert database("SELECT n FROM f.b") == [(110,)]


def test_closed_connection_stays_closed(engine: sqlalchemy.engine.Engine, rows: Callable[[], list]) -> None:
    raw = engine.raw_connection()
    connection = dbapi_of(raw)
    connection.cursor().execute("INSERT INTO t VALUES (5)")
    connection.close()
    with pytest.raises(DRIVER_ERRORS, match="closed"):
        connection.commit()
    with pytest.raises(DRIVER_ERRORS, match="closed"):
        connection.cursor().execute("INSERT INTO t VALUES (6)")
    raw.invalidate()
    assert rows() == [(1, "one"), (2, "two")]


def test_transaction_that_the_pool_does_not_end_goes_on(
    make: Make, engine: sqlalchemy.engine.Engine, rows: Callable[[], list]
) -> None:
    engine = make(pool_reset_on_return=None)
    raw = engine.raw_connection()
    raw.cursor().execute("LISTEN x")
    raw.cursor().execute("INSERT INTO t VALUES (5)")
    raw.close()
    raw = engine.raw_connection()
    raw.commit()
    raw.close()
    assert rows() == [(1, "one"), (2, "two"), (5, None)]


def test_transaction_of_a_creator_is_committed(
    driver: str, make: Make, engine: sqlalchemy.engine.Engine, server: Server
) -> None:
    def create() -> object:
        connection = open_serializable(driver, server.port)
        connection.cursor().execute("SET search_path = f, public")
        return connection

    with make(creator=create).connect() as connection:
        assert connection.execute(text("SHOW search_path")).scalar() == "f, public"


def test_error_that_a_function_raises_is_no_lost_connection(
    engine: sqlalchemy.engine.Engine, schema: Callable, rows: Callable[[], list]
) -> None:
    schema("CREATE FUNCTION fail() RETURNS int LANGUAGE plpgsql AS"
           " 'BEGIN RAISE ''no'' USING ERRCODE = ''08001''; END'")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (5)"))
        with pytest.raises(OperationalError, match="no"), connection.begin_nested():
            connection.execute(text("SELECT f.fail()"))
    assert rows() == [(1, "one"), (2, "two"), (5, None)]


def test_second_cut_while_names_are_looked_up(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, cut: Callable
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("SELECT n FROM t")
    raw.rollback()
    cut()
    proxy.cut_at(b"RECURSIVE named", REQUEST_LOST)
    cursor.execute("SELECT 2")
    assert cursor.fetchone() == (2,)
    raw.close()


def test_nowhere_to_complain_is_no_reason_to_end(
    engine: sqlalchemy.engine.Engine, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, rows: Callable[[], list]
) -> None:
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (5)"))
        monkeypatch.setattr(sys, "stderr", full)
        proxy.cut_at(b"(6)", REQUEST_LOST, lambda: proxy.cut_at(b"(5)", REQUEST_LOST))
        connection.execute(text("INSERT INTO t VALUES (6)"))
    monkeypatch.undo()
    assert rows() == [(1, "one"), (2, "two"), (5, None), (6, None)]


def test_cursor_is_the_driver_s(
    driver: str, url: str, proxy: Proxy, server: Server, make: Make, engine: sqlalchemy.engine.Engine
) -> None:
    raw = make(url=url.replace(f":{proxy.port}/", f":{server.port}/")).raw_connection()  # proxy lacks pipelines
    cursor = raw.cursor()
    cursor.execute("SELECT n FROM t ORDER BY n")
    assert not hasattr(cursor, "no_such_attribute")
    assert hasattr(cursor, "copy" if driver == "psycopg" else "copy_expert")
    assert next(cursor) == (1,)
    cursor.scroll(-1)
    assert cursor.fetchmany(5) == [(1,), (2,)]
    cursor.scroll(1, "absolute")
    assert list(cursor) == [(2,)]
    with pytest.raises((*DRIVER_ERRORS, IndexError), match="out of bound"):
        cursor.scroll(5)
    cursor.execute("SELECT n FROM t WHERE n = %(n)s", defaultdict(lambda: 2))
    assert cursor.fetchall() == [(2,)]
    raw.rollback()
    if driver == "psycopg2":
        cursor.callproc("generate_series", (1, 3))
    else:
        cursor.executemany("SELECT %s::int", [(1,), (2,)], returning=True)
        assert cursor.fetchall() == [(1,)]
        assert cursor.nextset()
    assert cursor.fetchone() == ((1,) if driver == "psycopg2" else (2,))
    assert cursor.fetchone() == ((2,) if driver == "psycopg2" else None)
    raw.close()
