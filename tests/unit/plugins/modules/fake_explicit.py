# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``fake_conda.py`` does with ``--file LOCK``.

What it assumes of an explicit list, compared with conda 26.7.1, and for mamba known from its sources only
(``from_url`` of ``package_info.cpp``, ``package_download.cpp`` and ``transaction.cpp``):

- Nothing is solved, and no channel is asked: each package is fetched by its URL.
- conda prints nothing at all when it has installed the list.
- What follows ``#`` is a checksum: 32 digits are an md5, ``sha256:`` begins the other. conda does not look at it for
  ``file://``, which alone is played here; mamba refuses a package that has another one, in words.
- conda names each package that is not there by its path only.
- A package is described by what is inside it.
- Packages that the list does not name stay.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Callable

import rattler


async def read_explicit(name: str, file: str, fail: Callable[..., Any], fail_for: Callable[..., Any]) -> list:
    """Return the packages of the list."""
    lines = Path(file).read_text().splitlines()
    assert "@EXPLICIT" in lines
    locked = [line.partition("#") for line in lines if line and line[0] not in "#@"]
    archives = [Path(url.replace("file://", "")) for url, _hash, _tag in locked]
    absent = [archive for archive in archives if not archive.exists()]
    if absent and name == "conda":
        fail_for(name, [("PathNotFoundError", str(archive)) for archive in (*absent, absent[0])])
    for archive, (url, _hash, tag) in zip(archives, locked):
        if absent:
            fail(name, "", f"failed to fetch {url}")
        kind, wanted = ("sha256", tag[7:]) if tag.startswith("sha256:") else ("md5", tag)
        if name != "conda" and hashlib.new(kind, archive.read_bytes()).hexdigest() != wanted:
            words = f"File not valid: {kind.upper()} sum doesn't match expectation ({archive})"
            fail(name, "", f"{words}\nFound incorrect downloads. Aborting")
    return [await rattler.RepoDataRecord.from_package_archive(archive) for archive in archives]
