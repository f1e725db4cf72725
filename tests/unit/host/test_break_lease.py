# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lease whose holder only the user can know to have ended."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import hpc_db_host
import pytest
from ansible_collections.mala.hpc_db.plugins.modules.broken_lease import Refused, ensure_broken
from hpc_db_host import processes
from hpc_db_host.lease import Held, Lease, Lost


@pytest.fixture
def root(tmp_path):
    for folder in ("run", "host"):
        (tmp_path / folder).mkdir()
    settings = {"lease_ttl": 1, "cluster": "the-new-name"}
    (tmp_path / "host" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "host" / "hpc_db_host").symlink_to(Path(hpc_db_host.__file__).parent)
    return tmp_path


def lease_of(root, monkeypatch, place, **more):
    with monkeypatch.context() as patch:
        patch.setattr(processes, "this_host", lambda: place)
        holder = {"host": place, "pid": os.getpid(), "job": "4711", "kind": "slurm", "cluster": "the-old-name", **more}
        return Lease(str(root / "run"), holder, lambda _holder: False, 1)


@pytest.fixture
def holder(root, monkeypatch):
    lease = lease_of(root, monkeypatch, "c1")
    assert lease.try_acquire()
    return lease


def run(root):
    def run(command):
        done = subprocess.run(command, cwd=root / "host", capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def broken(root, check_mode=False):
    return ensure_broken({"root": str(root)}, run(root), check_mode)


def test_lease_of_a_holder_that_shows_no_life_is_free_and_the_holder_is_fenced(root, holder, monkeypatch):
    looked = broken(root, check_mode=True)
    assert looked["changed"] and looked["holder"].startswith("job 4711 on c1 (PID ") and 0 <= looked["still"] < 60
    with pytest.raises(Held):
        lease_of(root, monkeypatch, "c2").try_acquire()

    assert broken(root)["holder"] == looked["holder"]

    with pytest.raises(Lost):
        holder.renew()
    assert lease_of(root, monkeypatch, "c2").try_acquire()


def test_holder_that_wants_a_longer_silence_is_watched_for_longer(root, monkeypatch):
    assert lease_of(root, monkeypatch, "login1", silence=3).try_acquire()

    began = time.monotonic()
    assert broken(root)["changed"]

    assert time.monotonic() - began > 3
    assert lease_of(root, monkeypatch, "c2").try_acquire()


def test_lease_that_is_renewed_stays(root, holder):
    over = threading.Event()

    def renew():
        while not over.wait(0.1):
            holder.renew()

    beating = threading.Thread(target=renew)
    beating.start()
    try:
        with pytest.raises(Refused, match=r"by job 4711 on c1 .*: the holder renewed .*, so the lease is kept$"):
            broken(root)
    finally:
        over.set()
        beating.join()

    assert holder.is_ours()


def test_lease_of_a_process_on_this_host_stays(root):
    here = Lease(str(root / "run"), {"host": "me", "pid": os.getpid(), "job": "1"}, lambda _holder: True, 1)
    assert here.try_acquire()

    with pytest.raises(Refused, match="so the lease is kept$"):
        broken(root)

    assert here.is_ours()


@pytest.mark.parametrize("left", [{}, {"lease.3": "{}", "released.3": ""}])
def test_nothing_is_changed_where_nobody_holds_it(left, root):
    for name, content in left.items():
        (root / "run" / name).write_text(content)

    for check_mode in (True, False):
        assert broken(root, check_mode) == {"changed": False, "holder": None, "still": None, "watch": None}
    assert sorted(os.listdir(root / "run")) == sorted(left)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_lease_that_cannot_be_read_is_the_user_s_to_break(content, root):
    (root / "run" / "lease.7").write_text(content)

    assert broken(root)["holder"] == "an unknown holder, whose lease file cannot be read"

    assert (root / "run" / "released.8").exists()


def test_instance_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="host/settings.json is missing; run the playbook hpc_db.yml first"):
        broken(tmp_path)


def test_program_says_what_it_can_do():
    done = subprocess.run(
        [sys.executable, "-m", "hpc_db_host.break_lease", "--help"], capture_output=True, text=True, check=True,
        cwd=Path(hpc_db_host.__file__).parents[1],
    )
    assert "release the lease if there is none" in done.stdout
