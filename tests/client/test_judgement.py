# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What may be repeated, what the URL may say, and how long is waited: no server is needed here."""

from __future__ import annotations

import copy

import pytest
import sqlalchemy
from hpc_db_client import patience
from hpc_db_client.journal import Journal, Step, digest, judge, only_reads
from sqlalchemy.exc import ArgumentError


@pytest.mark.parametrize("text", [
    "SELECT 1", " \n(SELECT 1) UNION SELECT 2;", "insert into t values (1)", "WITH x AS (SELECT 1) SELECT 2",
    "INSERT INTO t VALUES ('a; b'), ('CREATE TEMP')", "UPDATE t SET a = 1", "DELETE FROM t",
    "SELECT a FROM t FOR UPDATE", "SAVEPOINT a", "RELEASE a", "ROLLBACK TO a", "SET LOCAL statement_timeout = 1",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "LOCK TABLE t", "SHOW timezone",
    "select nextval('trials_trial_id_seq')",
])
def test_what_is_all_in_the_transaction_is_repeated(text: str) -> None:
    assert judge(text) == ("", False)


@pytest.mark.parametrize("text", ["CREATE TABLE t (a int)", "ALTER TABLE t ADD b int", "DROP TABLE t", "TRUNCATE t"])
def test_definitions_are_not_repeated_but_bind_nothing(text: str) -> None:
    why, lasting = judge(text)

    assert why and not lasting


@pytest.mark.parametrize("text", [
    "SET search_path = a", "CREATE TEMP TABLE t (a int)", "create local temporary table t ()", "SELECT 1; SELECT 2",
    "SELECT pg_advisory_lock(1)", "SELECT set_config('a.b', '1', false)", "LISTEN a", "NOTIFY a", "COPY t FROM STDIN",
    "PREPARE p AS SELECT 1", "DECLARE c CURSOR WITH HOLD FOR SELECT 1", "DO $$ BEGIN END $$", "CALL p()", "VACUUM",
    "SELECT * INTO TEMP x FROM t", "SELECT dblink_exec('a', 'b')", "SELECT lo_import('/a')", "COMMIT", "BEGIN",
    "INSERT INTO t VALUES (E'\\'; SELECT pg_advisory_lock(1) --')", "", "SELECT setval('s', 1)",
])
def test_what_leaves_something_behind_binds_the_session(text: str) -> None:
    why, lasting = judge(text)

    assert why and lasting


def test_what_only_reads_is_told_from_what_may_write() -> None:
    for text in ("SELECT a\nFROM t", "show timezone", "SELECT count(*) FROM t WHERE n IN (1, 2) AND w = 'f('"):
        assert only_reads(text), text
    for text in (
        "SELECT a\nFROM t\nFOR  UPDATE", "INSERT INTO t VALUES (1)", "SELECT f(a) FROM t", 'SELECT "count"(a) FROM t',
        "SELECT a INTO b FROM t", "WITH a AS (DELETE FROM t RETURNING n) SELECT n FROM a", "SELECT nextval('t_n_seq')",
    ):
        assert not only_reads(text), text


def test_parameters_are_those_of_the_moment() -> None:
    given = {"a": [1]}
    journal, step = Journal(), Step("execute", "SELECT %(a)s", ("SELECT %(a)s", given), {}, {})

    journal.begin(step)
    journal.add(step)
    given["a"].append(2)

    assert journal.steps[0].arguments[1] == {"a": [1]}


def test_bulk_load_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    for _turn in range(3):
        step = Step("execute", "INSERT", ("INSERT", "x" * (6 * 1024**2)), {}, {})
        journal.begin(step)
        journal.add(step)

    assert journal.why_not == "more statements than are kept" and not journal.steps


@pytest.mark.parametrize("rows", [
    [(1, "a"), (2, "c")], [(1, "a")], [(2, "b"), (1, "a")], [(1, memoryview(b"a")), (2, "b")], None,
])
def test_results_that_differ_are_told_apart(rows: list | None) -> None:
    description = [("n", 23, None), ("t", 25, None)]
    assert digest(description, "SELECT 2", [(1, "a"), (2, "b")]) != digest(description, "SELECT 2", rows)
    assert digest(description, "SELECT 2", copy.copy(rows)) == digest(description, "SELECT 2", rows)
    assert digest(description, "SELECT 2", rows) != digest(description, "SELECT 3", rows)


@pytest.mark.parametrize("url, says", [
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=soon", "hpc_db_patience: 'soon' is no number of seconds"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=-1", "from 0 to 604800"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patience=nan", "hpc_db_patience: 'nan'"),
    ("postgresql+psycopg2:///?plugin=hpc_db&hpc_db_patients=1", "hpc_db_patients: no such setting"),
    ("sqlite:///?plugin=hpc_db", "works with postgresql+psycopg2:// and postgresql+psycopg://, not sqlite://"),
])
def test_url_that_is_wrong_is_told_at_once(url: str, says: str) -> None:
    with pytest.raises(ArgumentError) as told:
        sqlalchemy.create_engine(url)

    assert says in str(told.value)


def test_url_is_shown_as_it_was_given() -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg2:///?service=a&plugin=hpc_db&hpc_db_patience=5")

    assert str(engine.url) == "postgresql+psycopg2:///?service=a"
    assert (engine.dialect.name, engine.dialect.driver, engine.pool.size()) == ("postgresql", "psycopg2", 1)


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
