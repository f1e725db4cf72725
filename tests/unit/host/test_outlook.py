# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The expected outage is announced with its reason and, if known, its length."""

import time

import pytest
from hpc_db_host.outlook import span, warning

NOW = 1790000000.0  # 2026-09-21 14:13:20 UTC
JOB = {"id": "7", "time_left": 3600}
LATE = {"id": "8", "late": "cannot start earlier (QOSMaxJobsPerUserLimit)", "expected": None}
OUTAGES = [{"began": 1, "ended": 61}, {"began": 100, "ended": 1300}, {"began": 2000, "ended": None}]


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_outage_is_announced_with_all_that_is_known():
    follows = dict(LATE, expected=NOW + 3600 + 23 * 60)

    assert warning(JOB, {"follows": follows}, lambda: OUTAGES, NOW) == (
        "from 2026-09-21 15:13 (end of job 7) until job 8 starts, which cannot start earlier "
        "(QOSMaxJobsPerUserLimit); the scheduler expects that at 2026-09-21 15:36, after 23 min; "
        "the last outages took 60 s, 20 min"
    )


def test_start_that_is_expected_before_the_end_and_clocks_that_differ_are_no_time():
    follows = dict(LATE, expected=NOW + 60)

    assert warning(JOB, {"follows": follows}, lambda: [{"began": 100, "ended": 98}], NOW).endswith(
        "(QOSMaxJobsPerUserLimit); the last outages took 0 s"
    )


def test_outage_of_unknown_length():
    assert warning(JOB, {"follows": LATE}, list, NOW) == (
        "from 2026-09-21 15:13 (end of job 7) until job 8 starts, which cannot start earlier "
        "(QOSMaxJobsPerUserLimit)"
    )


@pytest.mark.parametrize("job, state", [
    (None, {"follows": LATE}), (dict(JOB, time_left=None), {"follows": LATE}), (JOB, None), (JOB, {"follows": None}),
    (JOB, {"follows": dict(LATE, late="")}), (JOB, {"follows": {"id": "", "told": "its job was submitted at 10:00"}}),
])
def test_nothing_is_announced_without_a_reason(job, state):
    assert warning(job, state, lambda: OUTAGES, NOW) == ""


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h"),
])
def test_duration_in_words(seconds, words):
    assert span(seconds) == words
