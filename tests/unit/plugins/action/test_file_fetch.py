# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""file_fetch and the start of rsync, over an ssh whose login shell prints text."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.action.folder_copy import after_mark

ROOT = Path(__file__).resolve().parents[4]
BANNER = "Welcome, quota 81 %"
# Like ssh with a command, on this machine: the last argument is run by a shell that has read .bashrc.
SSH = f"""#!/bin/sh
for command; do :; done
echo '{BANNER}'
exec sh -c "$command"
"""
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def ssh(tmp_path: Path) -> str:
    path = tmp_path / "ssh"
    path.write_text(SSH)
    path.chmod(0o755)
    return str(path)


def fetch(ssh: str, src: Path, dest: Path, method: str) -> str:
    host = "printing ansible_connection=ssh ansible_ssh_executable={} ansible_python_interpreter={}".format
    inventory = dest.parent / "hosts"
    inventory.write_text(f"{host(ssh, sys.executable)} ansible_ssh_transfer_method={method}\n")
    command = ["ansible", "printing", "-i", str(inventory), "-m", "mala.hpc_db.file_fetch", "-o"]
    done = subprocess.run(
        [*command, "-a", f"src={src} dest={dest}"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=120, check=False,
    )
    return done.stdout


def test_file_comes_as_it_is(ssh: str, tmp_path: Path) -> None:
    src, dest = tmp_path / "studies.dump", tmp_path / "here" / "studies.dump"
    src.write_bytes(CONTENT)
    dest.parent.mkdir()

    said = [fetch(ssh, src, dest, "piped") for _turn in range(2)]

    assert dest.read_bytes() == CONTENT
    assert stat.S_IMODE(dest.stat().st_mode) == 0o600
    assert [re.search(r"\| (\w+) =>", each)[1] for each in said] == ["CHANGED", "SUCCESS"]
    assert sorted(os.listdir(dest.parent)) == ["hosts", "studies.dump"]


def test_file_that_does_not_come_leaves_nothing(ssh: str, tmp_path: Path) -> None:
    dest = tmp_path / "here" / "studies.dump"
    dest.parent.mkdir()

    assert "FAILED" in fetch(ssh, tmp_path / "absent", dest, "piped")
    assert os.listdir(dest.parent) == ["hosts"]


def test_folder_in_its_place_is_named(ssh: str, tmp_path: Path) -> None:
    src, dest = tmp_path / "studies.dump", tmp_path / "here" / "studies.dump"
    src.write_bytes(CONTENT)
    dest.mkdir(parents=True)

    assert f"dest: {dest}: Is a directory" in fetch(ssh, src, dest, "piped")
    assert sorted(os.listdir(dest.parent)) == ["hosts", "studies.dump"]
    assert os.listdir(dest) == []


@pytest.mark.parametrize("banner", [":", f"echo '{BANNER}'", "head -c 200000 /dev/zero"])
def test_banner_is_dropped_and_nothing_else(banner: str) -> None:
    mark = "0f" * 16
    ssh = ["sh", "-c", f"{banner}; printf %s {mark}; exec tee /dev/fd/1"]

    done = subprocess.run(after_mark(mark, ssh), input=b"binary\xff\x00", capture_output=True, check=False)

    assert (done.returncode, done.stdout) == (0, b"binary\xff\x00" * 2), done.stderr


def test_reader_that_is_slow_loses_nothing() -> None:
    """rsync's end of the pipe is non-blocking."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ssh = ["sh", "-c", f"echo '{BANNER}'; printf mark; head -c 3000000 /dev/zero"]
    with ours, theirs, subprocess.Popen(after_mark("mark", ssh), stdout=theirs) as running:
        theirs.close()
        received = 0
        while some := len(ours.recv(1 << 20)):
            received += some
            time.sleep(0.001)
    assert (running.returncode, received) == (0, 3_000_000)


@pytest.mark.parametrize("script, code", [("exit 7", 7), ("echo banner; exit 127", 127), ("kill -9 $$", 137)])
def test_exit_code_is_that_of_ssh(script: str, code: int) -> None:
    done = subprocess.run(after_mark("mark", ["sh", "-c", script]), capture_output=True, check=False)

    assert (done.returncode, done.stdout) == (code, b"")
