# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The file beside a folder that is being filled: it says what is being done there, and only one run at a time holds it.

A program that fills the folder keeps the file open as well. When the run that started it is killed, the next one waits
for that program, instead of working against it.
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
    """Hold the file, after any other run that does; remove it in the end if it is empty.

    The lock ends with its last holder, whichever way that ends; what the file says stays then. Raise TimeoutError,
    with ``setting`` to begin with, when another run still holds it after ``patience`` seconds. ``params`` are the
    module's, which may wait in slices.
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
    """Return the open file, or None while another run holds it."""
    note = marker.open("a+", encoding="utf-8")
    with suppress(OSError):  # a file system may have no locks
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
    """Tell whether the open file is still there: another run may have ended just now, and removed or renamed it."""
    try:
        return os.path.samestat(os.fstat(note.fileno()), os.stat(marker))
    except FileNotFoundError:
        return False


def rewrite(note: TextIO, text: str) -> None:
    """Have the file say this, and nothing else."""
    note.seek(0)
    note.truncate()
    note.write(text)
    note.flush()
