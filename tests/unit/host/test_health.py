# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Health reports problems, and the watching thread ends with the main loop."""

import errno
import os
import threading

import pytest
from hpc_db_host.health import SPARE_BYTES, Repeat, space


@pytest.mark.parametrize("number, says", [
    (errno.ENOSPC, "disk full: "), (errno.EDQUOT, "quota exceeded: "), (errno.EIO, "Input/output error: "),
])
def test_space_that_cannot_be_had_is_named(number, says, tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)

    assert space(str(tmp_path / "17")) == f"{says}{tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_space_that_was_taken_is_given_back(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: taken.append(os.fstat(descriptor).st_size))

    assert space(str(tmp_path / "17")) == ""
    assert taken == [SPARE_BYTES]
    assert list(tmp_path.iterdir()) == []


def test_work_is_repeated_until_the_block_ends():
    turns = threading.Semaphore(0)

    def work():
        turns.release()
        return 0.001

    before = threading.active_count()
    with Repeat(0.0, work):
        assert all(turns.acquire(timeout=5) for _turn in range(3))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon:
            thread.join(5)
    assert threading.active_count() <= before
