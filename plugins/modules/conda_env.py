#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: conda_env
short_description: Keep packages in a conda environment, with or without conda
author: mala.hpc_db contributors (@mala-project)
description:
  - Creates a conda environment at a path, or brings an existing one to the wanted packages.
  - What is installed is read from the environment itself, in milliseconds. A client runs only when that does not
    satisfy O(specs), and has succeeded only when it does afterwards.
  - Other packages in the environment stay. Its major version of PostgreSQL is never changed, since the data
    directory could not be opened any more; make another environment for another major.
  - An installation that was interrupted is repeated from the start by the next run. The file O(prefix) with
    C(.unfinished) appended marks it until then, and makes a second run at the same time wait for the first.
attributes:
  check_mode:
    support: full
    description:
      - Solves for the diff without leaving anything behind.
      - As long as O(rattler_python) has no py-rattler, the diff shows O(specs) themselves.
  diff_mode:
    support: full
    description: Shows the packages that come, go or change, with version and build.
options:
  prefix:
    description:
      - The environment's absolute path, which is compiled into its packages, so it must not be moved.
      - It may be absent, an empty directory or a conda environment. Anything else is refused, as is a path inside
        another environment unless that is the folder C(envs) of a conda installation.
    type: path
    required: true
  specs:
    description:
      - The packages wanted, as C(name), C(name=17), C(name=17.*), C(name==17.2), C(name>=17,<18) or
        C(name=17.2=build), where C(build) may hold C(*).
      - Needed for O(state=present).
    type: list
    elements: str
  channels:
    description:
      - Where packages come from, first one preferred, as names, URLs or C(file://) folders.
      - No other channels are used, whatever the user's configuration says.
    type: list
    elements: str
    default: [conda-forge]
  state:
    description:
      - V(present) means that the packages are there.
      - V(absent) removes the environment with everything in it. Only an environment is removed, and not one that
        is a conda installation itself.
    type: str
    choices: [present, absent]
    default: present
  provider:
    description:
      - What solves and installs.
      - V(rattler) needs no conda, but an interpreter that has py-rattler.
      - V(conda) uses the conda, mamba or micromamba that is there.
    type: str
    choices: [rattler, conda]
    default: rattler
  rattler_python:
    description:
      - The interpreter of an environment that holds py-rattler, for O(provider=rattler).
      - The one that runs this module if not set.
    type: path
  client:
    description:
      - Path or name of conda, mamba or micromamba, for O(provider=conda).
      - If it is no path, the first of these that has one is used, C(micromamba) before C(mamba) before C(conda) -
        E(MAMBA_EXE) and E(CONDA_EXE), E(PATH), a login shell after O(module_load), the usual folders in the home
        directory such as C(~/miniforge3), and C(/opt/*).
    type: str
  module_load:
    description:
      - The site's line that makes a client available, such as C(module load anaconda).
      - A login shell runs it, if no client was found before.
    type: str
  package_cache:
    description:
      - The folder for downloaded packages, which the environment shares its files with by hard links where both
        are on one file system.
      - The client's own if not set, mostly in the home directory.
    type: path
  timeout:
    description: The longest time in seconds that a client may take, or that another run is waited for.
    type: int
    default: 1800
seealso:
  - module: mala.hpc_db.python_env
"""

EXAMPLES = r"""
- name: Keep PostgreSQL 17, with no conda on the cluster
  mala.hpc_db.conda_env:
    prefix: ~/hpc_db/hpc_db/postgresql-17
    specs: [postgresql=17]
    rattler_python: ~/hpc_db/hpc_db/rattler/bin/python

- name: Keep it by the site's conda
  mala.hpc_db.conda_env:
    prefix: /scratch/alice/postgresql-17
    specs: ["postgresql>=17.2,<18"]
    provider: conda
    module_load: module load anaconda

- name: Remove it
  mala.hpc_db.conda_env:
    prefix: /scratch/alice/postgresql-17
    state: absent
"""

RETURN = r"""
prefix:
  description: The environment's path.
  returned: success
  type: str
bindir:
  description: The folder of its programs. They need no activation.
  returned: success
  type: str
packages:
  description: The version of each package by its name, in check mode as far as it could be solved.
  returned: success
  type: dict
  sample: {libpq: "17.10", postgresql: "17.10"}
"""

import errno
import fcntl
import functools
import glob
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, TextIO

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _rattler_helper
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import (
    Answer,
    CondaError,
    Package,
    Spec,
    all_satisfied,
    allows_major,
    clean_command,
    conda_command,
    difference,
    explain,
    major_of,
    parse_answer,
    parse_record,
    parse_search,
    parse_spec,
    rattler_command,
    search_command,
)

CLIENTS = ["micromamba", "mamba", "conda"]
PLACES = ["~/miniforge3", "~/mambaforge", "~/micromamba", "~/miniconda3", "~/anaconda3", "~/.local", "/opt/*"]

# What an interrupted run leaves in the file beside the prefix.
MAKING = "this run's own, to be thrown away"
CHANGING = "a change of packages"

Packages = dict[str, Package]
Run = Callable[..., tuple[int, str, str]]


def ensure_env(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the environment to the wanted state. ``run`` takes an argument list and returns code, stdout, stderr."""
    prefix, specs = Path(params["prefix"]), wanted_specs(params)
    marker = prefix.with_name(prefix.name + ".unfinished")
    if not prefix.is_absolute():
        raise CondaError(f"prefix: {str(prefix)!r} is not absolute; give a path that begins with / or ~")
    unfinished = marker.read_text() if marker.exists() else ""
    if params["state"] == "absent":
        return ensure_absent(prefix, marker, unfinished, params["timeout"], check_mode)
    before = installed(prefix, unfinished)
    after = before
    if unfinished or before is None or not all_satisfied(before, specs):
        specs = keep_major(specs, before or {})
        if check_mode:
            after = plan(params, run, specs, before)
        else:
            before, after = fulfil(params, run, specs, marker)
    return report(prefix, before, after)


def report(prefix: Path, before: Packages | None, after: Packages | None) -> dict:
    """Return the module's result; None stands for no environment."""
    return {
        "changed": before != after,
        "prefix": str(prefix),
        "bindir": str(prefix / "bin"),
        "packages": {package.name: package.version for package in (after or {}).values()},
        "diff": difference(before or {}, after or {}),
    }


def wanted_specs(params: dict) -> list[Spec]:
    """Return the specs; raise for values that no client should see."""
    specs = [parse_spec(text) for text in params["specs"] or []]
    if params["state"] == "present" and not specs:
        raise CondaError("specs: none are given; name at least one package")
    for channel in params["channels"]:
        if channel.startswith("-") or not channel.isprintable() or not channel.strip():
            raise CondaError(f"channels: {channel!r} is no channel; give a name, a URL or a file:// folder")
    return specs


def installed(prefix: Path, unfinished: str) -> Packages | None:
    """Return the environment's packages, or None where one may be made; raise where neither is so."""
    if not is_env(prefix, unfinished):
        return None
    packages = []
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            packages.append(parse_record(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError):
            raise CondaError(
                f"prefix: {prefix} is a damaged environment: {path.name} cannot be read; remove it with state: absent"
            ) from None
    return {package.name: package for package in packages}


def is_env(prefix: Path, unfinished: str) -> bool:
    """Tell whether the prefix is an environment (or may become one); raise if it is something else."""
    outer = next((parent for parent in prefix.parents if (parent / "conda-meta").is_dir()), None)
    if outer and prefix.parent != outer / "envs":
        raise CondaError(f"prefix: {prefix} lies inside the conda environment {outer}; choose a path outside of it")
    if not os.path.lexists(prefix) or unfinished == MAKING:
        return False
    if (prefix / "conda-meta").is_dir():
        return True
    if prefix.is_dir() and not prefix.is_symlink() and not any(prefix.iterdir()):
        return False
    what = "it has no folder conda-meta" if prefix.is_dir() else "it is no directory"
    raise CondaError(
        f"prefix: {prefix} exists and is no conda environment: {what}; choose a path that does not exist, an empty "
        "directory or an environment"
    )


def keep_major(specs: list[Spec], before: Packages) -> list[Spec]:
    """Return the specs with PostgreSQL's installed major among them; raise if they exclude it."""
    if "postgresql" not in before:
        return specs
    version = before["postgresql"].version
    major = major_of(version)
    for spec in specs:
        if spec.name == "postgresql" and not allows_major(spec, major):
            raise CondaError(
                f"specs: {spec.text} would replace the PostgreSQL {version} that is installed by another major; "
                f"stay with postgresql={major} or choose another prefix"
            )
    return [*specs, parse_spec(f"postgresql={major}")]


def plan(params: dict, run: Run, specs: list[Spec], before: Packages | None) -> Packages:
    """Return what would be installed, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="conda_env-") as scratch:
        cache = params["package_cache"]
        if cache and not os.path.isdir(cache):
            cache = os.path.join(scratch, "cache")
        # not even a dry "create" gets to see the true prefix
        prefix = os.path.join(scratch, "prefix") if before is None else params["prefix"]
        answer = ask(params, run, specs, before, prefix, cache, dry_run=True)
    if answer.setting == "rattler_python":  # in check mode nobody has installed it yet
        missing = [spec for spec in specs if not all_satisfied(before or {}, [spec])]
        unsolved = {spec.name: Package(spec.name, spec.text[len(spec.name) :] or "any", "") for spec in missing}
        return {**(before or {}), **unsolved}
    if answer.problem:
        raise CondaError(explain(answer, params["channels"], specs))
    return answer.packages


def fulfil(
    params: dict, run: Run, specs: list[Spec], marker: Path
) -> tuple[Packages | None, Packages | None]:
    """Create or change the environment; return its packages before and after."""
    prefix = Path(params["prefix"])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_work(marker, params["timeout"]) as note:
        unfinished = note.read()
        before = installed(prefix, unfinished)  # again, since another run may just have ended
        if before is not None and not unfinished and all_satisfied(before, specs):
            return before, before
        specs = keep_major(specs, before or {})
        rewrite(note, MAKING if before is None else CHANGING)
        if before is None:
            clear(prefix, unfinished)
        try:
            answer = ask(
                params, run, specs, before, params["prefix"], params["package_cache"], False, (note.fileno(),)
            )
            if answer.problem:
                raise CondaError(explain(answer, params["channels"], specs))
            after = installed(prefix, "")
            if after is None or not all_satisfied(after, specs):
                raise CondaError(f"prefix: {prefix} does not have {' '.join(spec.text for spec in specs)} afterwards")
        except CondaError:
            if before is None:
                shutil.rmtree(prefix, ignore_errors=True)
                marker.unlink()
            raise
    return before, after
