# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""control_folder, with home directories of any length, on real folders."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.lookup.control_folder import LONGEST, short_folder

LONG = "/home/" + 100 * "x"


@pytest.fixture
def parent() -> Iterator[Path]:
    """A folder with a short path that everyone may write to, like /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def runtime(parent: Path) -> Path:
    folder = parent / "runtime"
    folder.mkdir(mode=0o700)
    return folder


def test_a_folder_that_is_short_enough_is_kept(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/" + (LONGEST - len("/.ansible/cp") - 1) * "x")
    assert short_folder("~/.ansible/cp", "", str(parent)) == "~/.ansible/cp"

    monkeypatch.setenv("HOME", "/" + (LONGEST - len("/.ansible/cp")) * "x")
    assert short_folder("~/.ansible/cp", "", str(parent)) == str(parent / f"hpc_db-cp-{os.geteuid()}")


def test_another_is_the_users_alone(parent: Path, runtime: Path) -> None:
    for where, expected in ((str(runtime), runtime), ("", parent), (f"{parent}/missing", parent)):
        folder = Path(short_folder(LONG, where, str(parent)))

        assert folder.parent == expected
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert short_folder(LONG, where, str(parent)) == str(folder)  # the next time, too


def test_a_long_runtime_folder_is_not_taken(parent: Path) -> None:
    runtime = parent / (80 * "x")
    runtime.mkdir(mode=0o700)

    assert Path(short_folder(LONG, str(runtime), str(parent))).parent == parent


def test_a_folder_that_others_can_enter_is_refused(parent: Path) -> None:
    Path(short_folder(LONG, "", str(parent))).chmod(0o711)

    with pytest.raises(OSError, match="is not this user's alone"):
        short_folder(LONG, "", str(parent))


def test_a_link_is_refused(parent: Path, runtime: Path) -> None:
    (parent / f"hpc_db-cp-{os.geteuid()}").symlink_to(runtime)

    with pytest.raises(OSError, match="is not this user's alone"):
        short_folder(LONG, "", str(parent))


def test_what_is_somebody_elses_is_refused(parent: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)

    with pytest.raises(OSError, match="is not this user's alone"):
        short_folder(LONG, str(runtime), str(parent))
    assert not list(runtime.iterdir())
