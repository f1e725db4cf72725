# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease on file systems that are full, have no inodes left, or have no hard links."""

import contextlib
import errno
import itertools
import json
import os
import subprocess
import time

import pytest
from hpc_db_host import files, processes
from hpc_db_host.lease import Held, Lease, Unusable

TTL = 60.0
REFUSALS = ["EPERM", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def contender(tmp_path, monkeypatch, clock):
    """Acquire the lease from one host or another; every scheduler reports every holder as ended."""

    def contender(place="c1", folder=tmp_path):
        monkeypatch.setattr(processes, "this_host", lambda: place)
        holder = {"host": place, "pid": os.getpid(), "job": "4711", "kind": "slurm"}
        return Lease(str(folder), holder, lambda _holder: True, TTL, clock)

    return contender


@pytest.fixture
def small(tmp_path):
    """Mount a file system with little space or few inodes; return its folder."""
    if os.geteuid():
        pytest.skip("needs root, to make a small file system")
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(folder)], check=True)
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, what):
    """Use up all space, or all inodes."""
    with contextlib.suppress(OSError):
        for number in itertools.count():
            with open(folder / f"film{number}", "wb", buffering=0) as film:
                film.write(b"x" * (1024 * (what == "space")))
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(str(folder / "more"), "more")


def alive(clock, holder, others):
    """Return whether a holder keeps its lease for several TTLs against a contender that may take it."""
    for _turn in range(30):
        clock.now += TTL / 5
        holder.renew_if_due()
        with pytest.raises(Held):
            others.try_acquire()
    return holder.is_ours()


@pytest.mark.parametrize("options, what", [("size=64k", "space"), ("size=1m,nr_inodes=20", "inodes")])
def test_lease_is_kept_and_released_with_nothing_left(options, what, small, clock, contender):
    folder = small(options)
    holder = contender(folder=folder)
    assert holder.try_acquire()
    fill(folder, what)
    other = contender("c2", folder)

    assert alive(clock, holder, other)

    holder.release()
    assert holder.holder() is None
    with pytest.raises(OSError, match="No space left"):  # taking the lease requires writing
        other.try_acquire()
    (folder / "film0").unlink()
    (folder / "film1").unlink()
    (folder / "film2").unlink()
    assert other.try_acquire()


def test_lease_is_kept_where_even_overwriting_is_refused(clock, contender, monkeypatch):
    """Like ZFS over quota: existing files may be touched and removed, nothing more."""

    def refuse(*_arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    holder, other = contender(), contender("c2")
    holder.try_acquire()
    monkeypatch.setattr(files, "write_atomically", refuse)
    monkeypatch.setattr(os, "write", refuse)
    times = itertools.count(1_800_000_000)
    monkeypatch.setattr(os, "utime", lambda path, real=os.utime: real(path, (next(times),) * 2))

    assert alive(clock, holder, other)


def test_half_a_heartbeat_is_one(clock, contender, tmp_path):
    holder, other = contender(), contender("c2")
    holder.try_acquire()
    for torn in ("7\n", "", "8", "77777777777777777777", b"\xff\xfe"):
        clock.now += TTL / 2 + 1
        (tmp_path / "hb.1").write_bytes(torn.encode() if isinstance(torn, str) else torn)

        with pytest.raises(Held):
            other.try_acquire()


def test_acquisition_that_cannot_beat_leaves_the_lease_free(contender, monkeypatch):
    def full(path, *_arguments):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        lease = contender()
        patch.setattr(lease, "_write_beat", lambda: full("hb.1"))
        with pytest.raises(OSError, match=r"No space left on device: 'hb\.1'"):
            lease.acquire(0, print)

    assert contender("c2").try_acquire()


@pytest.mark.parametrize("number", REFUSALS)
def test_file_system_without_hard_links_is_named_at_once(number, contender, monkeypatch, tmp_path):
    def refuse(*_names):
        raise OSError(getattr(errno, number), "not here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "run").mkdir()

    with pytest.raises(Unusable) as refused:
        contender(folder=tmp_path / "run").acquire(3600, print)

    assert str(refused.value) == (
        f"instance_root: {tmp_path} is on a file system without hard links (not here); choose a folder on another one"
    )
    assert os.listdir(tmp_path / "run") == []


def test_file_system_that_does_not_count_links_is_named(contender, monkeypatch, tmp_path):
    def copy(source, target):
        with open(source) as reads, open(target, "x") as writes:
            writes.write(reads.read())

    monkeypatch.setattr(os, "link", copy)

    with pytest.raises(Unusable, match="instance_root: .* without hard links; choose"):
        contender().acquire(3600, print)

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number, raised", [("EEXIST", Held), ("EIO", OSError), ("ESTALE", OSError)])
def test_patience_is_counted_whatever_is_in_the_way(number, raised, clock, contender, monkeypatch):
    def refuse(*_names):
        raise OSError(getattr(errno, number), "so")

    def pause(seconds):
        clock.now += seconds

    told = []
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(time, "sleep", pause)

    with pytest.raises(raised):
        contender().acquire(5, told.append)

    assert clock.now == 5 and len(told) == 5


@pytest.mark.parametrize("before", [100, 5000])
def test_state_is_told_into_the_space_that_it_has(before, tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_state(str(path), {"reason": "x" * before})

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    files.write_state(str(path), {"reason": "no space"})

    assert json.loads(path.read_text()) == {"reason": "no space"}
