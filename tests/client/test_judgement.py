# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules for repeating statements, for the URL's options and for the waiting time; no server is needed here."""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path

import pytest
import sqlalchemy
from hpc_db_client import patience, sql
from hpc_db_client.journal import Journal, Step, digest
from hpc_db_client.sql import judge, judge_body, judge_definition, with_values
from sqlalchemy.exc import ArgumentError


@pytest.mark.parametrize("text", [
    "SELECT 1", " \n(SELECT 1) UNION SELECT 2;", "insert into t values (1)", "WITH x AS (SELECT 1) SELECT 2",
    "INSERT INTO t VALUES ('a; b'), ('CREATE TEMP')", "UPDATE t SET a = 1", "DELETE FROM t", "TABLE t", "VALUES (1)",
    "SELECT a FROM t FOR UPDATE", "SAVEPOINT a", "RELEASE a", "ROLLBACK TO a", "SET LOCAL statement_timeout = 1",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "LOCK TABLE t", "SHOW timezone",
    "select nextval('trials_trial_id_seq')", "SELECT pg_advisory_xact_lock(1)", "SELECT E'\\'; SELECT f(1) --'",
    'INSERT INTO "a""b" ("c d") VALUES (1)', "INSERT INTO s.t (a) SELECT b FROM u ON CONFLICT (a) DO NOTHING",
    "SELECT 1 /* ; /* f() */ ; */ -- f()\n, 2", "SELECT $$f()$$, $a$ $$ f() $a$", "SELECT a$b$c FROM t",
    "SELECT CAST(a AS NUMERIC(10, 2)), a::VARCHAR(3) FROM t", "SELECT pg_catalog.lower('A')", "SELECT 1_000.5e3",
    "SELECT count(*) FILTER (WHERE a > 1) OVER (PARTITION BY b) FROM t",
    "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)",
    "SELECT x.a FROM (VALUES (1, 2)) AS x (a, b)", "SELECT 'a\\'", "UPDATE t SET (a, b) = (1, 2)",
    "SELECT pg_advisory_xact_lock(1) AS pg_advisory_xact_lock_1", "SELECT 0x1F, 1 OPERATOR(pg_catalog.+) 2",
    "WITH RECURSIVE one(id) AS (SELECT 1), two(id) AS (SELECT 2) SELECT 3", "SELECT a @@ plainto_tsquery('b') FROM t",
    "SELECT g.n FROM generate_series(1, 3) g(n), (VALUES (1)) v(n)", 'SELECT "a""", "b" FROM t',
    "SELECT sum(a), mode() WITHIN GROUP (ORDER BY a) FILTER (WHERE b) OVER (ORDER BY (a)) FROM t GROUP BY CUBE (a)",
    "SELECT a FROM t TABLESAMPLE system(5) REPEATABLE (1) FETCH FIRST (1) ROWS ONLY", "SELECT a AT TIME ZONE ('UTC')",
    "INSERT INTO t VALUES (1) ON CONFLICT (a) WHERE a > 1 DO NOTHING", "SELECT lower_inc(int4range(1, 5))",
    "WITH a AS NOT MATERIALIZED (SELECT 1), b AS MATERIALIZED (SELECT 2) SELECT a FROM t GROUP BY GROUPING SETS ((a))",
])
def test_what_is_all_in_the_transaction_is_repeated(text: str) -> None:
    judged = judge(text)

    assert (judged.why, judged.binds) == ("", False)


@pytest.mark.parametrize("text", [
    "CREATE TABLE t (a int PRIMARY KEY, b varchar(3) CHECK (b <> ''))", "ALTER TABLE t ADD b int", "DROP TABLE t",
    "CREATE TABLE t (a int) PARTITION BY LIST (a)", "TRUNCATE t",
    "CREATE UNIQUE INDEX i ON t (a)", "UPDATE t SET a = 1; DELETE FROM t",
])
def test_definitions_are_not_repeated_but_bind_nothing(text: str) -> None:
    judged = judge(text)

    assert judged.why and not judged.binds


@pytest.mark.parametrize("text", [
    "SET search_path = a", "CREATE TEMP TABLE t (a int)", "create local temporary table t ()", "SELECT 1; SET a = b",
    "SELECT pg_advisory_lock(1)", "SELECT set_config('a.b', '1', false)", "LISTEN a", "NOTIFY a", "COPY t FROM STDIN",
    "PREPARE p AS SELECT 1", "DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DO $$ BEGIN END $$", "CALL p()", "VACUUM",
    "SELECT * INTO TEMP x FROM t", "SELECT dblink_exec('a', 'b')", "SELECT lo_import('/a')", "COMMIT", "BEGIN", "", ";",
    "SELECT setval('s', 1)", "SELECT currval('s')", "SELECT f(1)", 'SELECT "f"(1)', "SELECT f /* (' */ (1)",
    "SELECT 1 AS \"worker's\", f(7), 'x'", "SELECT $$it's$$, f(7), 'x'", "SELECT /* worker's */ f(7) /* don't */",
    "SELECT E'\\\\', f(7), '", "SELECT E'a'\n'b\\', ', f(7) --'", "SELECT U&'\\0061'", "SELECT 'a", "SELECT /* a",
    "SELECT $a$",
    "SELECT a.lower('A')", "SELECT x OPERATOR(f.+) y", "CREATE TABLE pg_temp.t AS SELECT 1",
    "SELECT n FROM pg_temp_3.t",
    "UPDATE pg_settings SET setting = 'a'", "SET LOCAL search_path = a", "UPDATE t SET a = 1 WHERE CURRENT OF c",
    "EXPLAIN ANALYZE SELECT f()", "CREATE TABLE t AS SELECT f()",
    "CREATE TABLE t AS SELECT 1 FROM u JOIN v ON f(v.a)", "SELECT 1 AS a; SELECT f()", "SELECT 1a", "ROLLBACK",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SET TRANSACTION SNAPSHOT '1'",
    "SELECT DISTINCT ON (a) f (b)", "SELECT DISTINCT ON (a) filter(b)", "SELECT * FROM a, f(1) AS (b int)",
    "SELECT a FROM t TABLESAMPLE system(5)", "SELECT a, cube(b) FROM t", "SELECT a FROM t ORDER BY cube(a)",
    "SELECT a FROM t JOIN u ON conflict(a)", "SELECT NOT materialized(1)", 'SELECT ""(1)', "SELECT operator(1)",
    *(f"SELECT 1, {word}(1)" for word in (
        "first", "key", "range", "rows", "zone", "next", "filter", "over", "escape", "sets", "list", "update", "by",
    )),
    "INSERT", "INSERT INTO", "INSERT INTO t SELECT a FROM", "INSERT INTO t (a",
])
def test_what_may_leave_something_behind_binds_the_session(text: str) -> None:
    judged = judge(text)

    assert judged.why and judged.binds


@pytest.mark.parametrize("body, is_known", [
    ("BEGIN NEW.at := now(); RETURN NEW; END", True), ("BEGIN INSERT INTO log VALUES (NEW.n); RETURN NULL; END", True),
    ("DECLARE n int := 1; BEGIN IF (NEW.a > n) THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END", True),
    ("BEGIN PERFORM f(); RETURN NEW; END", False), ("BEGIN EXECUTE 'SELECT f()'; RETURN NEW; END", False),
    ("BEGIN EXECUTE 'SELECT f()' || a = b; RETURN NEW; END", False), ("BEGIN NOTIFY a; RETURN NEW; END", False),
    ("BEGIN SET search_path = a; RETURN NEW; END", False), ("BEGIN CREATE TEMP TABLE a (); RETURN NEW; END", False),
    ("BEGIN UPDATE pg_settings SET setting = 'a'; RETURN NEW; END", False), ("BEGIN CALL p(); RETURN NEW; END", False),
    ("BEGIN IF a THEN LOCK b; END IF; RETURN NEW; END", False), ("", True),
    ("BEGIN PERFORM 1 AS declare; EXECUTE 'SELECT f()'; RETURN NEW; END", False),
    ("BEGIN PERFORM CASE WHEN a THEN declare END; EXECUTE 'SELECT f()'; RETURN NEW; END", False),
])
def test_body_of_a_trigger(body: str, is_known: bool) -> None:
    assert (judge_body(body)[0] == "") is is_known


@pytest.mark.parametrize("text, is_known", [
    ("CREATE TRIGGER function BEFORE UPDATE OF procedure ON a WHEN (f(new.n)) EXECUTE FUNCTION w()", False),
    ("CREATE TRIGGER function BEFORE UPDATE OF procedure ON a WHEN (new.n > 1) EXECUTE FUNCTION execute.x()", True),
    ("CREATE TRIGGER w AFTER INSERT ON a FOR EACH ROW EXECUTE PROCEDURE w('when')", True),
])
def test_definition_of_a_trigger(text: str, is_known: bool) -> None:
    assert (judge_definition(text)[0] == "") is is_known


@pytest.mark.parametrize("character", ["y", "''", "''y"])
def test_long_text_takes_little_memory_and_is_not_remembered(character: str) -> None:
    text = f"INSERT INTO t VALUES (1, '{character * 50_000}')"
    tracemalloc.start()
    assert not judge(text).why
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 8 * len(text) and kept < 20_000


def test_too_long_a_text_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "MOST_TOKENS", 100)
    for text in ("INSERT INTO t VALUES ('" + "a" * sql.MOST_CHARACTERS + "')", "SELECT 1" + ",1" * 50):
        judged = judge(text)
        assert judged.binds and "it is too long to be checked" in judged.why and len(judged.why) < 200


def test_backslash_is_known_only_with_standard_strings() -> None:
    assert judge("SELECT 'a\\', f(1), '").binds
    assert judge("SELECT 'a\\'", False, False).binds


@pytest.mark.parametrize("text, is_known", [
    ("SELECT a FROM t WHERE b = %s AND c IN %(c)s", True), ("SELECT 5 %% 3", True), ("SELECT '100%%'", True),
    ("SELECT '%s'", False), ('SELECT 1 AS "%s"', False), ("SELECT 1 -- %s", False), ("SELECT $$%s$$", False),
    ("SELECT f%s", False), ("SELECT 'a%'", False), ("SELECT 5 % 3", False), ("SELECT f %(a)s", False),
])
def test_parameters_that_the_driver_writes_into_a_literal_are_not_known(text: str, is_known: bool) -> None:
    assert judge(text, True).binds is not is_known


def test_what_only_reads_is_told_from_what_may_write() -> None:
    for text in ("SELECT a\nFROM t", "show timezone", "SELECT count(*) FROM t WHERE n IN (1, 2) AND w = 'f('"):
        assert judge(text).free, text
    for text in (
        "SELECT a\nFROM t\nFOR  UPDATE", "INSERT INTO t VALUES (1)", "SELECT f(a) FROM t", 'SELECT "counts"(a) FROM t',
        "SELECT a INTO b FROM t", "WITH a AS (DELETE FROM t RETURNING n) SELECT n FROM a", "SELECT nextval('t_n_seq')",
        "SELECT pg_advisory_xact_lock(1)", "SELECT a FROM t FOR/**/SHARE",
    ):
        assert not judge(text).free, text


def test_names_are_those_that_postgresql_looks_for() -> None:
    long = "a" * 70
    assert judge(f'SELECT Ab, "Ab", "x""y" FROM S.T AS {long}').names >= {"ab", "Ab", 'x"y', "s", "t", "a" * 63}


def test_relations_are_those_that_have_to_be_there() -> None:
    for text, wanted in (
        ("WITH x AS (SELECT 1), y(a) AS (SELECT 2), z AS MATERIALIZED (SELECT 3)"
         " SELECT * FROM x, y JOIN s.u AS q ON q.a = x.b JOIN z ON true JOIN y AS r ON true", {"u"}),
        ("INSERT INTO t (a) SELECT b FROM generate_series(1, 2) g(n) JOIN LATERAL (SELECT 1) v ON true", {"t"}),
        ("UPDATE t SET a = 1 FROM u", {"t", "u"}), ("DELETE FROM t USING v", {"t", "v"}),
    ):
        assert judge(text).relations == wanted, text


def test_doubled_percent_sign_is_one() -> None:
    judged = judge('INSERT INTO "a%%b" ("c%%") VALUES (%s) RETURNING "d%%e"', True)
    assert judged.insert is not None

    assert judged.names >= {"a%b", "c%", "d%e"} and "a%%b" in judge('TABLE "a%%b"').names
    assert (judged.insert.relation, judged.insert.returning) == ('"a%b"', ["d%e"])
    assert judge("SELECT nextval('a%%b')", True).sequence == "a%b"


def test_each_statement_of_optuna_s_is_known() -> None:
    """The newest, the middle and the oldest Optuna that are tested, through each driver."""
    recorded = json.loads((Path(__file__).with_name("optuna_statements.json")).read_text())
    judged = [judge(statement, True) for statement in recorded["statements"]]

    assert len(recorded["versions"]) == 5 and len(judged) > 200
    assert [each.why for each in judged if each.binds] == []
    assert [each.head for each in judged if each.why and each.head not in ("create", "alter")] == []


@pytest.mark.parametrize("text, given, wanted", [
    ("INSERT INTO t (a) VALUES (%(a)s) RETURNING t.id",
     {"id": [7]}, 'INSERT INTO t ("id", a) OVERRIDING SYSTEM VALUE VALUES (7, %(a)s) RETURNING t.id'),
    ("INSERT INTO t DEFAULT VALUES RETURNING id",
     {"id": ["a'%"]}, """INSERT INTO t ("id") OVERRIDING SYSTEM VALUE VALUES ('a''%%') RETURNING id"""),
    ("INSERT INTO t (id, a) VALUES (abs(%s), lower(%(a)s)) RETURNING id, a", {"id": [7], "a": ["b"]},
     "INSERT INTO t (id, a) VALUES (abs(%s), 'b') RETURNING id, a"),
    ("INSERT INTO ßßt DEFAULT /* VALUES */ VALUES RETURNING id",
     {"id": [7]}, 'INSERT INTO ßßt ("id") OVERRIDING SYSTEM VALUE VALUES (7) RETURNING id'),
    ("INSERT INTO t (id, a) VALUES (nextval('s'), %s), (%s, (1)) RETURNING id, f(a)",
     {"id": [7, -8]}, "INSERT INTO t (id, a) VALUES (7, %s), (%s, (1)) RETURNING id, f(a)"),
    ("INSERT INTO t (a) SELECT p0::TEXT FROM (VALUES (%s, 0), (%s, 1)) AS imp_sen(p0, sen_counter)"
     " ORDER BY sen_counter RETURNING t.id, t.id AS id__1", {"id": [7, 8]},
     'INSERT INTO t ("id", a) OVERRIDING SYSTEM VALUE SELECT (ARRAY[7, 8]::integer[])[sen_counter + 1], p0::TEXT'
     " FROM (VALUES (%s, 0), (%s, 1)) AS imp_sen(p0, sen_counter) ORDER BY sen_counter RETURNING t.id, t.id AS id__1"),
])
def test_insert_is_told_the_keys_that_it_gave(text: str, given: dict, wanted: str) -> None:
    insert = judge(text.replace(", f(a)", ", lower(a)"), True).insert
    assert insert is not None

    assert with_values(text, insert, {name: ("integer", values) for name, values in given.items()}) == wanted


def test_value_that_could_end_its_literal_is_not_told() -> None:
    """With standard_conforming_strings off, a backslash turns the text after the quote into SQL."""
    for text in ("INSERT INTO t (a) VALUES (1) RETURNING b", "INSERT INTO t (a, b) VALUES (1, f) RETURNING b"):
        insert = judge(text).insert
        assert insert is not None
        assert with_values(text, insert, {"b": ("text", ["\\', 1); COMMIT; DELETE FROM t; --"])}) == text


def test_parameters_are_those_of_the_moment() -> None:
    given = {"a": [1]}
    journal, step = Journal(), a_step("SELECT %(a)s FOR UPDATE", given)

    step.keep()
    journal.begin(step)
    given["a"].append(2)

    assert journal.steps[0].parameters == ({"a": [1]},)


def test_parameters_of_other_types_are_not_known() -> None:
    class Text(str):
        pass

    for given in (object(), [object()], {"a": Text("a")}, iter([])):
        with pytest.raises(TypeError):
            a_step("SELECT %s", given).keep()


def a_step(text: str, *parameters: object) -> Step:
    return Step("execute", text, parameters, {}, judge(text, bool(parameters)), lambda _real: None)


def test_bulk_load_is_not_kept() -> None:
    journal = Journal()
    for _turn in range(3):
        step = a_step("INSERT INTO t VALUES (%s)", ["x" * (6 * 1024**2)])
        step.keep()
        journal.begin(step)

    assert journal.why_not == "too many statements to remember" and not journal.steps


@pytest.mark.parametrize("rows", [
    [(1, "a"), (2, "c")], [(1, "a")], [(2, "b"), (1, "a")], [(1, memoryview(b"a")), (2, "b")], None,
])
def test_results_that_differ_are_told_apart(rows: list | None) -> None:
    description = [("n", 23, None), ("t", 25, None)]
    assert digest(description, "SELECT 2", [(1, "a"), (2, "b")]) != digest(description, "SELECT 2", rows)
    assert digest(description, "SELECT 2", copy.copy(rows)) == digest(description, "SELECT 2", rows)
    assert digest(description, "SELECT 2", rows) != digest(description, "SELECT 3", rows)


@pytest.mark.parametrize("url, says", [
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=soon", "hpc_db_patience: 'soon' is not allowed; seconds"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=-1", "from 0 to 604800"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=nan", "hpc_db_patience: 'nan'"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patients=1", "hpc_db_patients: not a setting"),
    ("sqlite:///?plugin=hpc_db", "works with postgresql+psycopg2:// and postgresql+psycopg://, not sqlite://"),
])
def test_url_that_is_wrong_is_told_at_once(url: str, says: str) -> None:
    with pytest.raises(ArgumentError) as told:
        sqlalchemy.create_engine(url)

    assert says in str(told.value)


def test_url_is_shown_as_it_was_given() -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg2:///?service=a&plugin=hpc_db&hpc_db_patience=5")

    assert str(engine.url) == "postgresql+psycopg2:///?service=a"
    assert (engine.dialect.name, engine.dialect.driver, engine.pool.size()) == ("postgresql", "psycopg2", 5)


@pytest.mark.parametrize("options, most", [
    ({}, 15), ({"max_overflow": 0}, 5), ({"max_overflow": 2}, 7), ({"pool_size": 3}, 13),
    ({"pool_size": 2, "max_overflow": 1}, 3), ({"max_overflow": -1}, None),
])
def test_as_many_connections_as_without_the_plugin(options: dict, most: int | None) -> None:
    pool = sqlalchemy.create_engine("postgresql+psycopg2:///?service=a&plugin=hpc_db", **options).pool

    assert (None if pool._max_overflow < 0 else pool.size() + pool._max_overflow) == most


def test_application_s_own_pool_settings_stand() -> None:
    url = "postgresql+psycopg2:///?service=a&plugin=hpc_db"

    assert sqlalchemy.create_engine(url, pool_size=3).pool.size() == 3
    assert isinstance(sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool).pool, sqlalchemy.pool.NullPool)


def test_waiting_gets_longer_is_told_once_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", sleep)
    outage = patience.Outage(patience.Patience(60, "service a"))

    with pytest.raises(patience.GaveUp, match=r"\(service a\) did not come back within 60 s \(hpc_db_patience\): gone"):
        while True:
            outage.pause(OSError("gone\nand more"))

    assert capsys.readouterr().err == "hpc_db: waiting up to 60 s for the database server (service a): gone\n"
    assert pauses[0] < 0.2 and max(pauses) <= patience.LONGEST_PAUSE and sum(pauses) == pytest.approx(60)
