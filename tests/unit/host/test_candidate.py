# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The places of active candidates, and the door of a job's candidate."""

import json
import os
import subprocess
import threading
import time

import pytest
from hpc_db_host import candidate, files
from hpc_db_host.candidate import Candidate, Door, Left, Over, Places
from hpc_db_host.layout import Layout
from hpc_db_host.settings import complete

TTL = 90.0
HERE = {"job": "11", "host": "c1", "ends": None, "unfit": ""}


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, which only the test moves; the file server's is an hour ahead."""

    class Clock:
        now = 5.0

        def move(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0 + clock.now)
    real = files.write_state

    def write_state(path, content):
        real(path, content)
        os.utime(path, (0, 1_800_003_600.0 + clock.now))

    monkeypatch.setattr(files, "write_state", write_state)
    return clock


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "run").mkdir()
    return Layout(str(tmp_path))


def in_place(layout, number):
    return (files.read_json(layout.place(number)) or {}).get("job", "")


def test_each_candidate_takes_a_free_place(layout, clock):
    some = [Places(layout, 2, TTL) for _each in range(3)]

    taken = [each.take(dict(HERE, job=str(number)), True) for number, each in enumerate(some)]

    assert taken == [True, True, False]
    assert [each.mine for each in some] == [1, 2, 0]
    assert (in_place(layout, 1), in_place(layout, 2)) == ("0", "1")
    assert [each["job"] for each in some[0].others()] == ["1"]


def test_place_that_was_left_is_free(layout, clock):
    first, other = Places(layout, 1, TTL), Places(layout, 1, TTL)
    assert first.take(HERE, True) and not other.take(HERE)

    first.leave()

    assert first.mine == 0 and other.take(HERE)


def test_place_is_free_once_its_candidate_has_not_renewed_it_for_the_lease_timeout(layout, clock):
    """All measured by the file server's clock."""
    dead, live, other = (Places(layout, 2, TTL) for _each in range(3))
    assert dead.take(HERE, True) and live.take(HERE, True)
    for _turn in range(5):
        clock.move(TTL / 6)
        assert live.renew(HERE)
        assert not other.take(HERE) and not other.take(HERE)

    clock.move(TTL / 6 + 1)
    assert live.renew(HERE)

    other.take(HERE)
    assert other.take(HERE) or other.mine
    assert (other.mine, live.renew(HERE)) == (1, True)


def test_of_two_candidates_in_one_place_the_last_one_stays(layout, clock):
    one, other = Places(layout, 1, TTL), Places(layout, 1, TTL)
    one.mine = other.mine = 1
    assert one.renew(dict(HERE, job="1"), True) and other.renew(dict(HERE, job="2"), True)

    clock.move(2)

    assert not one.renew(dict(HERE, job="1"))
    assert other.renew(dict(HERE, job="2"))
    assert (one.mine, in_place(layout, 1)) == (0, "2")


def test_first_place_counts_only_live_candidates(layout, clock):
    first, second = Places(layout, 2, TTL), Places(layout, 2, TTL)
    assert first.take(HERE, True) and second.take(HERE, True)
    assert first.is_first() and not second.is_first()

    first.leave()

    assert second.is_first()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "11"}'])
def test_place_that_is_being_written_is_not_free_and_an_invalid_one_is(layout, clock, text):
    with open(layout.place(1), "w") as stream:
        stream.write(text)
    os.utime(layout.place(1), (0, 1_800_003_600.0 + clock.now))

    assert Places(layout, 1, TTL).take(HERE) == (text in ("[]", '{"job": "11"}'))


def make(layout, job="11", **changes):
    settings = complete({"root": layout.root, "scheduler": "slurm", "lease_ttl": TTL, "stop_notice": 60, **changes})
    os.makedirs(layout.host, exist_ok=True)
    with open(layout.settings, "w") as stream:
        json.dump(settings, stream)
    return Candidate(settings, job)


def test_serving_candidate_leaves_if_the_server_is_not_wanted(layout, clock):
    made = make(layout)
    files.write_state(layout.wanted, {"wanted": True})
    assert made.check()

    files.write_state(layout.wanted, {"wanted": False})

    assert not made.check()  # it looks every two seconds
    clock.move(3)
    with pytest.raises(Left, match="stopped by the playbook stop.yml") as left:
        made.check()
    assert not left.value.planned


@pytest.mark.parametrize("other, leaves", [
    ({}, True),
    ({"ends": 1_800_000_000.0 + 7200}, True),
    ({"ends": 1_800_000_000.0 + 80}, False),
    ({"unfit": "no programs"}, False),
    ({"unfit": None}, False),  # not known yet
    ({"job": "11"}, False),
])
def test_serving_candidate_leaves_near_the_end_of_its_job_to_a_better_one(layout, clock, other, leaves):
    made = make(layout)
    made._ends = 1_800_000_000.0 + clock.now + 50
    files.write_state(layout.wanted, {"wanted": True})
    Places(layout, 3, TTL).take({**HERE, "job": "12", **other}, True)

    if leaves:
        with pytest.raises(Left, match="the walltime of job 11 ends soon") as left:
            made.check()
        assert left.value.planned
    else:
        assert made.check()


def test_candidate_ends_with_the_process_beside_it(layout, monkeypatch):
    settings = complete({"root": layout.root, "scheduler": "local"})
    starts = iter(["1", "1", None])
    monkeypatch.setattr(candidate.processes, "start_time", lambda pid: next(starts))
    made = Candidate(settings, "5", beside=7)

    made._check_worker()

    with pytest.raises(Over, match="the worker has ended"):
        made._check_worker()


def test_door_is_opened_by_one_candidate_of_a_job(tmp_path):
    first, second, other = (Door(str(tmp_path), job) for job in ("11", "11", "12"))

    assert first.open() and other.open()
    assert not second.open()
    assert not first.wait(0)


def test_knock_returns_when_the_candidate_has_ended(tmp_path):
    door = Door(str(tmp_path), "11")
    assert door.open()
    ended = []

    def knock():
        ended.append(Door(str(tmp_path), "11").knock(10))

    visitor = threading.Thread(target=knock)
    visitor.start()
    assert door.wait(10)
    assert door.wait(0) and not ended  # it is remembered

    del door  # its process ends
    visitor.join(10)

    assert ended == [True]


def test_knock_at_a_door_that_stays_shut(tmp_path):
    assert Door(str(tmp_path), "11").knock(10)  # there is no candidate
    door = Door(str(tmp_path), "11")
    assert door.open()

    assert not Door(str(tmp_path), "11").knock(0.1)


def test_place_that_stays_half_written_is_free(layout, clock):
    with open(layout.place(1), "w") as stream:
        stream.write("{")
    os.utime(layout.place(1), (0, 1_800_003_600.0 + clock.now - TTL - 1))

    assert Places(layout, 1, TTL).take(HERE)


def test_places_of_dead_candidates_are_free_at_the_first_look(layout, clock):
    assert Places(layout, 1, TTL).take(HERE, True)
    clock.move(TTL + 1)

    assert Places(layout, 1, TTL).take(HERE)


def test_file_that_cannot_be_read_does_not_stop_the_server(layout, clock):
    made = make(layout)
    files.write_state(layout.wanted, {"wanted": True})
    assert made.check()

    with open(layout.wanted, "w") as stream:
        stream.write("{")
    clock.move(3)

    assert made.check()


def test_candidate_beside_a_script_that_has_ended_already_is_over(layout):
    with subprocess.Popen(["true"]) as process:
        pass

    with pytest.raises(Over):
        Candidate(complete({"root": layout.root, "scheduler": "local"}), "5", process.pid)._check_worker()


@pytest.mark.parametrize("wanted, failures, may", [
    (None, None, False), ({}, [], False), ({"wanted": False}, [], False), ({"wanted": True}, None, True),
    ({"wanted": True}, ["1", "2"], True), ({"wanted": True}, ["1", "2", "3"], False),
])
def test_server_may_be_started_unless_it_was_stopped_or_has_failed_in_three_jobs(layout, wanted, failures, may):
    if wanted is not None:
        files.write_state(layout.wanted, wanted)
    if failures is not None:
        files.write_state(layout.state, {"failures": failures})

    assert candidate.may_start(layout) == may
