# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of ``fake_conda.py`` for ``--file LOCK``.

Its assumptions about an explicit list, compared with conda 26.7.1, and for mamba known from its sources only
(``from_url`` of ``package_info.cpp``, ``package_download.cpp`` and ``transaction.cpp``):

- Nothing is solved, and no channel is queried: each package is fetched by its URL.
- conda prints nothing at all after installing the list.
- The text after ``#`` is a checksum: 32 digits are an md5, ``sha256:`` begins the other. conda ignores it for
``file://``, the only kind played here; mamba refuses a package with a different checksum, in plain text.
- conda names each missing package by its path only.
- A package is described by its own content.
- Packages that are not in the list stay installed.
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
