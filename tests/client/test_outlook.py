# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker waits as long as a server job follows, and no longer than its two limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from hpc_db_client import outlook
from hpc_db_client.outlook import Outlook, read_follows, root_of
from hpc_db_client.patience import GaveUp, Outage, Patience

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
    """Write what follows, as the server job does."""
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
        f"hpc_db: waiting for the database server (service s), up to 43200 s: {QUEUED}\n"
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

    with pytest.raises(GaveUp, match="hpc_db_patience"):
        wait(outage, clock)

    assert 600 <= clock.now - gone <= 600 + 2 * outlook.LOOK_SECONDS
    assert capsys.readouterr().err.splitlines() == [
        f"hpc_db: waiting for the database server (s), up to 43200 s: {QUEUED}",
        "hpc_db: waiting for the database server (s), up to 43200 s: queued as job 4711 since 10:32, Resources",
        "hpc_db: waiting up to 600 s for the database server (s): no job follows any more",
    ]


def test_server_that_starts_late_is_waited_for(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    """Its job has no successor yet, but the worker has waited for it for hours."""
    tell(QUEUED)
    outage = Outage(Patience(600, "s", 43200, Outlook(str(tmp_path))))
    wait(outage, clock, until=40000)
    tell("")

    wait(outage, clock, until=590)


@pytest.mark.parametrize("text, follows", [
    ('{"follows": {"told": "x"}}', "x"), ('{"follows": null}', ""), ("{}", ""), ("[]", ""), ('{"follows": {"to', None),
    ("", None), (None, ""),
])
def test_file_that_is_missing_or_half_written(text: str | None, follows: str | None, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "state.json").write_text(text)

    assert read_follows(str(tmp_path)) == follows


def test_half_a_file_changes_nothing(tmp_path: Path, clock: Clock, tell: Callable) -> None:
    tell(QUEUED)
    looking = Outlook(str(tmp_path))
    assert looking.follows() == QUEUED

    (tmp_path / "run" / "state.json").write_text('{"follows": {"to')
    clock.now += outlook.LOOK_SECONDS

    assert looking.follows() == QUEUED


@pytest.mark.parametrize("service, entry, found", [
    ("mine", "[mine]\nhost=c1\npassfile=ROOT/secrets/pgpass\n", "ROOT"),
    ("mine-pooled", "[mine]\npassfile=/x/y/z\n[mine-pooled]\npassfile=ROOT/secrets/pgpass\n", "ROOT"),
    ("mine", "[other]\npassfile=/x/y/z\n", "HOME/hpc_db/mine"),
    ("mine-pooled", "", "HOME/hpc_db/mine"),
    ("unknown", "[other]\npassfile=/x/y/z\n", ""),
])
def test_instance_of_a_service(
    service: str, entry: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hpc_db/mine/run").mkdir(parents=True)
    (tmp_path / ".pg_service.conf").write_text(entry.replace("ROOT", "/data/instance"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PGSERVICEFILE", "HPC_DB_ROOT"):
        monkeypatch.delenv(name, raising=False)

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

    assert waiting.outlook.follows() == QUEUED


@pytest.mark.parametrize("text, says", [
    ("hpc_db_max_wait=-1", "hpc_db_max_wait: '-1' is not allowed; seconds from 0 to 604800"),
    ("hpc_db_wait=1", "hpc_db_wait: not a setting of the plugin hpc_db; allowed are hpc_db_patience, hpc_db_max_wait"),
])
def test_settings_in_the_url_are_checked(text: str, says: str) -> None:
    with pytest.raises(sqlalchemy.exc.ArgumentError, match=says):
        sqlalchemy.create_engine(f"postgresql+psycopg2:///?plugin=hpc_db&{text}")
