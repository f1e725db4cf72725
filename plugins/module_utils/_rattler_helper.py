# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Solve and install an environment with py-rattler: ``python -I -c SOURCE REQUEST``.

Runs on its own, in an interpreter that has rattler. Answers in one line, in the format of conda's JSON output.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ChecksumMismatchError(Exception):
    """A package differs from the lock file. The name is conda's."""


async def fulfil(request: dict) -> dict:
    import rattler

    metadata = Path(request["prefix"]) / "conda-meta"
    # The default client neither retries nor uses the user's credentials.
    client = rattler.networking.Client.authenticated_client()
    if request.get("into"):
        return await keep_archives(request, client)
    installed = [rattler.PrefixRecord.from_path(path) for path in sorted(metadata.glob("*.json"))]
    if request.get("lock"):
        return await reproduce(request, client, installed)
    host = request.get("host")
    solved = await rattler.solve(
        sources=request["channels"],
        specs=[rattler.MatchSpec(spec) for spec in request["specs"]],  # rattler itself parses strings more strictly
        locked_packages=installed,
        gateway=rattler.Gateway(client=client),
        platforms=[host["platform"], "noarch"] if host else None,
        virtual_packages=virtual_packages(host),
    )
    if not request["dry_run"]:
        await rattler.install(
            solved,
            target_prefix=request["prefix"],
            installed_packages=installed,
            show_progress=False,
            client=client,
            execute_link_scripts=False,
        )
        open_to_others(metadata)
    return success(installed, solved)


def virtual_packages(host: dict | None) -> list:
    """Return the properties of this or another host as packages such as ``__glibc``."""
    import rattler

    if not host:
        return rattler.VirtualPackage.detect(overrides=rattler.VirtualPackageOverrides.from_env())
    text = getattr(rattler, "BuildString", str)  # missing in older versions of rattler
    return [
        rattler.GenericVirtualPackage(rattler.PackageName(name), rattler.Version(version), text(build))
        for name, version, build in host["virtual"]
    ]


async def keep_archives(request: dict, client: Any) -> dict:
    """Ensure that a folder contains exactly the archives of a lock file's packages."""
    into = Path(request["into"])
    into.mkdir(parents=True, exist_ok=True)
    wanted = {into / name_of(package["url"]): package for package in request["lock"]}
    for archive in {*into.glob("*.conda"), *into.glob("*.tar.bz2")} - set(wanted):
        archive.unlink()
    with emptied(into.with_name(f"{into.name}.incoming")) as folder:
        for archive, package in wanted.items():
            if not archive.exists() or sum_of(archive, package["kind"]) != package["sum"]:
                shutil.copyfile(await fetch(package, client, folder), folder / "complete")
                os.replace(folder / "complete", archive)
    return success([], [])


async def reproduce(request: dict, client: Any, installed: list) -> dict:
    """Install exactly the packages of a lock file, after verifying each checksum."""
    import rattler

    with emptied(Path(request["prefix"] + ".packages")) as folder:
        archives = {
            package["url"]: await fetch(package, client, folder, request["archives"]) for package in request["lock"]
        }
        records = [record_of(package, archives[package["url"]], folder) for package in request["lock"]]
        rattler.PackageRecord.validate(records)
        await rattler.install(
            records,
            target_prefix=request["prefix"],
            installed_packages=installed,
            show_progress=False,
            execute_link_scripts=False,
        )
    metadata = Path(request["prefix"]) / "conda-meta"
    urls = {archive.as_uri(): url for url, archive in archives.items()}
    for path in metadata.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["url"] = urls.get(content["url"], content["url"])
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    open_to_others(metadata)
    return success(installed, records)


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """Create a folder that is removed at the end; remove first the one that a killed run may have left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def name_of(url: str) -> str:
    return Path(urllib.parse.urlparse(url).path).name


def sum_of(archive: Path, kind: str) -> str:
    return hashlib.new(kind, archive.read_bytes()).hexdigest()


async def fetch(package: dict, client: Any, folder: Path, archives: str | None = None) -> Path:
    """Return the package's archive after verifying its checksum; from the folder ``archives`` if one is given."""
    from rattler.package_streaming import download_to_path

    url = urllib.parse.urlparse(package["url"])
    archive = Path(archives or folder) / name_of(package["url"])
    try:
        if archives:
            pass
        elif url.scheme == "file":
            archive = Path(urllib.request.url2pathname(url.path))
        else:
            await download_to_path(client, package["url"], archive)
        found = sum_of(archive, package["kind"])
    except (OSError, RuntimeError) as error:
        raise OSError(f"failed to fetch {package['url']}: {error}") from error
    if found != package["sum"]:
        raise ChecksumMismatchError(
            f"{package['url']} has the {package['kind']} {found}, but {package['sum']} is locked"
        )
    return archive


def record_of(package: dict, archive: Path, folder: Path) -> Any:
    """Describe a package by its archive's metadata: a channel may correct its own metadata later."""
    import rattler
    from rattler.package_streaming import extract

    content = folder / f"{archive.name}.content"
    extract(archive, content)
    about = rattler.PackageRecord.from_index_json(content / "info/index.json", **{package["kind"]: package["sum"]})
    shutil.rmtree(content)
    return rattler.RepoDataRecord(about, archive.name, archive.as_uri(), package["channel"])


def open_to_others(metadata: Path) -> None:
    for path in metadata.glob("*.json"):  # rattler's mode 0600 would hide the environment from other users
        path.chmod(0o644)


def success(installed: list, records: list) -> dict:
    actions = {"UNLINK": list(map(describe, installed)), "LINK": list(map(describe, records))}
    return {"success": True, "actions": actions}


def describe(record: Any) -> dict:
    sums = {kind: sum_.hex() for kind, sum_ in (("sha256", record.sha256), ("md5", record.md5)) if sum_}
    dist = f"{record.name.normalized}-{record.version}-{record.build}"
    return {"dist_name": dist, "name": record.name.normalized, "url": record.url, "depends": record.depends, **sums}


def main() -> None:
    try:
        answer = asyncio.run(fulfil(json.loads(sys.argv[1])))
    except BaseException as error:  # a panic in rattler is not an Exception
        answer = {"success": False, "exception_name": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the interpreter may crash at its exit, after all work is done


if __name__ == "__main__":
    main()
