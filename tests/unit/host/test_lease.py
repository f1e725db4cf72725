# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease never has two owners, and can always be acquired in the end."""

import errno
import json
import os
import subprocess
import time

import pytest
from hpc_db_host import files, processes
from hpc_db_host.lease import Held, Lease, Lost

TTL = 90.0
# Two processes at a time compete for a lease whose last holder has released it or was killed; prints who gets it.
CONTEST = """
import os, signal, sys
from hpc_db_host.lease import Held, Lease

def contend(release):
    lease = Lease(sys.argv[1], {"host": "c1", "pid": os.getpid(), "job": "1", "kind": "slurm"}, lambda holder: True)
    try:
        won = lease.try_acquire()
    except Held:
        won = False
    if won and release:
        os.write(report, b"+")
        os.read(go_on, 1)
        lease.release()
        os._exit(0)
    os.write(report, b"+" if won else b"-")
    os.read(go_on, 1)
    os.kill(os.getpid(), signal.SIGKILL)

for turn in range(int(sys.argv[2])):
    (reports, report), (go_on, go) = os.pipe(), os.pipe()
    children = []
    for _turn in range(2):
        child = os.fork()
        if not child:
            contend(release=turn % 2)
        children.append(child)
    said = os.read(reports, 1) + os.read(reports, 1)
    print(said.decode())
    os.write(go, b"..")
    for child in children:
        os.waitpid(child, 0)
    for descriptor in (reports, report, go_on, go):
        os.close(descriptor)
"""


@pytest.fixture
def clock():
    """A monotonic clock that only the test moves; ``clock.wall`` is the value of time.time()."""

    class Clock:
        now = 5.0
        wall = 1_800_000_000.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def contender(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(time, "time", lambda: clock.wall)

    def contender(place="c1", pid=None, ended=True):
        monkeypatch.setattr(processes, "this_host", lambda: place)
        holder = {"host": place, "pid": pid or os.getpid(), "job": "4711", "kind": "slurm"}
        return Lease(str(tmp_path), holder, lambda holder: ended, TTL, clock)

    return contender


def may_take(lease):
    try:
        return lease.try_acquire()
    except Held:
        return False


def test_two_contenders_never_both_win(start, tmp_path):
    said = start(CONTEST, tmp_path, 100).communicate(timeout=300)[0].split()  # each round waits for the disk

    assert len(said) == 100
    assert {"".join(sorted(turn)) for turn in said} == {"+-"}
    assert files.read_json(str(tmp_path / "lease.100"))


def test_refusal_names_the_holder(contender):
    assert contender().try_acquire()

    with pytest.raises(Held, match=rf"held by job 4711 on c1 \(PID {os.getpid()}\) since 2027-01-15 08:00:00 UTC"):
        contender().acquire(patience=0, waiting=print)


def test_released_lease_is_free_anywhere(contender):
    first = contender("c1")
    first.try_acquire()
    assert first.holder()["host"] == "c1"
    first.release()

    assert first.holder() is None
    assert contender("c2", ended=False).try_acquire()


@pytest.mark.parametrize("end", ["killed", "PID used again"])
def test_holder_that_is_dead_on_this_host_is_replaced_at_once(end, contender, tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        assert contender(pid=process.pid).try_acquire()
        assert not may_take(contender())
        if end == "PID used again":
            record = json.loads((tmp_path / "lease.1").read_text())
            (tmp_path / "lease.1").write_text(json.dumps({**record, "start": "1"}))
        else:
            process.kill()
            process.wait()

        assert may_take(contender(ended=False))
        process.kill()


@pytest.mark.parametrize("wall", [-1e9, 0, 1e9])
@pytest.mark.parametrize("ended, moves, seconds, free", [
    (True, False, TTL + 1, True),
    (True, False, TTL - 1, False),
    (True, True, TTL + 1, False),
    (False, False, 100 * TTL, False),
])
def test_holder_on_another_host_is_replaced_only_if_ended_and_still(
    ended, moves, seconds, free, wall, contender, clock
):
    holder = contender("c1")
    holder.try_acquire()
    waiting = contender("c2", ended=ended)
    assert not may_take(waiting)

    clock.now += seconds
    clock.wall += wall
    if moves:
        holder.renew()

    assert may_take(waiting) is free


@pytest.mark.parametrize("its, mine, seconds, free", [
    ("boot1 pid:[1]", "boot2 pid:[1]", 5 * TTL - 1, False),
    ("boot1 pid:[1]", "boot2 pid:[1]", 5 * TTL + 1, True),
    ("boot1 pid:[1]", "boot1 pid:[2]", 5 * TTL - 1, False),  # a container on the holder's own host
])
@pytest.mark.parametrize("host", ["c2", "c1"])
def test_holder_that_wants_a_longer_silence_gets_it_unless_its_host_was_booted_since(
    its, mine, seconds, free, host, contender, clock, tmp_path
):
    contender(its).try_acquire()
    record = json.loads((tmp_path / "lease.1").read_text())
    (tmp_path / "lease.1").write_text(json.dumps({**record, "host": "c1", "silence": 5 * TTL}))
    waiting = contender(mine)
    waiting._holder["host"] = host
    may_take(waiting)
    clock.now += seconds

    rebooted = host == "c1" and its.split()[0] != mine.split()[0]
    assert may_take(waiting) is (free or rebooted)


def test_glance_sees_each_lease_that_may_be_free(contender, clock):
    waiting = contender("c3")
    assert waiting.may_be_free()  # there is none
    holder = contender("c1")
    holder.try_acquire()
    waiting.may_be_free()
    for _beat in range(8):
        assert not waiting.may_be_free()
        clock.now += TTL / 6
        holder.renew_if_due()

    holder.release()
    assert waiting.may_be_free()
    assert may_take(contender("c2"))  # it was faster
    waiting.may_be_free()
    assert not waiting.may_be_free() and waiting.watched()["host"] == "c2"
    clock.now += TTL - 1
    assert not waiting.may_be_free()
    clock.now += 2
    assert waiting.may_be_free() and may_take(waiting)


def test_glance_at_the_lease_of_a_dead_process_on_this_host(contender):
    with subprocess.Popen(["sleep", "60"]) as process:
        assert contender(pid=process.pid).try_acquire()
        waiting = contender()
        waiting.may_be_free()
        assert not waiting.may_be_free()
        process.kill()
        process.wait()

        assert waiting.may_be_free() and may_take(waiting)


def test_contender_with_a_shorter_ttl_does_not_give_the_holder_up_early(contender, clock):
    holder = contender("c1")
    holder.try_acquire()
    hasty = contender("c2")
    hasty.ttl = TTL / 9
    may_take(hasty)
    clock.now += TTL - 1

    assert not may_take(hasty)
    clock.now += 2
    assert may_take(hasty)


def test_scheduler_is_not_asked_while_the_heart_beats(contender, clock):
    def ask(holder):
        raise AssertionError("asked")

    holder = contender("c1")
    holder.try_acquire()
    waiting = contender("c2")
    waiting._ended = ask

    for _turn in range(20):
        clock.now += TTL / 6
        holder.renew_if_due()
        assert not may_take(waiting)


def test_heart_that_beats_again_during_the_question_keeps_the_lease(contender, clock):
    holder = contender("c1")
    holder.try_acquire()
    waiting = contender("c2")
    waiting._ended = lambda _holder: holder.renew() is None
    assert not may_take(waiting)
    clock.now += 2 * TTL

    assert not may_take(waiting)


def test_renewal_after_a_takeover_is_refused(contender, clock):
    holder = contender("c1")
    holder.try_acquire()
    taker = contender("c2")
    may_take(taker)
    clock.now += TTL + 1
    assert holder.is_ours()
    assert may_take(taker)

    assert not holder.is_ours()
    with pytest.raises(Lost, match="taken by job 4711 on c2"):
        holder.renew_if_due()
    taker.renew()


@pytest.mark.parametrize("seconds, lost", [(TTL / 6 + 1, False), (TTL / 2 - 1, False), (TTL / 2 + 1, True)])
def test_silent_file_system_is_borne_as_long_as_nobody_may_take_over(seconds, lost, contender, clock, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    holder = contender()
    holder.try_acquire()
    monkeypatch.setattr(holder, "_write_beat", refuse)
    clock.now += seconds

    if lost:
        with pytest.raises(Lost, match="not renewed for 46 s: .*Read-only"):
            holder.renew_if_due()
    else:
        holder.renew_if_due()


@pytest.mark.parametrize("content", ["", "{", '{"host": "c1", "pi', "[]", "null", "{}"])
def test_lease_that_cannot_be_read_is_nobody_s_to_take(content, contender, clock, tmp_path):
    (tmp_path / "lease.3").write_text(content)
    waiting = contender(ended=False)

    for _turn in range(3):
        clock.now += TTL
        with pytest.raises(Held, match="an unknown holder, whose lease file cannot be read"):
            waiting.try_acquire()


def test_contender_that_slept_for_epochs_wins_none(contender, monkeypatch, tmp_path):
    first = contender()
    first.try_acquire()
    first.release()
    sleeper = contender()
    real_link = os.link

    def sleep_then_link(*names):
        monkeypatch.setattr(os, "link", real_link)
        for _turn in range(4):
            last = contender()
            assert last.try_acquire()
            last.release()
        winner.append(contender())
        assert winner[0].try_acquire()
        real_link(*names)

    winner: list[Lease] = []
    monkeypatch.setattr(os, "link", sleep_then_link)

    assert sleeper.try_acquire() is False
    assert (tmp_path / "lease.2").exists()  # the old epoch could still have been taken
    assert not sleeper.is_ours()
    winner[0].renew()


def test_contenders_with_equal_pids_on_two_hosts_do_not_both_win(contender, monkeypatch):
    real_link = os.link
    won = []

    def link_second(*names):
        monkeypatch.setattr(os, "link", real_link)
        won.append(may_take(contender("c2")))
        real_link(*names)

    monkeypatch.setattr(os, "link", link_second)
    won.append(may_take(contender("c1")))

    assert won == [True, False]


def test_link_that_was_made_but_reported_as_failed_counts(contender, monkeypatch):
    real_link = os.link

    def link(*names):
        real_link(*names)
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)

    assert contender().try_acquire()


def test_only_the_last_epochs_leave_files(contender, tmp_path):
    for _turn in range(5):
        lease = contender()
        lease.try_acquire()
        lease.release()

    assert sorted(os.listdir(tmp_path)) == ["hb.4", "hb.5", "lease.4", "lease.5", "released.4", "released.5"]


def test_holder_that_wakes_up_while_it_is_replaced_keeps_the_lease(contender, clock, monkeypatch, tmp_path):
    holder, waiting = contender("c1"), contender("c2")
    holder.try_acquire()
    may_take(waiting)
    clock.now += TTL + 1
    real_link = os.link

    def wake_then_link(*names):
        holder.renew()
        real_link(*names)

    monkeypatch.setattr(os, "link", wake_then_link)

    assert waiting.try_acquire() is False
    holder.renew()
    assert sorted(os.listdir(tmp_path)) == ["hb.1", "lease.1"]


def test_leftovers_of_killed_contenders_go(contender, tmp_path):
    for name, age in (("contender.old", 7200), (".contender.old.x", 7200), (".hb.1.x", 7200), ("contender.new", 0)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (time.time() - age, os.stat(tmp_path / name).st_mtime - age))

    assert contender().try_acquire()

    assert sorted(os.listdir(tmp_path)) == ["contender.new", "hb.1", "lease.1"]
