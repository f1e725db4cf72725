# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``fake_conda.py`` does with ``--file LOCK``.

What it assumes of an explicit list, which conda and mamba read alike (conda's enhancement proposal on text spec input
files; ``url_pat`` in conda's ``misc.py``; ``from_url`` of mamba's ``package_info.cpp``):

- Nothing is solved, and no channel is asked: each package is fetched by its URL.
- What follows ``#`` is a checksum: 32 digits are an md5, ``sha256:`` begins the other. A package that has another one
  is refused before anything is installed, by conda as ``ChecksumMismatchError``, by mamba in words (its
  ``package_download.cpp`` and ``transaction.cpp``).
- A package is described by what is inside it.
- Packages that the list does not name stay.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Callable

import rattler


async def install_explicit(
    name: str, file: str, prefix: Path, installed: list, cache: Path, fail: Callable[..., Any]
) -> list:
    """Install the list; return its packages."""
    lines = Path(file).read_text().splitlines()
    assert "@EXPLICIT" in lines
    records = []
    for line in lines:
        if not line or line[0] in "#@":
            continue
        url, _hash, tag = line.partition("#")
        archive = Path(url.replace("file://", ""))
        if not archive.exists():
            fail(name, "CondaHTTPError", f"failed to fetch {url}")
        kind, wanted = ("sha256", tag[7:]) if tag.startswith("sha256:") else ("md5", tag)
        if hashlib.new(kind, archive.read_bytes()).hexdigest() != wanted:
            if name == "conda":
                words = f"Conda detected a mismatch between the {kind} of {url} and {wanted}"
                fail(name, "ChecksumMismatchError", words)
            words = f"File not valid: {kind.upper()} sum doesn't match expectation ({archive})"
            fail(name, "", f"{words}\nFound incorrect downloads. Aborting")
        records.append(await rattler.RepoDataRecord.from_package_archive(archive))
    named = {record.name.normalized for record in records}
    kept = [record for record in installed if record.name.normalized not in named]
    await rattler.install([*kept, *records], target_prefix=prefix, cache_dir=cache, show_progress=False)
    return records
