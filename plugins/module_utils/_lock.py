# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lock files: conda's own explicit list of each package's URL and checksum, so that nothing has to be solved.

conda, mamba and micromamba install the same list with ``create --prefix PREFIX --file LOCK``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ansible_collections.mala.hpc_db.plugins.module_utils._conda import (
    CondaError,
    Package,
    Spec,
    allows_major,
    has_secret,
    verb_command,
)

HEADER = "# A lock file of conda's, for: conda create --prefix PREFIX --file THIS\n# platform: {platform}\n@EXPLICIT\n"

_LINE = re.compile(
    r"(?P<url>(?P<channel>(?:https?|file)://\S+)/(?P<subdir>[\w-]+)/"
    r"(?P<name>[a-z0-9_][a-z0-9_.-]*)-(?P<version>[^\s/#-]+)-(?P<build>[\w.+]+)(?:\.conda|\.tar\.bz2))"
    r"#(?:(?:sha256:)?(?P<sha256>[0-9a-f]{64})|(?P<md5>[0-9a-f]{32}))"
)
# Secrets that a client leaves in a URL: a user with a password, and a token in the path.
_SECRET = re.compile(r"(?<=://)[^/@]+@|/t/[^/]+(?=/)")
_PLATFORMS = {"x86_64": "64", "aarch64": "aarch64", "ppc64le": "ppc64le", "arm64": "arm64"}


class Locked(NamedTuple):
    """One package of a lock file. ``kind`` is the algorithm of ``sum``: sha256 or md5."""

    package: Package
    url: str
    channel: str
    kind: str
    sum: str


def platform_of(system: str, machine: str) -> str:
    """Return conda's name for a platform, such as ``linux-64``."""
    begin = {"Linux": "linux", "Darwin": "osx"}.get(system, system.lower())
    return f"{begin}-{_PLATFORMS.get(machine, machine)}"


def parse_lock(text: str, platform: str) -> list[Locked]:
    """Return the packages of a lock file for this platform; raise CondaError if the file is incomplete."""
    lines = [line.strip() for line in text.splitlines()]
    if "@EXPLICIT" not in lines:
        raise CondaError("lock: it has no line @EXPLICIT, so it is not a complete lock file")
    locked: dict[str, Locked] = {}
    for number, line in enumerate(lines, 1):
        if not line or line == "@EXPLICIT" or line.startswith("#"):
            continue
        if has_secret(line):
            raise CondaError(
                f"lock: line {number} contains a password or token; leave it out, and keep it where your client looks "
                "for it, such as ~/.netrc"
            )
        found = _LINE.fullmatch(line)
        if not found:
            raise CondaError(f"lock: line {number}, {line!r}, is damaged; allowed is a package's URL#sha256:CHECKSUM")
        if found["subdir"] not in (platform, "noarch"):
            raise CondaError(f"lock: line {number} is for {found['subdir']}, but this is {platform}")
        kind = "sha256" if found["sha256"] else "md5"
        package = Package(found["name"], found["version"], found["build"])
        if package.name in locked:
            raise CondaError(f"lock: line {number} names {package.name} a second time")
        locked[package.name] = Locked(package, found["url"], found["channel"], kind, found[kind])
    if not locked:
        raise CondaError("lock: it names no packages")
    return list(locked.values())


def check_specs(locked: list[Locked], specs: list[Spec]) -> None:
    """Raise CondaError unless the lock file has the specs' packages in a major version that they allow."""
    versions = {each.package.name: each.package.version for each in locked}
    for spec in specs:
        held = versions.get(spec.name)
        if held is None or not allows_major(spec, held):
            raise CondaError(
                f"lock: it has {f'{spec.name} {held}' if held else f'no {spec.name}'}, but {spec.text} is required"
            )


def check_sums(locked: list[Locked], records: Iterable[dict]) -> None:
    """Raise CondaError if a package with the same name and build is installed from different bytes."""
    wanted = {each.package: each for each in locked}
    for record in records:
        each = wanted.get(Package(record["name"], record["version"], record["build"]))
        if each and record.get(each.kind) not in (None, each.sum):
            raise CondaError(
                f"lock: {each.package.name} {each.package.version} {each.package.build} is installed with the "
                f"{each.kind} {record[each.kind]}, but locked with {each.sum}"
            )


def check_archives(locked: list[Locked]) -> None:
    """Raise CondaError if a package in a folder is not the locked one: conda verifies only downloaded packages."""
    for each in locked:
        url = urlsplit(each.url)
        if url.scheme == "file":
            try:
                found = hashlib.new(each.kind, Path(url2pathname(url.path)).read_bytes()).hexdigest()
            except OSError as error:
                raise CondaError(f"lock: cannot read {each.url}: {error.strerror}") from error
            except ValueError as error:  # under FIPS
                raise CondaError(f"lock: this system refuses {each.kind}, which {each.url} is locked with") from error
            if found != each.sum:
                raise CondaError(f"lock: {each.url} has the {each.kind} {found}, but {each.sum} is locked")


def lock_text(records: list[dict], platform: str) -> str:
    """Return an environment's lock file from its ``conda-meta``; raise CondaError if a URL or checksum is missing."""
    lines = []
    for record in _dependencies_first(records):
        url = _SECRET.sub("", record.get("url") or "")
        tag = f"sha256:{record['sha256']}" if record.get("sha256") else record.get("md5")
        if not (_LINE.fullmatch(f"{url}#{tag}") and url.isprintable()):
            raise CondaError(
                f"prefix: {record['name']} cannot be locked: its record in conda-meta has no URL or no checksum"
            )
        lines.append(f"{url}#{tag}\n")
    return HEADER.format(platform=platform) + "".join(lines)


def _dependencies_first(records: list[dict]) -> list[dict]:
    """Sort as conda does, because a client installs in the order of the list."""
    by_name = {record["name"]: record for record in records}
    done: dict[str, dict] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in done or name in above or name not in by_name:
            return
        for text in sorted(by_name[name].get("depends") or []):
            add(re.split(r"[\s=<>!]", text, maxsplit=1)[0], (*above, name))
        done[name] = by_name[name]

    for name in sorted(by_name):
        add(name, ())
    return list(done.values())


def install_command(client: str, create: bool, prefix: str, lock: str) -> list[str]:
    """Return the call of conda, mamba or micromamba for a lock file at the path ``lock``."""
    return [*verb_command(client, create), "-y", "-q", "--json", "-p", prefix, "--file", lock]


def install_request(locked: list[Locked], archives: str | None, only_keep: bool) -> dict:
    """Return a request to the rattler helper: it installs the packages, from the folder ``archives`` if one is given.

    With ``only_keep`` it stores them in that folder instead.
    """
    packages = [{"url": each.url, "channel": each.channel, "kind": each.kind, "sum": each.sum} for each in locked]
    return {"lock": packages, "into" if only_keep else "archives": archives}
