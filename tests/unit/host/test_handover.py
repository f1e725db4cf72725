# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A successor asks for the lease, its predecessor answers, and neither relies on a job that has died."""

import os
import time

import pytest
from hpc_db_host import files, handover
from hpc_db_host.handover import FRESH_SECONDS, Predecessor, Refused, Successor, check_ready
from hpc_db_host.layout import Layout
from hpc_db_host.postgres import Failed

HOLDER = {"job": "7"}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def sleep(self, seconds):
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "run").mkdir()
    return Layout(str(tmp_path))


def ask(successor, clock, times=1, **request):
    for _time in range(times):
        clock.now += 1.0
        successor.ask(HOLDER, **request)


def test_successor_is_heard_while_it_asks(layout, clock):
    predecessor, successor = Predecessor(layout, "7"), Successor(layout, "8")
    assert predecessor.poll() is None

    ask(successor, clock)
    assert predecessor.poll() is None  # this request may be an old one, of a job that has died
    ask(successor, clock)
    request = predecessor.poll()

    assert (request["job"], request["refusal"]) == ("8", "")
    clock.now += FRESH_SECONDS - 1
    assert predecessor.poll()
    clock.now += 2
    assert predecessor.poll() is None


def test_request_that_was_left_behind_is_not_heard(layout, clock):
    Successor(layout, "8").ask(HOLDER)
    predecessor = Predecessor(layout, "7")
    Successor(layout, "8").ask(HOLDER)

    for _second in range(60):
        clock.now += 1
        assert predecessor.poll() is None


def test_request_to_another_job_is_not_heard(layout, clock):
    predecessor, successor = Predecessor(layout, "6"), Successor(layout, "8")

    ask(successor, clock, times=5)

    assert predecessor.poll() is None


def test_refusal_of_a_successor_is_heard_at_once(layout, clock):
    predecessor = Predecessor(layout, "7")

    Successor(layout, "8").ask(HOLDER, "disk full")

    assert predecessor.poll()["refusal"] == "disk full"
    clock.now += FRESH_SECONDS + 1
    assert predecessor.poll() is None


def test_refusal_reaches_the_successor_that_asked_and_no_other(layout, clock):
    predecessor, successor, other = Predecessor(layout, "7"), Successor(layout, "8"), Successor(layout, "9")
    ask(successor, clock)
    predecessor.poll()
    ask(successor, clock)

    predecessor.answer(predecessor.poll(), "refused", "job 7 hands over at its end")

    with pytest.raises(Refused, match="^job 7 hands over at its end$"):
        ask(successor, clock)
    ask(other, clock, times=2)


def test_dead_successor_is_told_from_a_live_one(layout, clock, monkeypatch):
    predecessor, successor = Predecessor(layout, "7"), Successor(layout, "8")
    ask(successor, clock)
    predecessor.poll()
    ask(successor, clock)
    request = predecessor.poll()
    ask(successor, clock, times=3)  # while the predecessor makes a dump
    real = clock.sleep

    def sleep_and_ask(seconds):
        real(seconds)
        successor.ask(HOLDER)

    monkeypatch.setattr(time, "sleep", sleep_and_ask)
    assert predecessor.still_asks(request)
    monkeypatch.setattr(time, "sleep", real)
    assert not predecessor.still_asks(request)
    assert predecessor.poll() is None


def test_successor_knows_that_it_is_accepted_and_the_predecessor_that_the_lease_is_taken(layout, clock):
    predecessor, successor, other = Predecessor(layout, "7"), Successor(layout, "8"), Successor(layout, "9")
    ask(successor, clock, times=2)
    request = files.read_json(layout.request)
    assert not successor.is_accepted

    predecessor.answer(request, "accepted")
    ask(other, clock)
    ask(successor, clock)

    assert successor.is_accepted and not other.is_accepted
    assert not predecessor.is_taken(request)
    other.tell_taken()
    assert not predecessor.is_taken(request)
    successor.tell_taken()
    assert predecessor.is_taken(request)


def test_requests_are_written_into_the_files_that_are_there(layout, clock):
    """Other hosts may know these files by their inodes, and their sizes, for a minute."""
    predecessor, successor = Predecessor(layout, "7"), Successor(layout, "8")
    before = [(os.stat(path).st_ino, os.stat(path).st_size) for path in (layout.request, layout.answer)]

    ask(successor, clock, times=2)
    predecessor.answer(files.read_json(layout.request), "accepted")
    successor.tell_taken()

    assert before == [(os.stat(path).st_ino, os.stat(path).st_size) for path in (layout.request, layout.answer)]


@pytest.fixture
def instance(layout, tmp_path, monkeypatch):
    for folder in ("conf", "data/global"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("conf/postgresql.conf", "conf/pg_hba.conf", "conf/server.crt", "conf/server.key",
                 "data/global/pg_control"):
        (tmp_path / path).write_text("x")
    monkeypatch.setattr(handover, "check_programs", lambda _settings: None)
    monkeypatch.setattr(handover, "shared_memory", lambda *_given: 400)
    monkeypatch.setattr(handover, "free_memory", lambda: 528)
    return {
        "root": str(tmp_path), "data": str(tmp_path / "data"), "config": str(tmp_path / "conf/postgresql.conf"),
        "service": {"sslmode": "require"}, "bindir": "/bin",
    }


def test_node_that_can_serve_is_ready(instance, tmp_path):
    before = sorted(tmp_path.rglob("*"))

    check_ready(instance)

    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", [
    "data/global/pg_control", "conf/postgresql.conf", "conf/pg_hba.conf", "conf/server.crt", "conf/server.key",
])
def test_node_without_a_file_is_not_ready(missing, instance, tmp_path):
    (tmp_path / missing).unlink()

    with pytest.raises(FileNotFoundError, match=missing):
        check_ready(instance)


def test_certificate_is_not_needed_without_tls(instance, tmp_path):
    (tmp_path / "conf/server.key").unlink()

    check_ready({**instance, "service": {}})


def test_node_with_too_little_memory_is_not_ready(instance, monkeypatch):
    monkeypatch.setattr(handover, "free_memory", lambda: 527)

    with pytest.raises(Failed, match="^PostgreSQL needs 528 MB of memory, but 527 MB are free$"):
        check_ready(instance)


def test_node_with_a_full_disk_is_not_ready(instance, monkeypatch):
    monkeypatch.setattr(handover, "space", lambda _data: "quota exceeded: /x")

    with pytest.raises(Failed, match="^quota exceeded: /x$"):
        check_ready(instance)


@pytest.mark.parametrize("printed, megabytes", [("128MB", 128), ("16384", 128), ("1GB", 1024), ("", 0)])
def test_shared_memory_is_what_postgres_says(printed, megabytes, tmp_path):
    (tmp_path / "postgres").write_text(f"#!/bin/sh\necho {printed}\n")
    (tmp_path / "postgres").chmod(0o755)

    assert handover.shared_memory({"bindir": str(tmp_path), "data": "/d", "config": "/c"}) == megabytes


def test_free_memory_of_this_machine_is_known():
    free = handover.free_memory()

    assert free is not None and free > 0
