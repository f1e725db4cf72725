# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read and write small files that other hosts may read at the same time."""

import contextlib
import json
import os
import sys
import tempfile
import time
from typing import Optional, Union

# Minimum size of a state file, so that a longer state can replace it without more disk space.
STATE_BYTES = 2048
# Seconds to wait for a file that is being rewritten.
HALF_SECONDS = 0.05


def printable(text: str) -> str:
    r"""Return the text in one line, with escapes such as ``\x1b`` for control and other non-printable characters."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def write_atomically(path: str, content: Union[str, bytes], mode: int = 0o600) -> None:
    """Replace ``path`` by rename, so that a reader sees either the old content or the new one."""
    # Write a text unchanged: no conversion of line ends, no encoding errors from the shell's locale.
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    folder = os.path.dirname(path)
    descriptor, aside = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, mode)
        os.rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it would hide the first one, which may be Stop
            remove(aside)
        raise


def overwrite(path: str, text: str) -> None:
    """Write ``text`` over the beginning of an existing file, which needs no inode and no additional space."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode("utf-8"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, content: dict) -> None:
    """Write ``content`` as JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_state(path: str, content: dict) -> None:
    """Write ``content`` as JSON into the existing file, whose length never shrinks; create the file if it is missing.

    A host that caches names, sizes and the absence of files sees the new content at its next open, and a full disk has
    space for it. A reader may see half of a change, which is not valid JSON.
    """
    text = json.dumps(content, indent=2, sort_keys=True)
    try:
        overwrite(path, text.ljust(max(STATE_BYTES, os.path.getsize(path)) - 1) + "\n")
    except FileNotFoundError:
        write_atomically(path, text.ljust(STATE_BYTES - 1) + "\n")


def read_json(path: str) -> Optional[dict]:
    """Return the JSON object in ``path``; None if the file is missing or unreadable, or holds none."""
    for attempt in (1, 2):
        try:
            with open(path) as stream:
                content = json.load(stream)
            return content if isinstance(content, dict) else None
        except OSError:
            return None
        except ValueError:
            time.sleep(HALF_SECONDS if attempt == 1 else 0.0)  # it may just be rewritten
    return None


def sync(folder: str) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    """Remove ``path`` if it exists."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def log(line: str) -> None:
    """Write one line to the job's log, with non-printable characters escaped.

    Errors such as a full disk are ignored: they must not stop the server, or prevent a stop.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()
