# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small files that other hosts read while this one writes them."""

import contextlib
import json
import os
import sys
import tempfile
from typing import Optional

# A state takes this much at least, so that a longer one can replace it without more space.
STATE_BYTES = 2048


def printable(text: str) -> str:
    r"""Return the text in one line, with ``\x1b`` and the like for what a terminal would obey or not show."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def write_atomically(path: str, text: str, mode: int = 0o600) -> None:
    """Replace ``path`` by rename, so that a reader sees the old text or the new one, never a part."""
    folder = os.path.dirname(path)
    descriptor, aside = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=folder)
    try:
        # As it is: no line ends of another system changed, no byte refused for the shell's locale.
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, mode)
        os.rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # else it would replace what has happened, which may be the wish to stop
            remove(aside)
        raise


def overwrite(path: str, text: str) -> None:
    """Write ``text`` over the beginning of a file that is there: takes no inode, and no space that it does not have."""
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
    """Write ``content`` as JSON; on a full disk into the space that the file has already, so that it can be told."""
    text = json.dumps(content, indent=2, sort_keys=True).ljust(STATE_BYTES) + "\n"
    try:
        write_atomically(path, text)
    except OSError:
        overwrite(path, text.rstrip().ljust(os.path.getsize(path) - 1) + "\n")


def read_json(path: str) -> Optional[dict]:
    """Return the JSON object in ``path``; None if there is none, or none that can be read."""
    try:
        with open(path) as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def sync(folder: str) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    """Remove ``path`` if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def log(line: str) -> None:
    """Write one line to the job's log, whatever others have put into it.

    A log on a full disk is no reason to stop, nor to go on.
    """
    with contextlib.suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)
