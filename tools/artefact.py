# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks of a built collection: its files, its version, and the links in its metadata.

artefact.py files|links|version ARCHIVE TREE [TAG...] prints one line per problem, and exits with 1 if there is any.
``TREE`` is the folder that the archive was built from; each ``TAG`` is a git tag of it.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

# Files for users of an installed collection. All others are excluded by build_ignore in galaxy.yml.
BELONGS = [
    "CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "FILES.json", "LICENSE", "LICENSES/*",
    "MANIFEST.json", "README.md", "REUSE.toml", "SECURITY.md", "changelogs/*", "client/*", "docs/*",
    "examples/*", "inventories/*", "meta/*", "playbooks/*", "plugins/*", "requirements/*", "requirements.yml",
    "roles/*", "tests/config.yml",
]
# Files that tools leave behind, in any folder.
LEFT_OVER = re.compile(r"(^|/)(\..*|__pycache__|.*\.(pyc|orig|rej|retry|swp|log)|.*\.egg-info|.*~)(/|$)")
MEGABYTES = 4
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
LINKS = ("repository", "documentation", "homepage", "issues")


def files(archive: Path, tree: Path, tags: list[str]) -> Iterator[str]:
    """Report files that do not belong in the archive, and an excessive size."""
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    for member in members:
        if LEFT_OVER.search(member.name):
            yield f"{member.name} is left over from something; remove it, or name it in build_ignore of galaxy.yml"
        elif member.isfile() and not any(fnmatch(member.name, pattern) for pattern in BELONGS):
            yield f"{member.name} does not belong into a release; name it in build_ignore of galaxy.yml, or in BELONGS"
    size = archive.stat().st_size
    if size > MEGABYTES << 20:
        largest = max(members, key=lambda member: member.size)
        yield f"it has {size >> 20} MB, more than {MEGABYTES}; the largest file is {largest.name}"


def version(archive: Path, tree: Path, tags: list[str]) -> Iterator[str]:
    """Report a version that is invalid, too low for the changelog, or differs from the tag or CITATION.cff."""
    text = str(described(archive)["version"])
    wanted = VERSION.fullmatch(text)
    if not wanted:
        yield f"version: {text!r} in galaxy.yml is not three numbers with two dots"
        return
    yield from (f"version: {text} in galaxy.yml, and the tag is {tag}" for tag in tags if tag != f"v{text}")
    cited = read(tree / "CITATION.cff").get("version")
    if cited != text:
        yield f"version: {text} in galaxy.yml, and {cited} in CITATION.cff"
    released = read(tree / "changelogs" / "changelog.yaml").get("releases", {})
    newest = max((tuple(map(int, name.split("."))) for name in released), default=(0, 0, 0))
    here = tuple(map(int, wanted.groups()))
    if here < newest:
        yield f"version: {text} in galaxy.yml is lower than {'.'.join(map(str, newest))}, which the changelog has"
    fragments = sorted(path.name for path in (tree / "changelogs" / "fragments").glob("*.y*ml"))
    if here == newest and fragments:
        yield f"version: {text} is in the changelog, without {', '.join(fragments)}; raise it in galaxy.yml"


def links(archive: Path, tree: Path, tags: list[str]) -> Iterator[str]:
    """Report invalid links, and contradictions between files."""
    says = described(archive)
    for name in LINKS:
        if not re.fullmatch(r"https://[\w.-]+/\S+", says.get(name) or ""):
            yield f"{name}: {says.get(name)!r} in galaxy.yml is no https:// address"
    if not (tree / says["readme"]).is_file():
        yield f"readme: there is no {says['readme']!r}, which galaxy.yml names"
    for licence in says["license"]:
        if not (tree / "LICENSES" / f"{licence}.txt").is_file():
            yield f"license: there is no LICENSES/{licence}.txt, and galaxy.yml names {licence}"
    wanted = {each["name"]: each["version"] for each in read(tree / "requirements.yml")["collections"]}
    if wanted != says["dependencies"]:
        yield f"dependencies: {says['dependencies']} in galaxy.yml, {wanted} in requirements.yml"


def described(archive: Path) -> dict[str, Any]:
    """Return galaxy.yml's data as stored in the archive."""
    with tarfile.open(archive) as opened:
        manifest = opened.extractfile("MANIFEST.json")
        assert manifest
        return json.load(manifest)["collection_info"]


def read(path: Path) -> dict[str, Any]:
    """Return the contents of a YAML file; empty if it does not exist."""
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def main() -> None:
    """Print the problems found by one check."""
    check, archive, tree, *tags = sys.argv[1:]
    find = {"files": files, "links": links, "version": version}[check]
    complaints = list(find(Path(archive), Path(tree), tags))
    print(*complaints, sep="\n", end="\n" * bool(complaints))
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
