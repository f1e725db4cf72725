# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the hosting program's log tells of outages."""

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.server_log_info import account, read_lines

ASKS, STARTS, SERVES = ("starting", "asking for the lease"), ("starting", "postgres is starting"), ("serving", "ok")
STOPS, NEAR, TOLD = ("stopping", "postgres is stopping"), ("stopping", "the walltime is near"), ("ended", "told to")
START = [ASKS, STARTS, SERVES]
FULL, DUMP = ("unhealthy", "the disk is full"), ("unhealthy", "no dump")


def outage(began, ended, reason="", certain=True):
    return {"began": began, "ended": ended, "certain": certain, "reason": reason}


@pytest.mark.parametrize("said, serving, outages, troubles", [
    ([], False, [], []),
    ([ASKS, STARTS, ("failed", "no")], False, [], []),
    (START, True, [], []),
    ([*START, STOPS, TOLD], False, [outage(3, None, "told to")], []),
    ([*START, STOPS, TOLD, *START], True, [outage(3, 7, "told to")], []),
    ([*START, NEAR, STOPS, TOLD, *START], True, [outage(4, 8, "the walltime is near")], []),
    # killed: of the end nothing is known but that it comes after the last line
    ([*START, *START], True, [outage(3, 5, certain=False)], []),
    ([*START, STOPS, ("starting", "postgres starts again, as it ended by itself"), STARTS, SERVES], True,
     [outage(3, 6, "it ended by itself")], []),
    # another job that asks for the lease, in vain
    ([*START, ASKS, ("starting", "waiting: it is held"), ("failed", "held by job 1"), SERVES], True, [], []),
    ([*START, FULL, SERVES], True, [], [outage(3, 4, "the disk is full")]),
    ([*START, FULL, FULL, DUMP], True, [], [outage(3, 5, "the disk is full"), outage(5, None, "no dump")]),
    ([*START, FULL, STOPS, TOLD], False, [outage(4, None, "told to")], [outage(3, 4, "the disk is full")]),
    ([STOPS, FULL, *START], True, [], []),
])
def test_outages(said, serving, outages, troubles):
    found = account((when, *line) for when, line in enumerate(said))

    assert found == {"since": 0 if said else None, "serving": serving, "outages": outages, "troubles": troubles}


def test_lines_of_others_do_not_count(tmp_path):
    (tmp_path / "log").write_bytes(
        b"\xff Welcome to c1\n2026-11-23T04:10:30+0100 serving: it accepts writes: all\n2026-11-23 LOG: started: x\n"
        b"2026-11-23T03:10:31+0000 ended: told to\nserving: no"
    )

    assert list(read_lines(str(tmp_path / "log"))) == [
        (1795403430, "serving", "it accepts writes: all"), (1795403431, "ended", "told to"),
    ]
    assert list(read_lines(str(tmp_path / "none"))) == []


@pytest.mark.parametrize("end", ["\r", "\v", "\x85", "\u2028"], ids=ascii)
def test_a_line_ends_with_a_line_break_only(end, tmp_path):
    line = "2026-11-20T10:00:00+0000 serving: ok"
    (tmp_path / "job.log").write_bytes(f"{line}\nsomebody says x{end}{line.replace('serving', 'ended')}\n".encode())

    assert [state for _when, state, _reason in read_lines(str(tmp_path / "job.log"))] == ["serving"]
