# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda and micromamba as far as conda_env meets them, with rattler inside: ``fake_conda.py NAME ARGUMENTS``.

What it assumes of conda 26 and micromamba 2:

- ``create`` of a prefix that exists deletes it first, with all that is in it. As a dry run, conda refuses
  that prefix, and micromamba acts as if it were ``install``.
- ``install`` into a prefix without ``conda-meta`` is refused.
- ``install`` keeps the packages that nobody asked for.
- Both print one JSON document. conda describes packages by ``dist_name``, micromamba by ``fn`` and more.
- With nothing to do there are no ``actions`` but a ``message``, which ends in a full stop only for conda.
- conda's errors are ``exception_name`` and ``message``; micromamba's are ``solver_problems``, or no JSON.
- Packages go to ``CONDA_PKGS_DIRS``.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import rattler
from fake_explicit import install_explicit
from rattler.exceptions import GatewayError, SolverError


def answer(code: int = 0, **content: Any) -> NoReturn:
    print(json.dumps({"success": not code, **content}), flush=True)
    os._exit(code)


def fail(name: str, error: str, message: str) -> NoReturn:
    if name == "conda":
        answer(1, error=message, exception_name=error, message=message)
    if error == "UnsatisfiableError":
        answer(1, solver_problems=[message])
    print(f"critical libmamba {message}", file=sys.stderr, flush=True)
    os._exit(1)


def describe(name: str, record: Any) -> dict[str, str]:
    dist = f"{record.name.normalized}-{record.version}-{record.build}"
    if name == "conda":
        return {"dist_name": dist, "name": record.name.normalized, "version": str(record.version)}
    return {"fn": f"{dist}.conda", "name": record.name.normalized, "version": str(record.version)}


async def main(name: str, options: argparse.Namespace) -> None:
    prefix = Path(options.prefix)
    is_env = (prefix / "conda-meta").is_dir()
    if options.verb == "create" and prefix.exists():
        if options.dry_run and name == "conda":
            fail(name, "CondaValueError", f"prefix already exists: {prefix}")
        if not options.dry_run:
            shutil.rmtree(prefix)
            is_env = False
    elif options.verb == "install" and not is_env:
        fail(name, "EnvironmentLocationNotFound", f"Not a conda environment: {prefix}")
    installed = [rattler.PrefixRecord.from_path(path) for path in (prefix / "conda-meta").glob("*.json")]
    asked = {spec.partition("=")[0].partition(">")[0] for spec in options.specs}
    kept = [record.name.normalized for record in installed if record.name.normalized not in asked]
    cache = Path(os.environ["CONDA_PKGS_DIRS"])
    if options.file:
        records = await install_explicit(options.file, prefix, installed, cache, functools.partial(fail, name))
        answer(actions={"PREFIX": str(prefix), "LINK": [describe(name, record) for record in records]})
    try:
        solved = await rattler.solve(
            sources=options.channel,
            specs=[*(rattler.MatchSpec(spec, strict=False) for spec in options.specs), *kept],
            locked_packages=installed,
            gateway=rattler.Gateway(cache_dir=cache / "cache"),
            virtual_packages=rattler.VirtualPackage.detect(),
        )
    except SolverError as error:
        fail(name, "UnsatisfiableError", str(error))
    except GatewayError as error:
        fail(name, "UnavailableInvalidChannel", f"Download error for {options.channel[0]}: {error}")
    old = {describe(name, record)["name"]: describe(name, record) for record in installed}
    new = {describe(name, record)["name"]: describe(name, record) for record in solved}
    if old == new:
        answer(message="All requested packages already installed" + "." * (name == "conda"))
    if not options.dry_run:
        await rattler.install(solved, target_prefix=prefix, cache_dir=cache, show_progress=False)
    unlinked = [package for package in old.values() if package not in new.values()]
    linked = [package for package in new.values() if package not in old.values()]
    answer(actions={"PREFIX": str(prefix), "UNLINK": unlinked, "LINK": linked}, dry_run=options.dry_run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["conda", "micromamba"])
    parser.add_argument("verb", choices=["create", "install"])
    for flag in ("-y", "-q", "--json"):
        parser.add_argument(flag, action="store_true", required=True)
    parser.add_argument("--dry-run", action="store_true")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--override-channels", action="store_true")
    source.add_argument("--file")
    parser.add_argument("-c", dest="channel", action="append")
    parser.add_argument("-p", dest="prefix", required=True)
    parser.add_argument("specs", nargs="*")
    arguments = parser.parse_intermixed_args()
    asyncio.run(main(arguments.name, arguments))
