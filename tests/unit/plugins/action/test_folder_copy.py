# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""folder_copy with a program that prints like rsync; the real one is in tests/integration/test_tensorboard.py."""

import json
import os
import re
import subprocess
import sys

import pytest
from ansible_collections.mala.hpc_db.plugins.action import folder_copy
from ansible_collections.mala.hpc_db.plugins.action.folder_copy import CopyFailed, Transfer, check_rsync, copy

STATS = """
Number of created files: {files} (reg: {files})
Number of regular files transferred: {files}
Total transferred file size: 300,000,000 bytes
"""
PRINT = "import sys; [(sys.stdout.write(part), sys.stdout.flush()) for part in sys.argv[1:]]"


class Clock:
    """Each reading advances it by some seconds."""

    def __init__(self, seconds):
        self.now, self.seconds = 0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


def rsync(*printed, code=PRINT):
    return [sys.executable, "-I", "-S", "-c", code, *printed]


def test_says_how_far_it_is_and_what_came():
    lines = []
    parts = ["     30,000,000  10%   30.00MB/s    0:00:08 \r", "    150,000,000  5", "0%   31.00MB/s    0:00:05 \r"]

    transfer = copy(rsync(*parts, STATS.format(files=3)), lines.append, Clock(10))

    assert transfer == Transfer(3, 300_000_000, True)
    # Progress that arrives at once is printed in one line.
    assert lines[0] in ("30.0 MB, 10 %, 30.00MB/s", "150.0 MB, 50 %, 31.00MB/s")
    assert lines[-2] == "150.0 MB, 50 %, 31.00MB/s"
    assert re.fullmatch(r"3 files, 300.0 MB in [0-9]+ s", lines[-1])


@pytest.mark.parametrize("arguments, files", [([], 0), (["--dry-run"], 3)])
def test_is_silent_if_nothing_comes(arguments, files):
    lines = []

    transfer = copy(rsync(STATS.format(files=files), *arguments), lines.append)

    assert (transfer.changed, lines) == (bool(files), [])


FAILURES = [
    (23, "a\nb\nc\nd", "^rsync ended with 23: b; c; d$"), (30, "", "^rsync ended with 30: it said nothing$"),
    (127, "", "no rsync on the cluster: have the package rsync installed there, or mount"),
    (12, "bash: line 1: rsync: command not found\nrsync: connection unexpectedly closed", "no rsync on the cluster"),
]


@pytest.mark.parametrize("code, complaints, message", FAILURES)
def test_failure_is_one_line(code, complaints, message):
    fail = f"import sys; sys.stderr.write({complaints!r}); sys.exit({code})"

    with pytest.raises(CopyFailed, match=message):
        copy(rsync(code=fail), print)


def test_file_that_has_vanished_is_no_failure():
    text = STATS.format(files=1)

    assert copy(rsync(code=f"import sys; print({text!r}); sys.exit(24)"), print).files == 1


def test_settings_of_the_users_shell_do_not_count(monkeypatch):
    monkeypatch.setenv("RSYNC_PARTIAL_DIR", "/tmp")
    ask = f"import os; print({STATS.format(files=0)!r} if 'RSYNC_PARTIAL_DIR' not in os.environ else '')"

    assert copy(rsync(code=ask), print).files == 0


@pytest.mark.parametrize("said, message", [
    (None, "there is no rsync on this machine: install the package rsync, or mount the folder instead"),
    ("rsync version 2.6.9 compatible", "rsync on this machine is 2.6, but 3.1 or newer is needed: install"),
])
def test_rsync_that_does_not_do(said, message, monkeypatch, tmp_path):
    if said:
        (tmp_path / "rsync").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(CopyFailed, match=f"^{message}"):
        check_rsync()


@pytest.mark.parametrize("change, message", [
    ({"src": "logs"}, "be: src: 'logs' is not absolute; give a path that begins with /"),
    ({}, "be: ansible_connection: local brings no folder; allowed is ssh"),
])
def test_in_a_playbook(change, message, tmp_path):
    (tmp_path / "rsync").write_text("#!/bin/sh\necho 'rsync  version 3.2.7  protocol version 31'\n")
    (tmp_path / "rsync").chmod(0o755)
    arguments = {"src": "/home/alice/logs", "dest": str(tmp_path / "logs"), "label": "be", **change}
    (tmp_path / "play.yml").write_text(json.dumps([{
        "hosts": "localhost", "gather_facts": False, "tasks": [{"mala.hpc_db.folder_copy": arguments}],
    }]))
    environment = {
        **os.environ, "ANSIBLE_COLLECTIONS_PATH": folder_copy.__file__.partition("/ansible_collections/")[0],
        "ANSIBLE_NOCOLOR": "1", "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    play = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", "-c", "local", "play.yml"]

    done = subprocess.run(play, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert message in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "logs").exists()
