# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The identity of processes and machines."""

import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from hpc_db_host import processes

NAMED = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, b"a) Z \\xff", 0, 0, 0)
print(flush=True)
time.sleep(60)
"""
# A postmaster: its children have sessions of their own, and it replaces a child that has died.
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
    assert os.path.exists(f"/proc/{sleeper.pid}")  # a zombie, which counts as ended
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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Describe a machine by files like those of /etc and /sys; return the words that identify it."""

    def machine(system, **cards):
        shutil.rmtree(tmp_path / "sys", ignore_errors=True)
        (tmp_path / "machine-id").write_text(system)
        for name, (kind, address) in cards.items():
            device = tmp_path / "sys" / "devices" / ("usb1" if kind == "usb" else "pci0") / name
            device.mkdir(parents=True)
            (device / "address").write_text(address + "\n")
            (device / "addr_assign_type").write_text("3\n" if kind == "set" else "0\n")
            if kind != "virtual":
                (device / "device").mkdir()
            net = tmp_path / "sys" / "net"
            net.mkdir(exist_ok=True)
            (net / name).symlink_to(device)
        monkeypatch.setattr(processes, "MACHINE_ID", str(tmp_path / "machine-id"))
        monkeypatch.setattr(processes, "NETWORK_CARDS", ((str(tmp_path / "sys" / "net" / "*"), "address"),))
        return set(processes.this_machine())

    return machine


ID, OTHER_ID = "3d1219c7c4c5404aaa1f6d2a48adfda4\n", 32 * "0" + "\n"
CARD, WIRELESS, OTHER_CARD = ("pci", "52:54:00:00:00:01"), ("pci", "52:54:00:00:00:02"), ("pci", "52:54:00:00:00:03")


def test_machine_is_known_by_its_id_and_a_card(machine):
    before = machine(ID, eth0=CARD, wlan0=WIRELESS, lo=("virtual", "00:00:00:00:00:00"))

    assert len(before) == 2 and not any(ID.strip() in word or CARD[1] in word for word in before)
    assert before & machine(ID, enp0s1=CARD)
    assert before & machine(ID, wlan0=WIRELESS, dock=("usb", OTHER_CARD[1]))


@pytest.mark.parametrize("system, cards", [
    (ID, {"eth0": OTHER_CARD}),  # another node that boots the same image
    (OTHER_ID, {"eth0": CARD}),
    (ID, {"eth0": ("virtual", CARD[1])}),
    (ID, {"eth0": ("usb", CARD[1])}),
    (ID, {"eth0": ("set", CARD[1])}),
])
def test_other_machine_is_never_taken_for_this_one(system, cards, machine):
    assert not machine(ID, eth0=CARD) & machine(system, **cards)


@pytest.mark.parametrize("system, cards", [
    ("", {"eth0": CARD}), ("uninitialized\n", {"eth0": CARD}), (ID, {}), (ID, {"eth0": ("pci", "00:00:00:00:00:00")}),
])
def test_machine_that_cannot_be_known_has_no_name(system, cards, machine):
    assert machine(system, **cards) == set()


def test_start_time_on_macos(monkeypatch):
    said = {"7": b"Mon Nov 23 03:30:01 2026    \n"}

    def run(command, **_options):
        assert command[:-1] == ["ps", "-o", "lstart=", "-p"]
        return SimpleNamespace(stdout=said.get(command[-1], b""))

    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    monkeypatch.setattr(processes.subprocess, "run", run)

    assert processes.start_time(7) == "Mon Nov 23 03:30:01 2026"
    assert processes.start_time(8) is None
