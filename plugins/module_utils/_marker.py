# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A marker file beside a folder that is being filled: it records the current step, and only one run at a time holds it.

A program that fills the folder also keeps the file open. If the run that started it is killed, the next run waits for
that program instead of working against it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Slice


@contextmanager
def alone_at(marker: Path, patience: int, setting: str, params: dict) -> Iterator[TextIO]:
    """Hold the file once no other run does; remove it at the end if it is empty.

    The lock ends with its last holder, even if that is killed; the file's content then remains. Raise TimeoutError,
    whose text begins with ``setting``, if another run still holds the file after ``patience`` seconds. ``params`` are
    the module's parameters, because the wait may be in slices.
    """
    slice_ = Slice(params)
    latest = slice_.began + patience
    note = _lock(marker)
    while note is None:
        if time.monotonic() > latest:
            raise TimeoutError(f"{setting}: after {patience} s another run still holds {marker}")
        slice_.check(f"another run holds {marker}, {patience} s are allowed")
        time.sleep(0.2)
        note = _lock(marker)
    with note:
        try:
            yield note
        finally:
            note.seek(0)
            if not note.read():
                marker.unlink()


def _lock(marker: Path) -> TextIO | None:
    """Return the open file; None while another run holds it."""
    note = marker.open("a+", encoding="utf-8")
    with suppress(OSError):  # a file system may not support locks
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note.close()
            return None
    if not _is_at(marker, note):
        note.close()
        return None
    note.seek(0)
    return note


def _is_at(marker: Path, note: TextIO) -> bool:
    """Return whether the path still is the open file: another run may have just removed or renamed it."""
    try:
        return os.path.samestat(os.fstat(note.fileno()), os.stat(marker))
    except FileNotFoundError:
        return False


def rewrite(note: TextIO, text: str) -> None:
    """Replace the file's content."""
    note.seek(0)
    note.truncate()
    note.write(text)
    note.flush()
