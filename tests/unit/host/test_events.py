# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Outages computed from a server's events, including events cut off by a full disk."""

import pytest
from hpc_db_host import events


def said(state, reason, event="", cause="", job="1"):
    return {"state": state, "reason": reason, "event": event, "cause": cause, "job": job}


ASKS, STARTS = said("starting", "requesting the lease"), said("starting", "postgres is starting", "start")
SERVES, STOPS = said("serving", "it accepts writes"), said("stopping", "postgres is stopping")
NEAR, TOLD = said("stopping", "the walltime ends soon", "walltime"), said("ended", "stopped by SIGTERM")
DIES = said("starting", "postgres restarts: it ended", "restart", "it ended")
START = [ASKS, STARTS, SERVES]
FULL, DUMP = said("unhealthy", "the disk is full"), said("unhealthy", "no dump")
ASKS_2, WAITS_2, FAILS_2 = ({**each, "job": "2"} for each in (ASKS, said("starting", "held"), said("failed", "held")))


def outage(began, ended, reason="", certain=True):
    return {"began": began, "ended": ended, "certain": certain, "reason": reason}


@pytest.mark.parametrize("records, serving, outages, troubles", [
    ([], False, [], []),
    ([ASKS, STARTS, said("failed", "no")], False, [], []),
    (START, True, [], []),
    ([*START, STOPS, TOLD], False, [outage(3, None, "stopped by SIGTERM")], []),
    ([*START, STOPS, FAILS_2, TOLD], False, [outage(3, None, "stopped by SIGTERM")], []),
    ([*START, STOPS, TOLD, *START], True, [outage(3, 7, "stopped by SIGTERM")], []),
    ([*START, NEAR, STOPS, TOLD, *START], True, [outage(4, 8, "the walltime ends soon")], []),
    # killed: the outage began at some time after the last event
    ([*START, *START], True, [outage(3, 5, certain=False)], []),
    ([*START, STOPS, DIES, STARTS, SERVES], True, [outage(3, 6, "it ended")], []),
    # another job asks for the lease without success
    ([*START, ASKS_2, WAITS_2, FAILS_2, SERVES], True, [], []),
    ([*START, FULL, SERVES], True, [], [outage(3, 4, "the disk is full")]),
    ([*START, FULL, FULL, DUMP], True, [], [outage(3, 5, "the disk is full"), outage(5, None, "no dump")]),
    ([*START, FULL, STOPS, TOLD], False, [outage(4, None, "stopped by SIGTERM")], [outage(3, 4, "the disk is full")]),
    ([STOPS, FULL, *START], True, [], []),
])
def test_outages(records, serving, outages, troubles):
    found = events.account({**record, "time": when + 0.5} for when, record in enumerate(records))

    assert found == {"since": 0 if records else None, "serving": serving, "outages": outages, "troubles": troubles}


def test_records_are_read_as_they_were_written(tmp_path):
    (tmp_path / "log").mkdir()
    records = [{**each, "time": 7.5} for each in (SERVES, said("ended", "a\nb \u2028 \x85 \udc80 Ω"))]

    assert events.read(str(tmp_path)) == []
    for record in records:
        events.append(str(tmp_path), record)
    assert events.read(str(tmp_path)) == records
    assert len((tmp_path / "log" / "events.jsonl").read_bytes().splitlines()) == 2


def test_line_that_is_cut_off_costs_no_other(tmp_path):
    (tmp_path / "log").mkdir()
    first, last = {**SERVES, "time": 1.0}, {**TOLD, "time": 2.0}
    events.append(str(tmp_path), first)
    with open(tmp_path / "log" / "events.jsonl", "ab") as stream:
        stream.write(b'{"time": 1.5, "sta')

    events.append(str(tmp_path), last)

    assert events.read(str(tmp_path)) == [first, last]


def test_file_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "MOST_BYTES", 300)
    (tmp_path / "log").mkdir()
    for number in range(40):
        events.append(str(tmp_path), {**SERVES, "time": float(number)})

    left = [record["time"] for record in events.read(str(tmp_path))]

    assert left == sorted(left) and left[-1] == 39.0 and 2 <= len(left) < 12
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) < 1000
