# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process is which."""

import os
import subprocess

import pytest
from hpc_db_host import processes

NAMED = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, b"a) Z \\xff", 0, 0, 0)
print(flush=True)
time.sleep(60)
"""
# A postmaster: its children have sessions of their own, and it starts the next one when one has died.
RESTLESS = """
import os, sys, time
from hpc_db_host import processes
def child():
    if not os.fork():
        os.setsid()
        time.sleep(60)
        os._exit(0)
parent = os.fork()
if not parent:
    os.chdir(sys.argv[1])
    for _turn in range(5):
        child()
    while True:
        os.wait()
        child()
while len(processes.below(os.getpid())) < 6:
    time.sleep(0.01)
processes.kill_below(os.getpid())
os.waitpid(parent, 0)
"""


@pytest.fixture
def sleeper(tmp_path):
    process = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    yield process
    process.kill()
    process.wait()


def test_start_time_stays_and_ends_with_the_process(sleeper):
    started = processes.start_time(sleeper.pid)

    assert started and started == processes.start_time(sleeper.pid)
    assert started != processes.start_time(1)

    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{sleeper.pid}")  # a zombie, which has ended
    assert processes.start_time(sleeper.pid) is None

    sleeper.wait()
    assert processes.start_time(sleeper.pid) is None


def test_process_may_call_itself_anything(start):
    process = start(NAMED)
    process.stdout.readline()

    assert processes.start_time(process.pid)


def test_place_is_the_same_for_every_process_here(start):
    said = start("from hpc_db_host import processes; print(processes.this_host())").communicate(timeout=20)[0]

    assert said.strip() == processes.this_host()


@pytest.mark.parametrize("program, folder, expected", [
    ("sleep", ".", True), ("sleep", "link", True), ("sleep", "other", False), ("sleep", "missing", False),
    ("postgres", ".", False),
])
def test_program_is_told_by_name_and_folder(program, folder, expected, sleeper, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)

    assert processes.runs_in(sleeper.pid, program, str(tmp_path / folder)) is expected


def test_dead_process_runs_nowhere(sleeper, tmp_path):
    sleeper.kill()
    sleeper.wait()

    assert processes.runs_in(sleeper.pid, "sleep", str(tmp_path)) is False


def test_nothing_below_a_process_is_left_or_started_meanwhile(start, tmp_path):
    for _turn in range(5):
        process = start(RESTLESS, tmp_path)

        assert process.wait(30) == 0
        here = [pid for pid in os.listdir("/proc") if pid.isdigit() and works_in(pid, tmp_path)]
        assert [pid for pid in here if processes.start_time(int(pid))] == []


def works_in(pid, folder):
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(folder)
    except OSError:
        return False


def test_every_process_of_a_program_in_a_folder_is_found(sleeper, tmp_path):
    words = ["sleep", "60"]
    with subprocess.Popen(words, cwd="/") as elsewhere, subprocess.Popen(words, cwd=tmp_path) as other:
        assert sorted(processes.all_in("sleep", str(tmp_path))) == sorted([sleeper.pid, other.pid])
        elsewhere.kill()
        other.kill()
