# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda, mamba and micromamba as far as conda_env uses them, with rattler inside: ``fake_conda.py NAME ARGUMENTS``.

fake_conda.md lists its assumptions and their sources.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import rattler
from rattler.exceptions import GatewayError, InstallerError, SolverError
from rattler.networking import AuthenticationMiddleware, Client

UNSATISFIABLE = {
    "classic": "UnsatisfiableError",
    "libmamba": "LibMambaUnsatisfiableError",
    "rattler": "RattlerUnsatisfiableError",
}


NOT_FOUND = """The following packages are not available from current channels:

  - {}

Current channels:

  - {}

To search for alternate channels that may provide the conda package you're
looking for, navigate to

    https://anaconda.org

and use the search bar at the top of the page.
"""
DAMAGED = "The package for {} located at {}\nappears to be corrupted. The path '{}'\n{}\n"


def say(code: int = 0, **content: Any) -> NoReturn:
    if content:
        print(json.dumps(content, indent=2), flush=True)
    if os.environ.get("FAKE_CONDA_CRASH"):
        os.abort()
    os._exit(code)


def fail(name: str, error: str, message: str) -> NoReturn:
    if name == "conda":
        say(1, error=f"{error}: {message}", exception_name=error, message=message)
    print(f"critical libmamba {message}", file=sys.stderr, flush=True)
    os._exit(1)


def fail_for(name: str, problems: list[tuple[str, str]]) -> NoReturn:
    """Exit with the problems of packages: conda reports one or several of them as parts of another error."""
    if name != "conda":
        fail(name, "", "Found incorrect downloads. Aborting")
    errors = [{"error": f"{error}: {text}", "exception_name": error, "message": text} for error, text in problems]
    say(1, error="Multiple Errors Encountered.", errors=errors, exception_name="CondaMultiError")


def fail_to_solve(name: str, problem: str, channels: list[str]) -> NoReturn:
    solver = os.environ.get("CONDA_SOLVER", "libmamba") if name == "conda" else "libmamba"
    absent = re.search(r"No candidates were found for (.+)\.$", problem, re.MULTILINE)
    exact = re.search(r"^[^│├└]*==.* cannot be installed[^└]*└[^└]*└─ (__glibc) ([^\s]+),", problem)
    if name == "conda" and (absent or (exact and solver == "classic")):
        package = absent[1] if absent else f"{exact[1]}[version='{exact[2]}']"
        fail(name, "PackagesNotFoundInChannelsError", NOT_FOUND.format(package, "\n  - ".join(channels)))
    missing = re.search(r"([\w.-]+) (\S+).* would require\W+__glibc ([^\s]+),", problem)
    if missing and solver == "classic":
        glibc = os.environ["CONDA_OVERRIDE_GLIBC"]
        problem = (
            "The following specifications were found to be incompatible with your system:\n\n"
            f"  - feature:/linux-64::__glibc=={glibc}=0\n  - {missing[1]} -> __glibc[version='{missing[3]}']\n\n"
            f"Your installed version is: {glibc}\n"
        )
    elif missing and solver == "libmamba":
        problem = f"nothing provides __glibc {missing[3]} needed by {missing[1]}-{missing[2]}-h_0"
    if name != "conda":
        say(1, success=False, solver_problems=[problem])
    fail(name, UNSATISFIABLE[solver], problem)


def fail_to_fetch(name: str, problem: str, channel: str) -> NoReturn:
    status = re.search(r"\((\d{3}) (.*?)\) for url \((.*?)\)", problem)
    if channel.startswith("file:"):
        if name == "conda":
            words = f"HTTP 404 UNAVAILABLE OR INVALID for channel no <{channel}>"
            fail(name, "UnavailableInvalidChannel", f"{words}\n\nThe channel is not accessible or is invalid.")
        fail(name, "", f"Download error (37) Couldn't read a file:// file [{channel}/linux-64/repodata.json]")
    if not status:
        text = f"HTTP 000 CONNECTION FAILED for url <{channel}/linux-64/repodata.json>\nElapsed: -\n"
        fail(name, "CondaHTTPError", text if name == "conda" else f"Download error (7) Could not connect [{channel}]")
    if name != "conda":
        fail(name, "", f"Transfer finalized, status: {status[1]} [{status[3]}] 0 bytes")
    kind = "CondaHTTPError" if int(status[1]) >= 500 else "UnavailableInvalidChannel"
    fail(name, kind, f"HTTP {status[1]} {status[2].upper()} for url <{status[3]}>")


def describe(name: str, record: Any) -> dict[str, str]:
    dist = f"{record.name.normalized}-{record.version}-{record.build}"
    if name == "conda":
        return {"dist_name": dist, "name": record.name.normalized, "version": str(record.version)}
    return {"fn": f"{dist}.conda", "name": record.name.normalized, "version": str(record.version)}


def fail_to_install(name: str, problem: str, records: list[Any]) -> NoReturn:
    status = re.search(r"\((\d{3}) (.*?)\) for url", problem)
    if not status:
        fail_for(name, [("EOFError", "Compressed file ended before the end-of-stream marker was reached")])
    advice = "Elapsed: 00:00.002909\n\nAn HTTP error occurred when trying to retrieve this URL.\n"
    words = f"HTTP {status[1]} {status[2]} for url"
    fail_for(name, [("CondaHTTPError", f"{words} <{record.url}>\n{advice}") for record in (*records, records[0])])


def check_cache(name: str, records: list[Any], cache: Path) -> None:
    """Refuse incomplete packages in the cache, as conda does where it has unpacked them before."""
    problems = []
    for record in records if name == "conda" else []:
        folder = cache / describe(name, record)["dist_name"]
        manifest = folder / "info/paths.json"
        for entry in json.loads(manifest.read_text())["paths"] if manifest.exists() else []:
            about = (record.name.normalized, folder, entry["_path"])
            if not os.path.lexists(folder / entry["_path"]):
                words = "specified in the package manifest cannot be found."
                problems.append(("CondaVerificationError", DAMAGED.format(*about, words)))
            elif os.environ.get("CONDA_SAFETY_CHECKS") == "enabled":
                size = (folder / entry["_path"]).stat().st_size
                if entry["path_type"] == "hardlink" and size != entry["size_in_bytes"]:
                    problems.append(("SafetyError", DAMAGED.format(*about, "has an incorrect size.")))
    if problems:
        fail_for(name, problems)


def url_of(channel: str) -> str:
    condarc = Path.home() / ".condarc"
    custom = json.loads(condarc.read_text())["custom_channels"] if condarc.exists() else {}
    return f"{custom[channel]}/{channel}" if channel in custom else channel


async def main(name: str, options: argparse.Namespace) -> None:
    prefix = Path(options.prefix)
    is_env = (prefix / "conda-meta").is_dir()
    if options.verb == "create" and prefix.exists():
        if options.dry_run and name == "conda" and is_env:
            fail(name, "CondaValueError", "Cannot `create --dry-run` with an existing conda environment")
        if not is_env and not options.dry_run and any(prefix.iterdir()) and name != "conda":
            fail(name, "", "Non-conda folder exists at prefix")
        if not options.dry_run and is_env:
            shutil.rmtree(prefix)
            is_env = False
    elif options.verb == "install" and not is_env:
        fail(name, "EnvironmentLocationNotFound", f"Not a conda environment: {prefix}")
    installed = [rattler.PrefixRecord.from_path(path) for path in (prefix / "conda-meta").glob("*.json")]
    asked = {spec.partition("=")[0].partition(">")[0] for spec in options.specs}
    kept = [record.name.normalized for record in installed if record.name.normalized not in asked]
    updates = name == "conda" and not options.satisfied_skip_solve
    cache = Path(os.environ["CONDA_PKGS_DIRS"])
    if options.file:
        from fake_explicit import read_explicit  # not available everywhere this file is copied to

        records = await read_explicit(name, options.file, fail, fail_for)
        check_cache(name, records, cache)
        named = {record.name.normalized for record in records}
        others = [record for record in installed if record.name.normalized not in named]
        await rattler.install([*others, *records], target_prefix=prefix, cache_dir=cache, show_progress=False)
        links = [describe(name, record) for record in records]
        say(**{"success": True, "actions": {"PREFIX": str(prefix), "LINK": links}} if name != "conda" else {})
    client = Client([AuthenticationMiddleware()])
    try:
        solved = await rattler.solve(
            sources=[url_of(channel) for channel in options.channel],
            specs=[rattler.MatchSpec(spec) for spec in (*options.specs, *kept)],  # strings are parsed more strictly
            locked_packages=[record for record in installed if not updates or record.name.normalized in kept],
            gateway=rattler.Gateway(cache_dir=cache / "cache", client=client),
            virtual_packages=rattler.VirtualPackage.detect(overrides=rattler.VirtualPackageOverrides.from_env()),
        )
    except SolverError as error:
        fail_to_solve(name, str(error), options.channel)
    except GatewayError as error:
        fail_to_fetch(name, str(error), url_of(options.channel[0]))
    old = {describe(name, record)["name"]: describe(name, record) for record in installed}
    new = {describe(name, record)["name"]: describe(name, record) for record in solved}
    if old == new:
        say(success=True, message="All requested packages already installed" + "." * (name == "conda"))
    if not options.dry_run:
        check_cache(name, [record for record in solved if describe(name, record) not in old.values()], cache)
        cache.mkdir(parents=True, exist_ok=True)
        install = functools.partial(rattler.install, solved, cache_dir=cache, show_progress=False, client=client)
        try:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # all is fetched before the prefix is touched
                await install(target_prefix=scratch)
        except InstallerError as error:
            fail_to_install(name, str(error), solved)
        await install(target_prefix=prefix)
    unlinked = [package for package in old.values() if package not in new.values()]
    linked = [package for package in new.values() if package not in old.values()]
    actions = {"PREFIX": str(prefix), "UNLINK": unlinked, "LINK": linked}
    say(success=True, actions=actions, dry_run=options.dry_run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["conda", "mamba", "micromamba"])
    parser.add_argument("verb", choices=["create", "install"])
    for flag in ("-y", "-q", "--json"):
        parser.add_argument(flag, action="store_true", required=True)
    for flag in ("--dry-run", "--no-default-packages", "--satisfied-skip-solve"):
        parser.add_argument(flag, action="store_true")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--override-channels", action="store_true")
    source.add_argument("--file")
    parser.add_argument("-c", dest="channel", action="append")
    parser.add_argument("-p", dest="prefix", required=True)
    parser.add_argument("specs", nargs="*")
    arguments = parser.parse_intermixed_args()
    asyncio.run(main(arguments.name, arguments))
