#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: conda_env
short_description: Install packages into a conda environment, with or without conda
author: mala.hpc_db contributors (@mala-project)
description:
  - Creates a conda environment at a path, or updates an existing one to the wanted packages.
  - A complete environment records O(specs), O(provider) and the installed packages in its file C(conda-meta/hpc_db).
    While all three are the same, no client runs. The comparison takes milliseconds.
  - Otherwise a client solves O(specs). If it neither replaces a package of O(specs) nor adds one, the environment is
    not changed, and only the record is rewritten. This does not count as a change. It also applies to an environment
    without a record, such as one of an earlier version of this collection, even while O(lease) is held.
  - An installation has succeeded if the environment has the solved packages afterwards, regardless of the client's
    output.
  - Other packages in the environment stay. The major version of PostgreSQL is never changed, because another one
    cannot open the data directory. Create another environment for another major version.
  - An unreachable channel is tried twice more, after 2 and 8 seconds, in addition to the client's own retries.
  - The next run repeats an interrupted installation from the start. Until then the file O(prefix) with
    C(.unfinished) appended marks it. The file also makes a second run at the same time wait for the first.
extends_documentation_fragment:
  - mala.hpc_db.slices
attributes:
  check_mode:
    support: full
    description:
      - Solves for the diff without leaving files behind.
      - While O(rattler_python) has no py-rattler, the diff shows O(specs) instead.
  diff_mode:
    support: full
    description: Shows added, removed and changed packages with version and build.
options:
  prefix:
    description:
      - Absolute path of the environment. Its packages contain this path, so the environment must not be moved.
      - It may be missing, an empty directory or a conda environment. Anything else is refused. A path inside another
        environment is refused too, except in the folder C(envs) of a conda installation.
    type: path
    required: true
  specs:
    description:
      - Wanted packages, as C(name), C(name=17), C(name=17.*), C(name==17.2), C(name>=17,<18) or
        C(name=17.2=build), where C(build) may contain C(*).
    type: list
    elements: str
    required: true
  channels:
    description:
      - Conda channels in order of preference, as names, URLs or C(file://) folders.
      - Other channels in the user's configuration are ignored.
      - A change of the channels alone does not change an environment that satisfies O(specs).
      - A URL with a password or token is refused. Put credentials where the client reads them. For conda and mamba
        that is the user's own C(~/.condarc), its plugins or C(~/.netrc). For O(provider=rattler) it is the first
        existing one of the file in E(RATTLER_AUTH_FILE), the keyring, C(~/.rattler/credentials.json) and C(~/.netrc).
    type: list
    elements: str
    default: [conda-forge]
  state:
    description:
      - V(present) ensures that the packages are installed.
      - V(staged) installs nothing and does not read O(prefix). It downloads into O(archives) the packages that are
        missing in the environment of another O(host), which may have no internet. On that host, O(state=present) with
        the returned RV(lock) and these O(archives) needs no channel.
    type: str
    choices: [present, staged]
    default: present
  provider:
    description:
      - Program that solves and installs.
      - V(rattler) needs no conda, but a Python with py-rattler.
      - V(conda) uses an existing conda, mamba or micromamba. The user's configuration of conda (C(solver)) selects the
        solver C(classic), C(libmamba) or C(rattler). Its C(create_default_packages) is ignored.
      - All of them treat the host's properties as packages (C(__glibc)). Packages that need a newer host are refused.
    type: str
    choices: [rattler, conda]
    default: rattler
  lock:
    description:
      - Content of a lock file, as returned in RV(lock). Exactly its packages are installed and verified by checksum.
        Nothing is solved. The packages of O(specs) must be in it, in a major version that O(specs) allow.
      - An environment that differs from it is refused unless O(update=true).
    type: str
  archives:
    description:
      - Folder with the archives of all packages of O(lock), for O(provider=rattler).
      - If O(lock) is not given, O(state=staged) has found nothing to install. Then an environment with all packages of
        O(specs) is not changed, and any other environment is refused.
      - With O(state=staged) the archives are downloaded there and verified by checksum, and other archives are removed.
    type: path
  host:
    description: Host to solve for, for O(state=staged).
    type: dict
    suboptions:
      system:
        description: Output of C(uname -s) on the host.
        type: str
        required: true
      machine:
        description: Output of C(uname -m) on the host.
        type: str
        required: true
      release:
        description: Output of C(uname -r) on the host.
        type: str
        default: ""
      glibc:
        description: Version of the host's glibc, such as V(2.28).
        type: str
        default: ""
      packages:
        description: RV(installed) as returned on the host.
        type: dict
      satisfied:
        description: RV(satisfied) as returned on the host.
        type: bool
        default: false
  update:
    description:
      - Update an environment that satisfies O(specs) to the newest packages that do, or to O(lock).
      - No server may run from it during the update, see O(lease).
    type: bool
    default: false
  lease:
    description:
      - Folder of the lease of a server that runs from this environment, on any host.
      - An existing environment is not changed while the lease is held, or after a server has left it without a clean
        stop. In turn, the server does not start while C(.unfinished) exists.
    type: path
  rattler_python:
    description:
      - Python of an environment with py-rattler, for O(provider=rattler).
      - The default is the Python that runs this module.
    type: path
  client:
    description:
      - Path or name of conda, mamba or micromamba, for O(provider=conda).
      - A name is searched for in this order - E(MAMBA_EXE) and E(CONDA_EXE), E(PATH), a login shell after
        O(module_load), the usual folders in the home directory such as C(~/miniforge3), and C(/opt/*).
      - If not set, the first of C(micromamba), C(mamba) and C(conda) that is found.
    type: path
  module_load:
    description:
      - Shell line that makes a client available at this site, such as C(module load anaconda).
      - A login shell runs it if no client was found before.
    type: str
  timeout:
    description:
      - Maximum time in seconds for all attempts to solve, for all attempts to install, and for waiting for another run.
    type: int
    default: 1800
seealso:
  - module: mala.hpc_db.python_env
"""

EXAMPLES = r"""
- name: Install PostgreSQL 17 without conda on the cluster
  mala.hpc_db.conda_env:
    prefix: ~/hpc_db/hpc_db/postgresql-17
    specs: [postgresql=17]
    rattler_python: ~/hpc_db/hpc_db/rattler/bin/python

- name: Install it with the site's conda
  mala.hpc_db.conda_env:
    prefix: /scratch/alice/postgresql-17
    specs: ["postgresql>=17.2,<18"]
    provider: conda
    module_load: module load anaconda
"""

RETURN = r"""
prefix:
  description: Path of the environment.
  returned: success
  type: str
bindir:
  description: Folder of its programs. They need no activation.
  returned: unless O(state=staged)
  type: str
version:
  description: Version of PostgreSQL in the environment, or null. In check mode, the version after the run.
  returned: unless O(state=staged)
  type: str
  sample: "17.10"
features:
  description:
    - Build features of that PostgreSQL. C(tls) is reported by the server program itself. The others are names of
      PostgreSQL's configure options, as far as C(pg_config) reports them.
    - Null without PostgreSQL, and in check mode while it is not installed.
  returned: unless O(state=staged)
  type: list
  elements: str
  sample: [gssapi, lz4, readline, tls, zlib, zstd]
packages:
  description: Version of each package by name. In check mode, as far as they could be solved.
  returned: success
  type: dict
  sample: {libpq: "17.10", postgresql: "17.10"}
installed:
  description:
    - Version and build of each installed package by name. In check mode, the packages before the run.
    - V(null) if the environment is missing or incomplete.
  returned: unless O(state=staged)
  type: dict
  sample: {libpq: ["17.10", h1_0]}
satisfied:
  description: Whether the record showed before the run that the environment satisfies O(specs). O(lock) is ignored.
  returned: unless O(state=staged)
  type: bool
lock:
  description:
    - Lock file of RV(installed) in conda's explicit format with checksums, without credentials. V(null) if the
      environment is missing or incomplete, or if a package's record in C(conda-meta) has no URL or no checksum.
    - With O(state=staged), the lock file of the packages in O(archives), with the URLs of the channels. Empty if the
      other host's environment is up to date, and in check mode while it cannot be solved.
  returned: success
  type: str
"""

import functools
import glob
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _lock, _rattler_helper, _slices
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import (
    BEFORE_LINKING,
    LOAD_FAILED,
    Answer,
    CondaError,
    Package,
    Spec,
    allows_major,
    clean_command,
    conda_command,
    describe_host,
    difference,
    explain,
    has_secret,
    major_of,
    may_pass,
    parse_answer,
    parse_search,
    parse_spec,
    pins,
    search_command,
    solve_request,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._marker import alone_at, rewrite
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import (
    configure_command,
    parse_features,
    tls_command,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

CLIENTS = ["micromamba", "mamba", "conda"]
HOMES = ["~/miniforge3", "~/mambaforge", "~/micromamba", "~/miniconda3", "~/anaconda3", "~/.local", "/opt/*"]

# File in a complete environment that records what was asked for and what is installed. Clients read only *.json there.
STAMP = "conda-meta/hpc_db"

# Contents of the marker file beside the prefix, from the start of the client until the work is complete.
MAKING = "making"  # the prefix may be deleted
CHANGING = "changing"  # followed by PostgreSQL's version before the change, because a kill may have lost its record

# Seconds before the second and the third attempt. Clients also retry for a few seconds themselves.
PAUSES = (2, 8)

NO_LOCK = "none is given, but it alone says which of the archives to install"

Packages = dict[str, Package]
Run = Callable[..., tuple[int, str, str]]


def ensure_env(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the environment to the wanted state. ``run`` takes a command and returns its code and output."""
    specs = wanted_specs(params)
    params = {**params, "locked": wanted_lock(params, specs)}
    if params["state"] == "staged":
        return stage(params, run, specs, check_mode)
    prefix = Path(params["prefix"])
    marker = prefix.with_name(prefix.name + ".unfinished")
    note = note_of(marker)
    before = after = look(prefix, note)
    whole = None if marker.exists() else before
    satisfied = whole is not None and read_stamp(params) == stamp_of(params, specs, whole)
    if params["locked"] and before:
        _lock.check_sums(params["locked"], records_of(params["prefix"]))
    if whole is None or not is_satisfied(params, specs, whole):
        kept = keep_major(specs, postgresql_of(before, note))
        params = {**params, **find_program(params, run)}
        change = None
        if whole is not None or check_mode:
            change = plan_change(params, run, kept, before, note, check_mode)
            after = change[1]
        if whole is None or after != whole:
            if before is not None:
                check_change(params, before)
            if params["provider"] == "conda":
                _lock.check_archives(params["locked"])
            if not check_mode:
                before, after = bring(params, run, specs, marker, change)
    if not check_mode and after is not None:
        write_stamp(params, specs, after)
        whole = after
    bindir = str(prefix / "bin")
    postgresql = (after or {}).get("postgresql")
    installed = (before or {}).get("postgresql") if check_mode else postgresql
    return {
        "changed": before != after,
        "prefix": str(prefix),
        "bindir": bindir,
        "version": postgresql and postgresql.version,
        "features": installed and features_of(bindir, run, installed.version),
        "packages": {package.name: package.version for package in (after or {}).values()},
        "installed": None if whole is None else {name: [each.version, each.build] for name, each in whole.items()},
        "satisfied": satisfied,
        "lock": None if whole is None else lock_of(params),
        "diff": difference(before or {}, after or {}),
    }


def stage(params: dict, run: Run, specs: list[Spec], check_mode: bool) -> dict:
    """Ensure that the archives missing in another host's environment are here. Install and check nothing locally."""
    held, lock = params["host"]["packages"], ""
    before = after = None if held is None else {name: Package(name, *about) for name, about in held.items()}
    version = postgresql_of(before, "")
    if before is None or not is_satisfied(params, specs, before):
        params = {**params, **find_program(params, run)}
        kept = [*keep_major(specs, version), *(no_older(version) if params["update"] else [])]
        if before is None or params["locked"] or params["update"] or not may_stay(params, run, kept, before):
            planned = plan(params, run, kept, before, check_mode)
            after = planned.packages
            if after != before and not planned.problem:
                lock = params["lock"] or _lock.lock_text(list(planned.links), platform_of(params))
            if lock and not check_mode:
                keep_archives(params, run, specs, lock)
    return {
        "changed": before != after,
        "prefix": params["prefix"],
        "packages": {package.name: package.version for package in (after or {}).values()},
        "lock": lock,
        "diff": difference(before or {}, after or {}),
    }


def may_stay(params: dict, run: Run, specs: list[Spec], before: Packages) -> bool:
    """Return whether a solver accepts the wanted packages of another host as they are. It does not see that host."""
    if any(spec.name not in before for spec in specs):
        return False
    with suppress(CondaError):
        plan(params, run, [*specs, *pins({spec.name: before[spec.name] for spec in specs})], None, False)
        return True
    return False


def stamp_of(params: dict, specs: list[Spec], packages: Packages) -> dict:
    """Return the record of what was asked for and of what is installed."""
    return {
        "provider": params["provider"],
        "specs": sorted(spec.text for spec in specs),
        "packages": {name: f"{package.version} {package.build}" for name, package in packages.items()},
    }


def read_stamp(params: dict) -> dict:
    """Return the environment's record; empty if it has none."""
    with suppress(OSError, ValueError):
        return json.loads(Path(params["prefix"], STAMP).read_text(encoding="utf-8"))
    return {}


def write_stamp(params: dict, specs: list[Spec], packages: Packages) -> None:
    """Write the record unless it is there already."""
    stamp = stamp_of(params, specs, packages)
    if read_stamp(params) != stamp:
        Path(params["prefix"], STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def keep_archives(params: dict, run: Run, specs: list[Spec], lock: str) -> None:
    """Download the lock file's packages whose archives are not here yet."""
    solved = not params["lock"]
    params = {**params, "lock": lock, "locked": _lock.parse_lock(lock, platform_of(params))}
    answer = ask(params, run, specs, {}, dry_run=False)
    if answer.problem:
        if solved and answer.setting == "lock":
            answer = answer._replace(setting="channels")
        raise CondaError(explain(answer, params, specs, glibc_of(params)))


def features_of(bindir: str, run: Run, version: str) -> list[str]:
    """Return the build features of this PostgreSQL; raise if it does not start."""
    with tempfile.TemporaryDirectory(prefix="conda_env-") as scratch:
        code, tls_library, stderr = run(clean_command(tls_command(bindir, "", scratch), 60))
    if code:
        raise CondaError(f"prefix: {bindir}/postgres does not run on this host: {' '.join(stderr.split())}")
    code, configure, stderr = run(clean_command(configure_command(bindir, ""), 60))
    return parse_features("" if code else configure, tls_library, int(major_of(version)))


def wanted_specs(params: dict) -> list[Spec]:
    """Return the specs; raise for invalid values, before any client sees them."""
    for name in ("prefix", "rattler_python", "lease", "archives"):
        if params[name] is not None and not os.path.isabs(params[name]):
            raise CondaError(f"{name}: {params[name]!r} is not absolute; give a path that begins with / or ~")
    for channel in params["channels"]:
        if channel.startswith("-") or not channel.isprintable() or not channel.strip():
            raise CondaError(f"channels: {channel!r} is not a channel; give a name, a URL or a file:// folder")
        if has_secret(channel):
            raise CondaError(
                f"channels: that of {urlsplit(channel).hostname} contains a password or token, which would get into "
                "logs; leave it out, and keep it where your client looks for it, such as ~/.netrc"
            )
    if params["archives"] and params["provider"] != "rattler":
        raise CondaError(f"archives: not allowed with provider {params['provider']}; only rattler takes packages there")
    specs = [parse_spec(text) for text in params["specs"]]
    if not specs:
        raise CondaError("specs: none are given; name at least one package")
    return specs


def wanted_lock(params: dict, specs: list[Spec]) -> list[_lock.Locked]:
    """Return the lock file's packages, if there is one; raise if it does not match the platform or the specs."""
    if not params["lock"]:
        return []
    locked = _lock.parse_lock(params["lock"], platform_of(params))
    _lock.check_specs(locked, specs)
    return locked


def platform_of(params: dict) -> str:
    """Return conda's name for this host's platform, or for that of the host to solve for."""
    host = params["host"] or {"system": platform.system(), "machine": platform.machine()}
    return _lock.platform_of(host["system"], host["machine"])


def is_satisfied(params: dict, specs: list[Spec], packages: Packages) -> bool:
    """Return whether an environment is known to be as wanted. Otherwise a client has to be asked."""
    if params["locked"]:
        return packages == exactly(params["locked"])
    if params["update"]:
        return False
    if params["host"]:
        return params["host"]["satisfied"]
    if params["archives"]:  # the workstation has asked a client, and brought nothing
        return all(spec.name in packages for spec in specs)
    return read_stamp(params) == stamp_of(params, specs, packages)


def exactly(locked: list[_lock.Locked]) -> Packages:
    return {each.package.name: each.package for each in locked}


def check_change(params: dict, before: Packages) -> None:
    """Raise if an existing environment must not be changed or cannot be brought to the lock file."""
    check_lease(params["lease"])
    if not params["locked"]:
        return
    prefix = params["prefix"]
    differs = difference(before, exactly(params["locked"]))
    if any(differs.values()) and not params["update"]:
        held, wanted = (", ".join(map(" ".join, side.items())) or "nothing else" for side in differs.values())
        raise CondaError(
            f"lock: it differs from {prefix}, which has {held} instead of {wanted}; "
            "an update brings it there (playbooks/update.yml)"
        )
    others = sorted(set(before) - set(exactly(params["locked"])))
    if others and params["provider"] == "conda":
        raise CondaError(
            f"lock: it has no {', '.join(others)}, which {prefix} has, and no client of conda's removes packages for "
            "a lock file; remove the environment and install it again, or take provider rattler"
        )


def check_lease(folder: str | None) -> None:
    """Raise if a server holds the lease or has ended without releasing it."""
    names = os.listdir(folder) if folder and os.path.isdir(folder) else []
    epochs = [int(name[6:]) for name in names if re.fullmatch(r"lease\.\d+", name)]
    if not epochs or f"released.{max(epochs)}" in names:
        return
    holder = {}
    with suppress(OSError, ValueError):  # it may be released or taken at this moment
        holder = json.loads(Path(folder or "", f"lease.{max(epochs)}").read_text(encoding="utf-8"))
    what = f"job {holder['job']}" if holder.get("job") else "a server"
    raise CondaError(
        f"lease: {what} on {holder.get('host', 'some host')} runs from the environment, or has not stopped cleanly; "
        "stop it (playbooks/stop.yml), and if it was killed, host it once more before (playbooks/hpc_db.yml)"
    )


def records_of(prefix: str | Path) -> list[dict]:
    """Return the installed packages as clients have recorded them; raise if a record is damaged."""
    records = []
    for path in sorted(Path(prefix).glob("conda-meta/*.json")):
        with suppress(ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
            if {"name", "version", "build"} <= set(records[-1]):
                continue
        raise CondaError(f"prefix: {path} is damaged; remove {prefix} and install it again")
    return records


def lock_of(params: dict) -> str | None:
    """Return the lock file of the installed packages; None if one of them cannot be locked."""
    with suppress(CondaError):
        return _lock.lock_text(records_of(params["prefix"]), platform_of(params))
    return None


def has_all_files(prefix: Path) -> bool:
    """Return whether all recorded files exist: a failed client may have removed files before their record."""
    named = (name for record in records_of(prefix) for name in record.get("files") or [])
    return all(os.path.lexists(prefix / name) for name in named)


def no_older(version: str) -> list[Spec]:
    return [parse_spec(f"postgresql>={version}")] if version else []


def note_of(marker: Path) -> str:
    return marker.read_text(encoding="utf-8") if marker.exists() else ""


def look(prefix: Path, note: str) -> Packages | None:
    """Return the environment's packages; None if one may be created there. Raise if neither applies."""
    outer = next((parent for parent in prefix.parents if (parent / "conda-meta").is_dir()), None)
    if outer and prefix.parent != outer / "envs":
        raise CondaError(f"prefix: {prefix} lies inside the conda environment {outer}; choose a path outside")
    if not os.path.lexists(prefix) or note == MAKING:
        return None
    if (prefix / "conda-meta").is_dir():
        return {each["name"]: Package(each["name"], each["version"], each["build"]) for each in records_of(prefix)}
    if prefix.is_dir() and not prefix.is_symlink() and not any(prefix.iterdir()):
        return None
    reason = "it has no folder conda-meta" if prefix.is_dir() else "it is not a directory"
    raise CondaError(
        f"prefix: {prefix} exists and is not a conda environment: {reason}; choose a path that does not exist, "
        "an empty directory or an environment"
    )


def postgresql_of(before: Packages | None, note: str) -> str:
    """Return the version of PostgreSQL whose major must be kept; empty if there is none."""
    if before and "postgresql" in before:
        return before["postgresql"].version
    return note.partition(" ")[2]


def keep_major(specs: list[Spec], version: str) -> list[Spec]:
    """Return the specs with PostgreSQL's installed major added; raise if they exclude it."""
    if not version:
        return specs
    kept = parse_spec(f"postgresql={major_of(version)}")
    for spec in specs:
        if spec.name == "postgresql" and not allows_major(spec, version):
            raise CondaError(
                f"specs: {spec.text} would replace the installed PostgreSQL {version} by another major; "
                f"stay with {kept.text} or choose another prefix"
            )
    return specs if kept in specs else [*specs, kept]


def plan_change(
    params: dict, run: Run, specs: list[Spec], before: Packages | None, note: str, check_mode: bool
) -> tuple[list[Spec], Packages]:
    """Return the specs to install, and the packages to be present then; those of ``before`` if they are to stay."""
    if params["update"] and before is not None and not params["locked"]:
        newest = plan(params, run, [*specs, *no_older(postgresql_of(before, note))], None, check_mode).packages
        return pins(newest), {**before, **newest}
    is_whole = before is not None and not note
    planned = plan({**params, "is_whole": is_whole}, run, specs, before, check_mode).packages
    if before is None or note or params["locked"]:
        return specs, planned
    stays = set(planned) <= set(before) and all(planned[spec.name] == before[spec.name] for spec in specs)
    return specs, before if stays else planned


def plan(params: dict, run: Run, specs: list[Spec], before: Packages | None, check_mode: bool) -> Answer:
    """Return the packages to be installed, without leaving files; raise if they cannot be solved.

    In check mode the solver may be missing. Then the packages stand for the specs.
    """
    if params["locked"]:
        return Answer(exactly(params["locked"]))
    with tempfile.TemporaryDirectory(prefix="conda_env-") as scratch:
        harmless = dict(params)
        if before is None or params["host"]:  # not even a dry-run "create" may see the true prefix
            harmless["prefix"] = os.path.join(scratch, "prefix")
        if params["archives"] and params["state"] == "present":
            answer = Answer({}, "lock", NO_LOCK)
        else:
            answer = ask(harmless, run, specs, before, dry_run=True)
    if not answer.problem and not all(spec.name in answer.packages for spec in specs):
        answer = Answer({}, "provider", "it did not say what it would install")
    # An earlier task installs rattler or stages the packages, unless that task is in check mode too.
    if check_mode and answer.setting in ("rattler_python", "lock"):
        packages, asked = dict(before or {}), {} if params["host"] else read_stamp(params)
        for spec in specs:
            if spec.name not in packages or spec.text not in asked.get("specs", [spec.text]):
                packages[spec.name] = Package(spec.name, spec.text[len(spec.name) :] or "any", "")
        return answer._replace(packages=packages)
    if answer.problem:
        raise CondaError(explain(answer, params, specs, glibc_of(params)))
    return answer


def bring(
    params: dict, run: Run, specs: list[Spec], marker: Path, change: tuple[list[Spec], Packages] | None
) -> tuple[Packages | None, Packages | None]:
    """Create or change the environment; return its packages before and after. ``change`` is planned if it is None."""
    prefix = Path(params["prefix"])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with alone_at(marker, params["timeout"], "timeout", params) as note:
        left = note.read()
        before = look(prefix, left)  # again, because another run may have finished since
        if before is not None and not left and is_satisfied(params, specs, before):
            return before, before
        version = postgresql_of(before, left)
        request, planned = change or plan_change(params, run, keep_major(specs, version), before, left, False)
        if before == planned and not left:
            return before, before
        if before is not None:
            check_lease(params["lease"])  # again: from now on no server starts
        rewrite(note, MAKING if before is None else f"{CHANGING} {version}")
        if before is None:
            clear(prefix, left)

        def look_again() -> Packages | None:
            return look(prefix, "") if (prefix / "conda-meta").is_dir() else None

        def is_planned(packages: Packages | None) -> bool:
            return all((packages or {}).get(name) == package for name, package in planned.items())

        def is_done() -> bool:
            """Return whether records that were not as planned before now prove success, whatever the client reports."""
            if before is not None and (left or is_planned(before)):
                return False
            with suppress(CondaError):  # a record is damaged
                return is_planned(look_again())
            return False

        answer = ask(params, run, request, before, dry_run=False, keep_open=(note.fileno(),), is_done=is_done)
        try:
            after = look_again()
        except CondaError:  # a record is damaged
            if not answer.problem:
                raise
            after = None  # the client's own message gives the reason, such as a full disk
        has_ended_well = not answer.problem and (is_planned(after) or before != after == answer.packages)
        if after is not None and (has_ended_well or is_done()):
            write_stamp(params, specs, after)
            rewrite(note, "")
            return before, after
        if before is None:
            clear(prefix, MAKING)
            rewrite(note, "")
        elif before == after and (answer.setting in BEFORE_LINKING[params["provider"]] or has_all_files(prefix)):
            rewrite(note, left)
        lacking = Answer({}, "provider", f"it ended well, but {prefix} lacks what it should have")
        raise CondaError(explain(answer if answer.problem else lacking, params, request, glibc_of(params)))


def clear(prefix: Path, note: str) -> None:
    """Make room for a new environment: remove an empty directory, or with the note MAKING any contents."""
    if note == MAKING and os.path.lexists(prefix):
        shutil.rmtree(prefix)
    elif os.path.lexists(prefix):
        prefix.rmdir()


def ask(
    params: dict,
    run: Run,
    specs: list[Spec],
    before: Packages | None,
    dry_run: bool,
    keep_open: tuple[int, ...] = (),
    is_done: Callable[[], bool] = lambda: False,
) -> Answer:
    """Let a client install the packages or report its plan. Only this step needs internet access and time.

    It is repeated while the network is at fault, the work is incomplete and time is left.
    """
    channels = sorted({each.channel for each in params["locked"]}) or params["channels"]
    latest = time.monotonic() + params["timeout"]
    earlier: list[str] = []
    with tempfile.NamedTemporaryFile("w", prefix="conda_env-", suffix=".txt", encoding="utf-8") as lock_file:
        lock_file.write(params["lock"] or "")
        lock_file.flush()
        command = client_command(params, specs, before, dry_run, lock_file.name)
        for pause in (*PAUSES, params["timeout"]):
            seconds = max(1, round(latest - time.monotonic()))
            code, stdout, stderr = run(clean_command(command, seconds), pass_fds=keep_open)
            answer = parse_answer(code, stdout, stderr, before or {}, params["provider"])
            if answer.setting == "timeout" and earlier:  # because of the network
                answer = Answer({}, "channels", f"{earlier[-1]}; the last attempt was stopped")
                break
            if not may_pass(answer, channels) or is_done() or time.monotonic() + pause >= latest:
                break
            earlier.append(answer.problem)
            if before is None and not dry_run:
                clear(Path(params["prefix"]), MAKING)  # a client must never "create" over remains of the last attempt
            time.sleep(pause)
    if answer.problem and earlier:
        answer = answer._replace(problem=f"tried {len(earlier) + 1} times: {answer.problem}")
    if params["locked"] and answer.setting in ("channels", "specs"):
        return answer._replace(setting="lock")  # only the lock file determines the downloads
    return answer


def client_command(
    params: dict, specs: list[Spec], before: Packages | None, dry_run: bool, lock_file: str
) -> list[str]:
    """Return the client's call, for the lock file if there is one."""
    prefix, channels, locked = (params[name] for name in ("prefix", "channels", "locked"))
    if params["provider"] == "conda":
        client, create = params["client"], before is None
        if locked:
            return _lock.install_command(client, create, prefix, lock_file)
        return conda_command(client, create, prefix, channels, specs, dry_run, skip=params.get("is_whole", False))
    if locked:
        request = _lock.install_request(locked, params["archives"], only_keep=params["state"] == "staged")
    else:
        other = params["host"]
        host = other and describe_host(platform_of(params), other["machine"], other["release"], other["glibc"])
        request = solve_request(channels, specs, before or {}, dry_run, host)
    source = inspect.getsource(_rattler_helper)
    return [params["rattler_python"], "-I", "-c", source, json.dumps({"prefix": prefix, **request})]


def glibc_of(params: dict) -> str:
    """Return the glibc version as solvers read it, of this host or of the host to solve for; it may be empty."""
    if params["host"]:
        return params["host"]["glibc"]
    with suppress(OSError, ValueError):
        found = os.environ.get("CONDA_OVERRIDE_GLIBC", os.confstr("CS_GNU_LIBC_VERSION") or "")
        return found.rpartition(" ")[2]
    return ""


def find_program(params: dict, run: Run) -> dict[str, str]:
    """Return the setting that names the program to run, with its value."""
    if params["provider"] == "rattler":
        return {"rattler_python": params["rattler_python"] or sys.executable}
    wanted = params["client"] or ""
    names = [wanted] if wanted else CLIENTS
    for path in [wanted] if "/" in wanted else client_paths(names, params, run):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return {"client": path}
    searched = "" if "/" in wanted else f" in $MAMBA_EXE, $CONDA_EXE, PATH, a login shell, {', '.join(HOMES)}"
    raise CondaError(
        f"client: no program {' or '.join(names)}{searched}; set client to the path of conda, mamba or "
        "micromamba, module_load to the site's line that brings one, or provider to rattler, which needs none"
    )


def client_paths(names: list[str], params: dict, run: Run) -> Iterator[str]:
    """Yield possible paths of a client, in order of the cost of looking there."""
    for path in (os.environ.get("MAMBA_EXE", ""), os.environ.get("CONDA_EXE", "")):
        if os.path.basename(path) in names:
            yield path
    yield from filter(None, map(shutil.which, names))
    load = params["module_load"]
    code, stdout, stderr = run(clean_command(search_command(load, names), params["timeout"]))
    if code == LOAD_FAILED:
        raise CondaError(f"module_load: {load!r} failed in a login shell: {' '.join(stderr.split())}")
    yield from parse_search(stdout, names)
    for folder, name in itertools.product(HOMES, names):
        yield from sorted(glob.glob(os.path.join(folder.replace("~", str(Path.home())), "bin", name)))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "required": True},
            "specs": {"type": "list", "elements": "str", "required": True},
            "channels": {"type": "list", "elements": "str", "default": ["conda-forge"]},
            "state": {"type": "str", "choices": ["present", "staged"], "default": "present"},
            "provider": {"type": "str", "choices": ["rattler", "conda"], "default": "rattler"},
            "lock": {"type": "str"},
            "archives": {"type": "path"},
            "host": {
                "type": "dict",
                "options": {
                    "system": {"type": "str", "required": True},
                    "machine": {"type": "str", "required": True},
                    "release": {"type": "str", "default": ""},
                    "glibc": {"type": "str", "default": ""},
                    "packages": {"type": "dict"},
                    "satisfied": {"type": "bool", "default": False},
                },
            },
            "update": {"type": "bool", "default": False},
            "lease": {"type": "path"},
            "rattler_python": {"type": "path"},
            "client": {"type": "path"},
            "module_load": {"type": "str"},
            "timeout": {"type": "int", "default": 1800},
            **_slices.OPTIONS,
        },
        required_if=[("state", "staged", ["host", "archives"])],
        supports_check_mode=True,
    )
    run = functools.partial(module.run_command, expand_user_and_vars=False)
    try:
        result = ensure_env(module.params, run, module.check_mode)
    except _slices.Waiting as waiting:
        result = waiting.result()
    except (CondaError, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
