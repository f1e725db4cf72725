# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calling rsync, and reading what it prints."""

from __future__ import annotations

import re
from typing import NamedTuple

# The first that tells the progress of a whole transfer.
OLDEST = (3, 1)
# Seconds without a byte after which the connection counts as lost.
SILENCE = 60
# Files that vanished in between are no failure: jobs go on meanwhile.
VANISHED = 24

_PROGRESS = re.compile(r"\s*([\d,.]+)\s+(\d{1,3})%\s+(\S+/s)\s")


class Progress(NamedTuple):
    """How far a transfer has come."""

    done: int  # bytes
    percent: int
    speed: str


class Transfer(NamedTuple):
    """What a transfer has brought, or would bring."""

    files: int
    size: int  # bytes
    changed: bool  # a folder may be all that is new


def version_command() -> list[str]:
    """Return the call that tells the version."""
    return ["rsync", "--version"]


def parse_version(stdout: str) -> tuple[int, int]:
    """Return major and minor version; that of openrsync is the one it is compatible with."""
    found = re.search(r"rsync\s+version\s+v?(\d+)\.(\d+)", stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def pull_command(ssh: list[str], host: str, source: str, target: str, dry_run: bool) -> list[str]:
    """Return the call that brings the content of the folder ``source`` of ``host`` into the folder ``target``.

    ``ssh`` is the call of ssh without a host. Raise ValueError for a host that could be an option or a path.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*", host):
        raise ValueError(f"ansible_host: {host!r} is no host; allowed are letters, digits, '.', '_', '-', ':' and '%'")
    return [
        "rsync",
        "--recursive", "--times",
        # Links within the folder stay links; what others lead to is copied, since it is not here.
        "--links", "--copy-unsafe-links",
        "--inplace",  # a file that is being read here gets longer, instead of becoming another one
        "-s",  # no shell over there sees the path
        "--no-inc-recursive", "--info=progress2", "--stats",  # how much it is in all is known from the start
        f"--timeout={SILENCE}",
        *(["--dry-run"] if dry_run else []),
        f"--rsh={' '.join(map(quote, ssh))}",
        "--",
        f"{f'[{host}]' if ':' in host else host}:{source.rstrip('/')}/",
        f"{target.rstrip('/')}/",
    ]


def quote(word: str) -> str:
    """Return a word of the remote shell's call as rsync reads it: it knows quotes, but no escapes."""
    return "'" + word.replace("'", "''") + "'" if not word or re.search(r"[ '\"]", word) else word


def parse_progress(line: str) -> Progress | None:
    """Read a line of --info=progress2, such as `` 1,234,567  45%   30.00MB/s    0:00:08 (xfr#3, to-chk=5/10)``."""
    found = _PROGRESS.match(line)
    return Progress(_number(found[1]), int(found[2]), found[3]) if found else None


def parse_stats(stdout: str) -> Transfer:
    """Read what --stats prints at the end; raise ValueError if there is nothing."""

    def value(title: str) -> int:
        found = re.search(rf"^{title}: ([\d,.]+)", stdout, re.MULTILINE)
        if not found:
            raise ValueError(f"rsync has not told the {title.lower()}")
        return _number(found[1])

    files = value("Number of regular files transferred")
    return Transfer(files, value("Total transferred file size"), files + value("Number of created files") > 0)


def _number(text: str) -> int:
    """Read a number with separators of thousands."""
    return int(re.sub(r"\D", "", text))
