# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs other than Optuna: nothing is lost or doubled without an error, and there is no error without a cut."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy
from cutting_proxy import ANSWER_LOST, REQUEST_LOST, Proxy
from real_server import DRIVER_ERRORS, IS_OLD, Ask, Make, Pooler, Server, eventually
from sqlalchemy import event, orm, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool


@pytest.mark.parametrize("statement", [
    "SELECT note()", "SELECT note/**/()", 'SELECT "note"()', "SELECT 0 AS \"it's\", note(), 'x'",
    "SELECT $$it's$$, note(), 'x'", "SELECT /* worker's */ note() /* don't */", "SELECT n FROM noted",
    "SELECT t.noting FROM t WHERE n = 1", "INSERT INTO watched VALUES (1)", "INSERT INTO filled (n) VALUES (1)",
    "INSERT INTO checked VALUES (1)", "SELECT lower(word) FROM t", "SELECT n # n FROM t",
])
def test_effects_of_the_server_s_functions_are_not_lost_silently(
    statement: str, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable,
    capfd: pytest.CaptureFixture,
) -> None:
    schema("""
        CREATE TABLE log (n int);
        CREATE FUNCTION note() RETURNS int LANGUAGE sql AS 'INSERT INTO f.log VALUES (1) RETURNING n';
        CREATE FUNCTION note(int) RETURNS int LANGUAGE sql AS 'SELECT f.note()';
        CREATE FUNCTION noting(public.t) RETURNS int LANGUAGE sql AS 'SELECT f.note()';
        CREATE FUNCTION lower(text) RETURNS text LANGUAGE sql AS 'SELECT f.note()::text';
        CREATE FUNCTION minus(int, int) RETURNS int LANGUAGE sql AS 'SELECT f.note()';
        CREATE OPERATOR # (FUNCTION = minus, LEFTARG = int, RIGHTARG = int);
        CREATE VIEW noted AS SELECT f.note() AS n;
        CREATE TABLE watched (n int);
        CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM f.note(); RETURN NEW; END';
        CREATE TRIGGER watch BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION watch();
        CREATE TABLE filled (n int, m int DEFAULT note());
        CREATE TABLE checked (n int CHECK (note(n) > 0));
    """)
    if "lower" not in statement:
        database("DROP FUNCTION f.lower(text)")
    if "#" not in statement:
        database("DROP OPERATOR f.# (int, int)")
    engine = make(connect_args={"options": "-csearch_path=f,public"})
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text(statement))
        cut()
        connection.execute(text("INSERT INTO t VALUES (5)"))

    assert "raising the error" in capfd.readouterr().err
    assert database("SELECT count(*) FROM t") == [(2,)]


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
@pytest.mark.parametrize("statement", [
    "SELECT first(n) FROM t", "SELECT max(n > 0) FROM t", "SELECT n FROM \"a%b\"", "INSERT INTO over VALUES (1)",
    "INSERT INTO listed VALUES ('{1}')", "INSERT INTO composed VALUES ('(1)')", "SELECT CAST('({1})' AS listed)",
    "SELECT CAST('[1,2]' AS spans)", "INSERT INTO defaulting (m) VALUES (1)", "INSERT INTO part VALUES (1)",
    "UPDATE settings SET setting = '5s' WHERE name = 'lock_timeout'", "INSERT INTO setting VALUES (1)",
    "INSERT INTO conditional VALUES (1, 1)", "INSERT INTO executing VALUES (1)",
])
def test_effects_are_looked_for_in_all_that_a_database_has(
    driver: str, statement: str, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask,
    cut: Callable, capfd: pytest.CaptureFixture,
) -> None:
    schema("""
        CREATE TABLE log (n int);
        CREATE FUNCTION note() RETURNS int LANGUAGE sql AS 'INSERT INTO f.log VALUES (1) RETURNING n';
        CREATE FUNCTION note(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN f.note(); END';
        CREATE FUNCTION note(int, int) RETURNS int LANGUAGE sql AS 'SELECT f.note()';
        CREATE FUNCTION note(int, bool) RETURNS int LANGUAGE sql AS 'SELECT f.note()';
        CREATE AGGREGATE first(int) (SFUNC = note, STYPE = int);
        CREATE AGGREGATE max(bool) (SFUNC = note, STYPE = int);
        CREATE VIEW "a%b" AS SELECT f.note() AS n;
        CREATE DOMAIN noting AS int CHECK (note(VALUE) > 0);
        CREATE DOMAIN above AS noting;
        CREATE TABLE over (n above);
        CREATE TABLE listed (n noting[]);
        CREATE TYPE pair AS (n noting);
        CREATE TABLE composed (n pair);
        CREATE TYPE spans AS RANGE (subtype = noting, subtype_opclass = int4_ops);
        CREATE DOMAIN filled AS int DEFAULT note();
        CREATE TABLE defaulting (m int, n filled);
        CREATE TABLE part (n int) PARTITION BY RANGE (note(n));
        CREATE TABLE part1 PARTITION OF part DEFAULT;
        CREATE VIEW settings AS SELECT * FROM pg_settings;
        CREATE FUNCTION set_it() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            UPDATE f.settings SET setting = '5s' WHERE name = 'lock_timeout'; RETURN NEW; END$$;
        CREATE TABLE setting (n int);
        CREATE TRIGGER set_it BEFORE INSERT ON setting FOR EACH ROW EXECUTE FUNCTION set_it();
        CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TABLE conditional (n int, procedure int);
        CREATE TRIGGER function BEFORE INSERT OR UPDATE OF procedure ON conditional FOR EACH ROW
            WHEN (f.note(NEW.n) > 0) EXECUTE FUNCTION nothing();
        CREATE FUNCTION execute_it() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            PERFORM 1 AS declare; EXECUTE 'SELECT f.no' || 'te()'; RETURN NEW; END$$;
        CREATE TABLE executing (n int);
        CREATE TRIGGER execute_it BEFORE INSERT ON executing FOR EACH ROW EXECUTE FUNCTION execute_it();
    """)
    engine = make(connect_args={"options": "-csearch_path=f,public"})
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.exec_driver_sql(statement.replace("%", "%%"), {})
        cut()
        connection.execute(text("INSERT INTO t VALUES (5)"))

    assert "raising the error" in capfd.readouterr().err
    assert database("SELECT count(*) FROM t") == [(2,)]


def test_what_a_database_does_by_itself_is_repeated_where_it_is_known(
    make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("""
        CREATE DOMAIN small AS int CHECK (VALUE < 100);
        CREATE DOMAIN counted AS small DEFAULT 1 + 1;
        CREATE TYPE spans AS RANGE (subtype = int);
        CREATE TABLE log (n counted, of_log small[]) PARTITION BY RANGE (abs(n));
        CREATE TABLE log1 PARTITION OF log DEFAULT;
        CREATE TABLE watched (n int CHECK (n > 0), m timestamptz DEFAULT now());
        CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO f.log (n) VALUES (NEW.n); NEW.m := now(); RETURN NEW; END';
        CREATE TRIGGER watch BEFORE INSERT ON watched FOR EACH ROW WHEN (NEW.n > 1) EXECUTE FUNCTION watch();
        CREATE VIEW seen AS SELECT count(*) AS n FROM watched;
    """)
    engine = make(connect_args={"options": "-csearch_path=f"})
    with engine.begin() as connection:
        connection.execute(text("SELECT n FROM seen"))
        cut()
        connection.execute(text("INSERT INTO watched (n) VALUES (2)"))
        cut()
        assert connection.execute(text("SELECT n FROM seen")).scalar() == 1
    assert database("SELECT n FROM f.log") == [(2,)]


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_effects_of_a_view_that_is_gone_are_not_lost_silently(
    driver: str, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("""
        CREATE TABLE log (n int);
        CREATE FUNCTION note() RETURNS int LANGUAGE sql AS 'INSERT INTO f.log VALUES (1) RETURNING n';
        CREATE VIEW gone AS SELECT note();
    """)
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("SELECT * FROM f.gone"))
        cut()
        database("DROP VIEW f.gone")
        connection.execute(text("INSERT INTO t VALUES (5)"))
    assert database("SELECT count(*) FROM t") == [(2,)]


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_name_that_is_cut_elsewhere_is_not_taken_for_nothing(
    driver: str, make: Make, url: str, engine: sqlalchemy.engine.Engine, server: Server, cut: Callable
) -> None:
    name = "ä" * 40  # 80 bytes in UTF-8, of which PostgreSQL would keep 63
    server.ask("DROP DATABASE IF EXISTS latin WITH (FORCE)")
    server.ask("CREATE DATABASE latin OWNER study ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    engine = make(url=url.replace("/study?", "/latin?"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE log (n int)"))
        connection.execute(text("CREATE FUNCTION note() RETURNS int LANGUAGE sql AS"
                                " 'INSERT INTO log VALUES (1) RETURNING n'"))
        connection.execute(text(f"CREATE VIEW {name} AS SELECT note()"))
    with pytest.raises(OperationalError), make(url=url.replace("/study?", "/latin?")).begin() as connection:
        connection.execute(text(f"SELECT * FROM (VALUES (1)) v(n), {name}"))
        cut()
        connection.execute(text("INSERT INTO log VALUES (2)"))
    assert server.ask("SELECT * FROM log", "latin") == []


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_value_of_the_server_s_is_no_sql(
    driver: str, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("CREATE TABLE told (n int, word text DEFAULT E'\\\\'', 1); COMMIT; DELETE FROM public.t; COMMIT; --')")
    engine = make(connect_args={"options": "-csearch_path=f,public -cstandard_conforming_strings=off"})
    with contextlib.suppress(OperationalError), engine.begin() as connection:
        connection.execute(text("INSERT INTO told (n) VALUES (1) RETURNING word"))
        cut()
        connection.execute(text("INSERT INTO t VALUES (3)"))
    assert database("SELECT n FROM t WHERE n < 3") == [(1,), (2,)]


@pytest.mark.parametrize("statement", [
    "CREATE TABLE pg_temp.t AS SELECT * FROM t", "CREATE TEMP TABLE t (n int)", "SELECT * INTO TEMP t FROM public.t",
])
def test_permanent_table_is_not_taken_for_the_temporary_one(
    statement: str, engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    with engine.connect() as connection:
        connection.execute(text(statement))
        connection.commit()
        cut()
        with pytest.raises(DBAPIError):
            connection.execute(text("DELETE FROM t"))
    assert database("SELECT count(*) FROM t") == [(2,)]


@pytest.mark.parametrize("at", ["INSERT", "COMMIT"])
def test_iterator_of_parameters_is_repeated_whole(
    at: str, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy
) -> None:
    raw = engine.raw_connection()
    proxy.cut_at(at.encode(), REQUEST_LOST)
    cursor = raw.cursor()
    cursor.executemany("INSERT INTO t VALUES (%s, %s)", zip(range(10, 110), ["word"] * 100))
    raw.commit()
    raw.close()
    assert database("SELECT count(*) FROM t WHERE n >= 10") == [(100,)]


def test_each_set_of_parameters_is_compared(
    engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy, capfd: pytest.CaptureFixture
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.executemany("UPDATE t SET word = 'mine' WHERE n = %s AND word <> 'other'", [[1], [2]])
    proxy.cut_at(b"COMMIT", REQUEST_LOST, lambda: database("UPDATE t SET word = 'other' WHERE n = 1"))
    with pytest.raises(DRIVER_ERRORS):
        raw.commit()
    raw.invalidate()
    assert "another result than before" in capfd.readouterr().err
    assert database("SELECT word FROM t ORDER BY n") == [("other",), ("two",)]


def test_executemany_that_returns_rows_is_not_repeated(
    engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.executemany("UPDATE t SET word = 'mine' WHERE n = %s RETURNING word", [[1], [2]])
    cut()
    with pytest.raises(DRIVER_ERRORS):
        raw.commit()
    raw.invalidate()
    assert database("SELECT word FROM t ORDER BY n") == [("one",), ("two",)]


def test_definition_in_a_transaction_is_not_repeated(
    engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (3)"))
        connection.execute(text("CREATE TABLE made (n int)"))
        cut()
        connection.execute(text("INSERT INTO t VALUES (4)"))
    assert database("SELECT count(*), to_regclass('made') IS NULL FROM t") == [(2, True)]
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (5)"))
        cut()
        connection.execute(text("INSERT INTO t VALUES (6)"))
    assert database("SELECT count(*) FROM t") == [(4,)]


def test_executemany_counts_as_the_driver_does(
    url: str, engine: sqlalchemy.engine.Engine, make: Make
) -> None:
    counts = []
    for each in (engine, make(url=url.replace("plugin=hpc_db&hpc_db_patience=60&", ""))):
        raw = each.raw_connection()
        cursor = raw.cursor()
        cursor.executemany("UPDATE t SET word = 'a' WHERE n = %s", [[1], [2], [3]])
        counts.append((cursor.rowcount, cursor.description))
        raw.rollback()
        raw.close()
    assert counts[0] == counts[1]


def test_copy_after_a_read_behind_a_pooler_is_committed(
    pooler: Pooler, url: str, proxy: Proxy, make: Make, engine: sqlalchemy.engine.Engine, database: Ask
) -> None:
    pooled = make(url=url.replace(f":{proxy.port}/", f":{pooler.port}/"))
    raw = pooled.raw_connection()
    cursor = raw.cursor()
    cursor.execute("SELECT count(*) FROM t")
    with pooled.connect() as second:
        second.execute(text("SELECT 1"))
    copy_in(cursor, "3\tthree\n4\tfour\n")
    raw.commit()
    raw.close()
    assert database("SELECT count(*) FROM t") == [(4,)]


def test_other_data_behind_a_pooler_are_not_written(
    pooler: Pooler, url: str, proxy: Proxy, make: Make, engine: sqlalchemy.engine.Engine, server: Server, database: Ask
) -> None:
    pooled = make(url=url.replace(f":{proxy.port}/", f":{pooler.port}/"))
    with pooled.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
    server.ask(f"ALTER DATABASE study SET hpc_db.generation = '{uuid.uuid4()}'")
    for _turn in range(2):
        with pytest.raises(OperationalError, match="database was restored or replaced"), pooled.begin() as connection:
            connection.execute(text("INSERT INTO t VALUES (4, 'four')"))
    assert database("SELECT count(*) FROM t") == [(3,)]


@pytest.mark.parametrize("what", ["AUTOCOMMIT", "COPY", "SELECT", "a server that does not identify itself"])
def test_other_data_behind_a_pooler_are_not_written_without_a_mark(
    what: str, pooler: Pooler, url: str, proxy: Proxy, make: Make, engine: sqlalchemy.engine.Engine, server: Server,
    database: Ask,
) -> None:
    identify = "EXECUTE ON FUNCTION pg_control_system()"
    if what.startswith("a server"):
        database(f"REVOKE {identify} FROM PUBLIC")
    options = {"isolation_level": what} if what == "AUTOCOMMIT" else {}
    pooled = make(url=url.replace(f":{proxy.port}/", f":{pooler.port}/"), **options)
    try:
        raw = pooled.raw_connection()
        raw.cursor().execute("SELECT 1")
        raw.commit()
        server.ask(f"ALTER DATABASE study SET hpc_db.generation = '{uuid.uuid4()}'")
        with pytest.raises(DRIVER_ERRORS, match="the database was restored or replaced"):
            if what == "COPY":
                copy_in(raw.cursor(), "3\tthree\n")
            else:
                raw.cursor().execute("SELECT n FROM t" if what == "SELECT" else "INSERT INTO t VALUES (3, 'three')")
            raw.commit()
        raw.invalidate()
    finally:
        database(f"GRANT {identify} TO PUBLIC")
    assert database("SELECT count(*) FROM t") == [(2,)]


def copy_in(cursor, lines: str) -> None:  # type: ignore[no-untyped-def]
    if hasattr(cursor, "copy_expert"):
        import io

        cursor.copy_expert("COPY t FROM STDIN", io.StringIO(lines))
    else:
        with cursor.copy("COPY t FROM STDIN") as copy:
            copy.write(lines)


def test_copy_that_was_cut_is_no_success(
    url: str, proxy: Proxy, server: Server, make: Make, engine: sqlalchemy.engine.Engine, cut: Callable
) -> None:
    raw = make(url=url.replace(f":{proxy.port}/", f":{server.port}/")).raw_connection()
    cursor = raw.cursor()
    copy_in(cursor, "3\tthree\n")
    cut()
    with pytest.raises(DRIVER_ERRORS):
        copy_in(cursor, "4\tfour\n")
    with pytest.raises(DRIVER_ERRORS):
        raw.commit()
    raw.invalidate()


@pytest.mark.parametrize("insert", [False, True])
def test_what_a_listener_sets_is_not_forgotten(
    insert: bool, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("CREATE TABLE t (n int)")

    def set_search_path(connection, _record) -> None:  # type: ignore[no-untyped-def]
        connection.autocommit, before = True, connection.autocommit
        cursor = connection.cursor()
        cursor.execute("SET SESSION search_path = 'f'")
        cursor.close()
        connection.autocommit = before

    engine = make()
    event.listen(engine, "connect", set_search_path, insert=insert)
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO t VALUES (3)"))
        cut()
        with pytest.raises(OperationalError):
            connection.execute(text("INSERT INTO t VALUES (4)"))
    assert database("SELECT count(*) FROM public.t") == [(2,)]
    with engine.begin() as connection:  # and the next connection is configured again
        connection.execute(text("INSERT INTO t VALUES (5)"))
    assert database("SELECT n FROM f.t") == [(5,)]


class TimeLimit(Exception):
    pass


def test_repetition_that_was_interrupted_is_not_committed_by_half(
    engine: sqlalchemy.engine.Engine, database: Ask, server: Server, proxy: Proxy
) -> None:
    import psycopg2

    def raise_it(*_unused: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        with engine.connect() as connection:
            connection.execute(text("INSERT INTO t VALUES (10, 'debit')"))
            connection.execute(text("UPDATE t SET word = 'touched' WHERE n = 1"))
            other = psycopg2.connect(host="127.0.0.1", port=server.port, user="owner", dbname="study")
            release = threading.Timer(2, other.close)

            def lock() -> None:
                other.cursor().execute("SELECT 1 FROM t WHERE n = 1 FOR UPDATE")
                release.start()
                signal.setitimer(signal.ITIMER_REAL, 0.7)

            proxy.cut_at(b"credit", REQUEST_LOST, lambda: eventually(lambda: locked(lock)))
            with pytest.raises(TimeLimit):
                connection.execute(text("INSERT INTO t VALUES (11, 'credit')"))
            with pytest.raises(DBAPIError):
                connection.commit()
            release.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert database("SELECT n, word FROM t ORDER BY n") == [(1, "one"), (2, "two")]


def test_interrupted_statement_is_not_left_out_of_a_repetition(
    engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception can come at any point, even between a statement's end and the record of its outcome."""
    from hpc_db_client import connection as module

    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (10, 'debit')"))
        with monkeypatch.context() as patched:

            def interrupted(*_unused: object) -> bytes:
                raise TimeLimit

            patched.setattr(module, "digest", interrupted)
            with contextlib.suppress(TimeLimit):
                connection.execute(text("INSERT INTO t VALUES (11, 'credit')"))
        cut()
        connection.execute(text("INSERT INTO t VALUES (12, 'note')"))
    assert database("SELECT count(*) FROM t") == [(2,)]


def locked(lock: Callable[[], None]) -> bool:
    lock()
    return True


def test_forked_child_leaves_the_parent_s_session_alone(
    engine: sqlalchemy.engine.Engine, database: Ask
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("INSERT INTO t VALUES (3, 'of the parent')")
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            with pytest.raises(DRIVER_ERRORS):
                cursor.execute("INSERT INTO t VALUES (4, 'of the child')")
            with pytest.raises(DRIVER_ERRORS):
                raw.commit()
            raw.rollback()
            raw.close()
            with engine.begin() as connection:
                connection.execute(text("INSERT INTO t VALUES (5, 'of the child')"))
            engine.dispose()
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    cursor.execute("INSERT INTO t VALUES (6, 'of the parent')")
    raw.commit()
    raw.close()
    assert database("SELECT n FROM t ORDER BY n") == [(1,), (2,), (3,), (5,), (6,)]


@pytest.mark.parametrize("function", ["currval('parents_id_seq')", "lastval()"])
def test_rows_carry_no_key_that_the_program_never_had(
    function: str, engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    database("DROP TABLE IF EXISTS parents; CREATE TABLE parents (id serial PRIMARY KEY, name text);"
             "ALTER TABLE parents OWNER TO study")
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("SELECT nextval('parents_id_seq')"))
        cut()
        connection.execute(text(f"INSERT INTO t VALUES ({function})"))
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("SELECT nextval('parents_id_seq')"))
        connection.execute(text(f"INSERT INTO parents VALUES ({function}, 'second')"))
        cut()
        connection.execute(text("SELECT 1"))
    assert database("SELECT * FROM parents") == []
    assert database("SELECT count(*) FROM t") == [(2,)]


@pytest.mark.parametrize("definition, is_repeated", [
    ("INCREMENT -1", True), ("INCREMENT 7", True), ("MAXVALUE 3 CYCLE", False),
])
def test_sequences_that_count_otherwise(
    definition: str, is_repeated: bool, engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    database(f"DROP SEQUENCE IF EXISTS s; CREATE SEQUENCE s {definition}; ALTER SEQUENCE s OWNER TO study;"
             "SELECT nextval('s'), nextval('s')")
    with contextlib.nullcontext() if is_repeated else pytest.raises(OperationalError), engine.begin() as connection:
        key = connection.execute(text("SELECT nextval('s')")).scalar()
        cut()
        connection.execute(text("INSERT INTO t VALUES (:key, 'key')"), {"key": key + 100})
    assert database("SELECT n FROM t WHERE word = 'key'") == ([(key + 100,)] if is_repeated else [])


JOBS = """
    CREATE TABLE lock (n int); INSERT INTO lock VALUES (1); CREATE TABLE numbers (number int);
    CREATE TABLE jobs (id serial PRIMARY KEY, number int);
"""
ADD = "INSERT INTO jobs (number) VALUES (NULL) RETURNING id"
COUNT = "SELECT count(*) FROM jobs WHERE id < :id"
COUNTED = {
    "the table": ("", ADD, COUNT),
    "nextval": ("", "INSERT INTO jobs (id, number) VALUES (nextval('jobs_id_seq'), NULL) RETURNING id", COUNT),
    "an expression": ("", "INSERT INTO jobs (id) VALUES (1 * nextval('jobs_id_seq')) RETURNING id", COUNT),
    "DEFAULT": ("", "INSERT INTO jobs (id, number) VALUES (DEFAULT, NULL) RETURNING id", COUNT),
    "a view": ("CREATE VIEW seen AS SELECT id FROM jobs", ADD, COUNT.replace("jobs", "seen")),
    "into a view": (
        "CREATE VIEW seen AS SELECT * FROM jobs", "INSERT INTO seen (number) VALUES (NULL) RETURNING id", COUNT
    ),
    "a partition": (
        "DROP TABLE jobs; CREATE TABLE jobs (id serial, number int) PARTITION BY RANGE (id);"
        "CREATE TABLE all_jobs PARTITION OF jobs DEFAULT", ADD, COUNT.replace("jobs", "all_jobs"),
    ),
    "a trigger": (
        "CREATE FUNCTION count_them() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
        " NEW.number := (SELECT count(*) FROM f.jobs WHERE id < NEW.id); RETURN NEW; END';"
        "CREATE TRIGGER count_them BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION count_them()", ADD, "",
    ),
    "a trigger's key": (
        "ALTER TABLE jobs ALTER id DROP DEFAULT; CREATE FUNCTION give() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
        " IF NEW.id IS NULL THEN NEW.id := nextval(''f.jobs_id_seq''); END IF; RETURN NEW; END';"
        "CREATE TRIGGER give BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION give()", ADD, COUNT,
    ),
}


def add_job(connection: sqlalchemy.engine.Connection, add: str, count: str) -> None:
    """Add a job numbered by the count of jobs before it, as Optuna numbers its trials."""
    connection.execute(text("SELECT n FROM lock FOR UPDATE"))
    (key,) = connection.execute(text(add)).one()
    if count:
        number = connection.execute(text(count), {"id": key}).scalar()
        connection.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})


@pytest.mark.parametrize("what", COUNTED)
def test_no_two_rows_get_one_number(
    what: str, url: str, proxy: Proxy, server: Server, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable,
    database: Ask,
) -> None:
    more, add, count = COUNTED[what]
    schema(JOBS + more)
    path = {"connect_args": {"options": "-csearch_path=f"}}
    ours, others = make(**path), make(url=url.replace(f":{proxy.port}/", f":{server.port}/"), **path)

    def add_another() -> None:
        with others.begin() as connection:
            add_job(connection, add, count)

    add_another()
    with pytest.raises(OperationalError), ours.begin() as connection:
        add_job(connection, add, count)
        proxy.cut_at(b"COMMIT", REQUEST_LOST, add_another)
    numbers = "SELECT number FROM f.numbers UNION ALL SELECT number FROM f.jobs WHERE number IS NOT NULL ORDER BY 1"
    assert [number for (number,) in database(numbers)] == [0, 1]


def test_rollback_after_a_count_does_not_hide_the_count(
    url: str, proxy: Proxy, server: Server, make: Make, schema: Callable
) -> None:
    schema(JOBS)
    path = {"connect_args": {"options": "-csearch_path=f"}}
    ours, others = make(**path), make(url=url.replace(f":{proxy.port}/", f":{server.port}/"), **path)

    def add_another() -> None:
        with others.begin() as connection:
            add_job(connection, ADD, COUNT)

    with pytest.raises(OperationalError, match="other sessions have received keys of jobs"), ours.begin() as connection:
        (key,) = connection.execute(text(ADD)).one()
        proxy.cut_at(b"SAVEPOINT", REQUEST_LOST, add_another)
        connection.execute(text("SAVEPOINT a"))
        connection.execute(text(f"SELECT count(*) FROM jobs WHERE id < {key}; ROLLBACK TO SAVEPOINT a"))


def test_order_of_keys_is_asked_when_the_locks_are_held_again(
    url: str, proxy: Proxy, server: Server, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable,
    database: Ask,
) -> None:
    schema(JOBS)
    path = {"connect_args": {"options": "-csearch_path=f"}}
    ours, others = make(**path), make(url=url.replace(f":{proxy.port}/", f":{server.port}/"), **path)
    locked = threading.Event()
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'study'"

    def add_another() -> None:
        with others.begin() as connection:
            connection.execute(text("SELECT n FROM lock FOR UPDATE"))
            locked.set()
            eventually(lambda: database(waits))
            add_job(connection, ADD, COUNT)

    another = threading.Thread(target=add_another)

    def add_it_first() -> None:
        another.start()
        assert locked.wait(30)

    with pytest.raises(OperationalError), ours.begin() as connection:
        add_job(connection, ADD, COUNT)
        proxy.cut_at(b"COMMIT", REQUEST_LOST, add_it_first)
    another.join(30)
    assert database("SELECT number FROM f.numbers") == [(0,)]


def test_value_that_a_placeholder_by_place_has_made_is_repeated(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("CREATE TABLE a (id serial PRIMARY KEY, word text, n int)")
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("INSERT INTO f.a (word, n) VALUES (lower(%s), %s) RETURNING id, word", ("X", 1))
    assert cursor.fetchall() == [(1, "x")]
    cut()
    cursor.execute("INSERT INTO t VALUES (3)")
    raw.commit()
    raw.close()
    assert database("SELECT * FROM f.a") == [(1, "x", 1)]


KEYS = {
    "serial": sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
    "identity": sqlalchemy.Column("id", sqlalchemy.Integer, sqlalchemy.Identity(), primary_key=True),
    "always": sqlalchemy.Column("id", sqlalchemy.Integer, sqlalchemy.Identity(always=True), primary_key=True),
    "uuid": sqlalchemy.Column(
        "id", postgresql.UUID(as_uuid=True), server_default=text("gen_random_uuid()"), primary_key=True
    ),
    "text": sqlalchemy.Column("id", sqlalchemy.Text, server_default=text("md5(random()::text)"), primary_key=True),
    "expression": sqlalchemy.Column(
        "id", postgresql.UUID(as_uuid=True), default=sqlalchemy.func.gen_random_uuid(), primary_key=True
    ),
}


@pytest.fixture(params=KEYS)
def keyed(request: pytest.FixtureRequest, engine: sqlalchemy.engine.Engine) -> Iterator[sqlalchemy.Table]:
    made = sqlalchemy.MetaData()
    table = sqlalchemy.Table(
        "keyed", made, KEYS[request.param]._copy() if hasattr(KEYS[request.param], "_copy") else KEYS[
            request.param].copy(),
        sqlalchemy.Column("word", sqlalchemy.Text, unique=True), sqlalchemy.Column("n", sqlalchemy.Integer),
        sqlalchemy.Column("at", sqlalchemy.DateTime(True), server_default=sqlalchemy.func.now()),
        sqlalchemy.Column("twice", sqlalchemy.Integer, sqlalchemy.Computed("n * 2")),
    )
    made.drop_all(engine)
    made.create_all(engine)
    engine.dispose()
    yield table
    made.drop_all(engine)


@pytest.mark.parametrize("way", [REQUEST_LOST, ANSWER_LOST])
def test_keys_that_the_program_has_seen_stay(
    way: str, keyed: sqlalchemy.Table, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy
) -> None:
    c = keyed.c
    with engine.begin() as connection:
        seen = [connection.execute(keyed.insert().values(word="a", n=1)).inserted_primary_key[0]]
        row = connection.execute(keyed.insert().values(word="%b'", n=2).returning(c.id, c.at, c.twice)).one()
        seen.append(row[0])
        seen += connection.execute(
            keyed.insert().values([{"word": "c"}, {"word": "d"}]).returning(c.id)
        ).scalars().all()
        if not IS_OLD:
            seen += connection.execute(keyed.insert().returning(c.id), [{"word": "e"}, {"word": "f"}]).scalars().all()
        upsert = postgresql.insert(keyed).values(word="a", n=5)
        upsert = upsert.on_conflict_do_update(index_elements=["word"], set_={"n": 5})
        assert connection.execute(upsert).inserted_primary_key[0] == seen[0]
        new = postgresql.insert(keyed).values(word="g").on_conflict_do_nothing()
        seen.append(connection.execute(new).inserted_primary_key[0])
        assert connection.execute(new).rowcount < 1  # psycopg returns -1
        proxy.cut_at(b"COMMIT", way)
    found = database("SELECT id::text, word, at, twice FROM keyed ORDER BY word COLLATE \"C\"")
    words = ["%b'", "a", "c", "d", *([] if IS_OLD else ["e", "f"]), "g"]
    assert [word for _key, word, _at, _twice in found] == words
    assert {key for key, *_rest in found} == {str(key) for key in seen}
    assert found[0][2:] == (row[1], 4) and found[1][0] == str(seen[0])


def test_objects_keep_their_keys(
    keyed: sqlalchemy.Table, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy
) -> None:
    class Thing:
        pass

    orm.registry().map_imperatively(Thing, keyed)
    with orm.Session(engine, future=True) as session:
        things = []
        for number in range(5):
            thing = Thing()
            thing.word = f"w{number}"  # type: ignore[attr-defined]
            things.append(thing)
        session.add_all(things)
        session.flush()
        seen = [(str(thing.id), thing.word) for thing in things]  # type: ignore[attr-defined]
        proxy.cut_at(b"COMMIT", REQUEST_LOST)
        session.commit()
    assert database("SELECT id::text, word FROM keyed ORDER BY word") == seen


def test_key_of_a_renamed_table(engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy) -> None:
    database("DROP TABLE IF EXISTS old, renamed; CREATE TABLE old (id serial PRIMARY KEY, word text);"
             "ALTER TABLE old RENAME TO renamed; ALTER TABLE renamed OWNER TO study")
    table = sqlalchemy.Table(
        "renamed", sqlalchemy.MetaData(), sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
        sqlalchemy.Column("word", sqlalchemy.Text),
    )
    with engine.begin() as connection:
        (key,) = connection.execute(table.insert().values(word="a")).inserted_primary_key
        proxy.cut_at(b"COMMIT", ANSWER_LOST)
    assert database("SELECT id FROM renamed") == [(key,)]


@pytest.mark.parametrize("way", ["creator", "do_connect"])
def test_connections_that_are_opened_otherwise_wait_as_well(
    way: str, driver: str, url: str, proxy: Proxy, make: Make, engine: sqlalchemy.engine.Engine, database: Ask
) -> None:
    opened = []

    def connect(*_arguments: object) -> object:
        opened.append(1)
        module = __import__(driver)
        return module.connect(host="127.0.0.1", port=proxy.port, user="study", dbname="study", sslmode="disable")

    engine = make(**({"creator": connect} if way == "creator" else {}))
    if way == "do_connect":
        event.listen(engine, "do_connect", connect)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        proxy.cut_at(b"(4,", REQUEST_LOST)
        connection.execute(text("INSERT INTO t VALUES (4, 'four')"))
    assert database("SELECT count(*) FROM t") == [(4,)]
    assert len(opened) == 2


def test_pool_of_somebody_else_s_is_refused() -> None:
    with pytest.raises(ArgumentError, match="^pool: not allowed with the plugin hpc_db"):
        sqlalchemy.create_engine("postgresql+psycopg2:///?plugin=hpc_db", pool=NullPool(lambda: None))


def test_async_is_refused_in_one_line() -> None:
    with pytest.raises(ArgumentError, match="works with .*, not create_async_engine"):
        # like create_async_engine, which needs greenlet
        sqlalchemy.create_engine("postgresql+psycopg2:///?plugin=hpc_db", _is_async=True)


def test_what_a_program_sets_on_its_cursor_stays(
    driver: str, engine: sqlalchemy.engine.Engine, proxy: Proxy
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.arraysize = 4
    if driver == "psycopg":
        from psycopg.rows import dict_row  # type: ignore[import-not-found,unused-ignore]

        cursor.row_factory = dict_row
    proxy.cut_at(b"generate_series", REQUEST_LOST)
    cursor.execute("SELECT generate_series(1, 9) AS n")
    assert cursor.fetchone() == ((1,) if driver == "psycopg2" else {"n": 1})
    assert len(cursor.fetchmany()) == 4
    raw.close()


def test_connection_that_made_room_goes_on(
    engine: sqlalchemy.engine.Engine, server: Server, database: Ask
) -> None:
    server.ask("ALTER ROLE study CONNECTION LIMIT 1")
    try:
        with engine.connect() as first:
            first.execute(text("SELECT count(*) FROM t"))
            with engine.connect() as second:
                second.execute(text("SELECT 1"))
            first.execute(text("INSERT INTO t VALUES (3, 'three')"))
            first.commit()
    finally:
        server.ask("ALTER ROLE study CONNECTION LIMIT -1")
    assert database("SELECT count(*) FROM t") == [(3,)]


@pytest.mark.parametrize("within", [False, True])
def test_engine_does_not_go_on_with_other_data(
    within: bool, engine: sqlalchemy.engine.Engine, server: Server, cut: Callable, database: Ask
) -> None:
    with engine.connect() as connection:
        if within:
            connection.execute(text("INSERT INTO t VALUES (3, 'three')"))
        server.ask(f"ALTER DATABASE study SET hpc_db.generation = '{uuid.uuid4()}'")
        cut()
        if within:
            with pytest.raises(OperationalError, match="the database was restored or replaced"):
                connection.execute(text("INSERT INTO t VALUES (4, 'four')"))
    for _turn in range(2):
        with pytest.raises(OperationalError, match="database was restored or replaced"), engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    assert database("SELECT count(*) FROM t") == [(2,)]


def test_data_that_are_replaced_during_the_first_connection_are_named(
    make: Make, server: Server, proxy: Proxy
) -> None:
    engine = make()
    proxy.cut_at(
        b"pg_catalog.version()", REQUEST_LOST,
        lambda: server.ask(f"ALTER DATABASE study SET hpc_db.generation = '{uuid.uuid4()}'"),
    )

    with pytest.raises(OperationalError, match="the database was restored or replaced"):
        engine.connect()
    assert not proxy.due

    with make().connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1


def test_other_database_of_the_same_name_is_other_data(
    make: Make, url: str, engine: sqlalchemy.engine.Engine, server: Server
) -> None:
    server.ask("DROP DATABASE IF EXISTS other")
    server.ask("CREATE DATABASE other OWNER study")
    engine = make(url=url.replace("/study?", "/other?"))
    engine.connect().close()
    server.ask("DROP DATABASE other WITH (FORCE)")
    server.ask("CREATE DATABASE other OWNER study")
    with pytest.raises(OperationalError, match="database was restored or replaced"), engine.connect() as connection:
        connection.execute(text("SELECT 1"))


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)  # psycopg sends parameters separately
def test_parameter_that_is_sql_is_not_repeated(
    driver: str, engine: sqlalchemy.engine.Engine, cut: Callable, database: Ask
) -> None:
    from psycopg2.extensions import AsIs

    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("SELECT %s", (AsIs("pg_advisory_lock(7)"),))
    raw.commit()
    cut()
    with pytest.raises(DRIVER_ERRORS):
        cursor.execute("INSERT INTO t VALUES (3)")
    raw.invalidate()


@pytest.mark.parametrize("at", ["second", "commit", "before"])
def test_clock_is_not_read_twice(at: str, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy) -> None:
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("SELECT now()"))
        proxy.cut_at({"second": b"INSERT", "commit": b"COMMIT", "before": b"'before'"}[at], REQUEST_LOST)
        connection.execute(text("SELECT 'before' FROM t"))
        connection.execute(text("INSERT INTO t VALUES (3, now()::text)"))
    assert database("SELECT count(*) FROM t") == [(2,)]


@pytest.mark.parametrize("statement", ["SELECT now()", "SELECT CAST('now' AS timestamptz)", "SELECT at FROM clock"])
def test_clock_that_is_not_named_is_not_read_twice(
    statement: str, make: Make, engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("CREATE TABLE made (n int, at timestamptz DEFAULT now()); CREATE VIEW clock AS SELECT now() AS at")
    engine = make(connect_args={"options": "-csearch_path=f"})
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text(statement))
        cut()
        connection.execute(text("INSERT INTO made VALUES (1)"))
    with engine.begin() as connection:  # this table has not been read before
        connection.execute(text("SELECT n FROM made"))
        cut()
        connection.execute(text("INSERT INTO made VALUES (2)"))
    assert database("SELECT n FROM f.made") == [(2,)]


def test_names_mean_the_same_tables_in_one_transaction(
    engine: sqlalchemy.engine.Engine, schema: Callable, database: Ask, cut: Callable
) -> None:
    schema("CREATE TABLE t (n int)")
    engine.dispose()
    try:
        with pytest.raises(OperationalError), engine.begin() as connection:
            connection.execute(text("INSERT INTO t VALUES (3)"))
            database("ALTER ROLE study SET search_path = f, public")
            cut()
            connection.execute(text("INSERT INTO t VALUES (4)"))
    finally:
        database("ALTER ROLE study RESET search_path")
    assert database("SELECT n FROM t ORDER BY n") == [(1,), (2,)]
    assert database("SELECT n FROM f.t") == []


@pytest.mark.parametrize("at", ["n = 2", "COMMIT"])
def test_snapshot_is_not_exchanged(
    at: str, engine: sqlalchemy.engine.Engine, database: Ask, proxy: Proxy
) -> None:
    with pytest.raises(OperationalError), engine.begin() as connection:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        connection.execute(text("SELECT word FROM t WHERE n = 1"))
        database("UPDATE t SET word = 'another' WHERE n = 1")
        proxy.cut_at(at.encode(), REQUEST_LOST)
        connection.execute(text("SELECT word FROM t WHERE n = 2"))


def test_session_ends_between_two_transactions_of_a_raw_connection(
    engine: sqlalchemy.engine.Engine, database: Ask, cut: Callable
) -> None:
    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute("INSERT INTO t VALUES (3)")
    raw.commit()
    cut()
    cursor.execute("INSERT INTO t VALUES (4)")
    raw.commit()
    raw.close()
    assert database("SELECT count(*) FROM t") == [(4,)]
