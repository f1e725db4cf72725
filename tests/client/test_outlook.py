# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker waits as long as a server job is queued or running, and no longer than its two limits."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy
from hpc_db_client import outlook
from hpc_db_client.connection import Engine, Link
from hpc_db_client.outlook import Outlook, root_of
from hpc_db_client.patience import LATE_MINUTES, LONGEST_PAUSE, GaveUp, Outage, Patience

QUEUED = "queued as job 4711 since 10:32, Priority, expected 11:05"
AWAY = ConnectionError("connection refused")


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    def sleep(seconds: float) -> None:
        made.now += seconds

    monkeypatch.setattr("time.monotonic", lambda: made.now)
    monkeypatch.setattr("time.sleep", sleep)
    return made


@pytest.fixture
def tell(tmp_path: Path) -> Callable[[str], None]:
    """Write the state of the next server job, as the server job does."""
    (tmp_path / "run").mkdir()

    def write(follows: str) -> None:
        content = {"state": "ended", "follows": {"id": "4711", "told": follows} if follows else None}
        (tmp_path / "run" / "state.json").write_text(json.dumps(content))

    return write


def wait(outage: Outage, clock: Clock, until: float = float("inf")) -> float:
    """Wait for the server; return how long, or until the time was over."""
    began = clock.now
    while clock.now - began < until:
        outage.pause(AWAY)
    return clock.now - began


def test_without_a_job_that_follows_it_waits_for_its_patience(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    tell("")

    with pytest.raises(GaveUp, match=r"did not come back within 600 s \(hpc_db_patience\): connection refused"):
        wait(Outage(Patience(600, "s", 43200, Outlook(str(tmp_path)))), clock)

    assert clock.now == pytest.approx(1600)


def test_with_a_job_that_follows_it_waits_for_the_longest_time(
    tmp_path: Path, clock: Clock, tell: Callable, capsys: pytest.CaptureFixture
) -> None:
    tell(QUEUED)

    with pytest.raises(GaveUp, match=r"did not come back within 43200 s \(hpc_db_max_wait\): connection refused"):
        wait(Outage(Patience(600, "service s", 43200, Outlook(str(tmp_path)))), clock)

    assert clock.now == pytest.approx(44200)
    assert capsys.readouterr().err == (
        f"hpc_db: waiting up to 43200 s for the database server (service s): {QUEUED}\n"
    )


def test_patience_counts_from_the_moment_at_which_nothing_follows_any_more(
    tmp_path: Path, clock: Clock, tell: Callable, capsys: pytest.CaptureFixture
) -> None:
    tell(QUEUED)
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))
    wait(outage, clock, until=5000)
    tell("queued as job 4711 since 10:32, Resources")
    wait(outage, clock, until=1000)
    tell("")
    gone = clock.now

    with pytest.raises(GaveUp, match=r"600 s \(hpc_db_patience\) after the last server job was queued or running: "):
        wait(outage, clock)

    assert 600 - LATE_MINUTES <= clock.now - gone <= 600 + 2 * LATE_MINUTES
    assert capsys.readouterr().err.splitlines() == [
        f"hpc_db: waiting up to 43200 s for the database server (s): {QUEUED}",
        "hpc_db: waiting up to 43200 s for the database server (s): queued as job 4711 since 10:32, Resources",
        "hpc_db: waiting up to 600 s for the database server (s): no server job is queued any more",
    ]


def test_server_that_starts_late_is_waited_for(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    """Its job has no successor yet, but the worker has waited for it for hours."""
    tell(QUEUED)
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))
    wait(outage, clock, until=40000)
    tell("")

    wait(outage, clock, until=600 - 2 * LATE_MINUTES)


@pytest.mark.parametrize("text, told", [
    ('{"follows": {"told": "x"}}', "x"), ('{"follows": null}', ""), ("{}", ""), ("[]", ""), ('{"follows": {"to', ""),
    ("", ""), (None, ""), ('{"state": "serving", "follows": {"told": "x"}}', "x"),  # of an earlier version
])
def test_file_that_is_missing_or_half_written(text: str | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "state.json").write_text(text)

    assert Outlook(str(tmp_path)).next_job() == told


@pytest.fixture
def serving(tmp_path: Path, tell: Callable) -> Path:
    """A server that runs, with a successor in the queue; return its heartbeat."""
    said = {"state": "serving", "follows": {"id": "4711", "told": QUEUED}, "lease": {"epoch": 7, "ttl": 90.0}}
    (tmp_path / "run" / "state.json").write_text(json.dumps(said))
    (tmp_path / "run" / "hb.7").write_text("1")
    return tmp_path / "run" / "hb.7"


def test_while_the_server_runs_it_is_only_this_worker_that_cannot_reach_it(
    tmp_path: Path, clock: Clock, serving: Path
) -> None:
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))

    with pytest.raises(GaveUp, match=r"within 600 s \(hpc_db_patience\): connection refused"):
        for beat in range(10000):
            serving.write_text(str(beat))
            outage.pause(AWAY)


def test_server_that_was_killed_is_known_by_its_heartbeat(
    tmp_path: Path, clock: Clock, serving: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its last state says that it serves."""
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))

    wait(outage, clock, until=10000)

    assert capsys.readouterr().err.splitlines() == [
        "hpc_db: waiting up to 600 s for the database server (s): connection refused",
        f"hpc_db: waiting up to 43200 s for the database server (s): {QUEUED}",
    ]


def test_file_system_that_does_not_answer_changes_nothing(
    tmp_path: Path, clock: Clock, tell: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(QUEUED)
    looking = Outlook(str(tmp_path))
    looking.next_job()

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr("builtins.open", refuse)
    clock.now += outlook.LOOK_SECONDS

    assert looking.next_job() == QUEUED


def test_wrong_password_is_told_at_once_although_a_successor_is_queued(
    serving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = Patience(600, "s", 43200, Outlook(str(tmp_path)))
    link = Link(lambda: None, lambda _real: None, Engine(psycopg2, patience))
    wrong = psycopg2.OperationalError("FATAL: password authentication failed")
    monkeypatch.setattr("hpc_db_client.connection.is_futile", lambda error: error is wrong)

    assert not link._may_pass(wrong)
    (tmp_path / "run" / "state.json").write_text('{"state": "ended", "follows": {"told": "queued as job 8"}}')
    patience.outlook = Outlook(str(tmp_path))
    assert link._may_pass(wrong)  # the service entry leads nowhere until then


def test_worker_that_waits_for_hours_asks_less_often(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    tell(QUEUED)
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))

    def longest(seconds: float) -> float:
        until, pauses = clock.now + seconds, []
        while clock.now < until:
            before = clock.now
            outage.pause(AWAY)
            pauses.append(clock.now - before)
        return max(pauses)

    assert longest(120) <= LONGEST_PAUSE
    wait(outage, clock, until=3600)
    assert LONGEST_PAUSE < longest(3600) <= LATE_MINUTES


def test_half_a_file_changes_nothing(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    tell(QUEUED)
    looking = Outlook(str(tmp_path))
    assert looking.next_job() == QUEUED

    (tmp_path / "run" / "state.json").write_text('{"follows": {"to')
    clock.now += outlook.LOOK_SECONDS

    assert looking.next_job() == QUEUED


@pytest.mark.parametrize("service, entry, found", [
    ("mine", "[mine]\nhost=c1\npassfile=ROOT/secrets/pgpass\n", "ROOT"),
    ("mine-pooled", "[mine]\npassfile=/x/y/z\n[mine-pooled]\npassfile=ROOT/secrets/pgpass\n", "ROOT"),
    ("mine", "[other]\npassfile=/x/y/z\n", "HOME/hpc_db/mine"),
    ("mine-pooled", "", "HOME/hpc_db/mine"),
    ("unknown", "[other]\npassfile=/x/y/z\n", ""), ("hers", "", "HOME/her db"),
])
def test_instance_of_a_service(
    service: str, entry: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hpc_db/mine/run").mkdir(parents=True)
    (tmp_path / ".pg_service.conf").write_text(entry.replace("ROOT", "/data/instance"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSERVICEFILE", raising=False)
    monkeypatch.setenv("HPC_DB_INSTANCE", "hers")
    (tmp_path / "her db/run").mkdir(parents=True)
    monkeypatch.setenv("HPC_DB_ROOT", str(tmp_path / "her db"))

    assert root_of(service) == found.replace("ROOT", "/data/instance").replace("HOME", str(tmp_path))


def test_instance_is_remembered_while_its_entry_is_gone(
    tmp_path: Path, clock: Clock, tell: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = tmp_path / "service"
    service.write_text(f"[mine]\npassfile={tmp_path}/secrets/pgpass\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    waiting = Patience(600, "s", 43200, Outlook(service="mine"))
    waiting.is_over()  # it has connected
    service.write_text("")
    tell(QUEUED)

    assert waiting.outlook.next_job() == QUEUED


@pytest.mark.parametrize("text, says", [
    ("hpc_db_max_wait=-1", "hpc_db_max_wait: '-1' is not allowed; seconds from 0 to 604800"),
    ("hpc_db_wait=1", "hpc_db_wait: not a setting of the plugin hpc_db; allowed are hpc_db_patience, hpc_db_max_wait"),
])
def test_settings_in_the_url_are_checked(text: str, says: str) -> None:
    with pytest.raises(sqlalchemy.exc.ArgumentError, match=says):
        sqlalchemy.create_engine(f"postgresql+psycopg2:///?plugin=hpc_db&{text}")
