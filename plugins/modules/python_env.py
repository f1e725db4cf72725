#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: python_env
short_description: Install Python packages into their own folder
description:
  - Installs the given requirements into a virtual environment or a flat folder of packages, or downloads the wheels
    for another host.
  - The installed packages are read from the folder itself, in milliseconds. pip runs only if something is missing.
  - The next run repeats an interrupted installation from the start. Until then the file O(path) with C(.unfinished)
    appended marks it. A second run waits at most 10 minutes for the first one, or for a pip that has outlived its
    run.
author: mala.hpc_db contributors (@mala-project)
options:
  path:
    description: Path of the folder. An existing folder that this module did not create is refused.
    type: path
    required: true
  requirements:
    description:
      - Lines of a pip requirements file. Each begins with the project's name and may have hashes.
      - If one requirement has a hash, all need one (pip's rule).
    type: list
    elements: str
    required: true
  python:
    description: Python that creates the environment, or whose pip fills a flat folder. Version 3.9 or newer.
    type: path
    required: true
  layout:
    description:
      - V(venv) is a virtual environment with its own C(bin/python).
      - V(flat) is a folder of unpacked packages. O(python) must have pip.
      - V(wheels) is a folder of wheels for O(host), which may have no internet. Use it as O(wheelhouse) on that host.
        O(python) must have pip.
    type: str
    choices: [venv, flat, wheels]
    default: venv
  host:
    description: Host that will install the wheels, for O(layout=wheels).
    type: dict
    suboptions:
      python:
        description: Version of the host's Python, such as V(3.11.2).
        type: str
        required: true
      machine:
        description: Output of C(uname -m) on the host.
        type: str
        required: true
      glibc:
        description: Version of the host's glibc, such as V(2.28).
        type: str
        required: true
  index_url:
    description:
      - URL of the package index, instead of pip's own default.
      - Put credentials into the user's pip configuration.
    type: str
  wheelhouse:
    description: Folder with all required packages, for hosts without internet. Replaces the index.
    type: path
  beside:
    description:
      - Additional virtual environments with the same O(python) and package source. They are created in parallel.
      - A failure in one environment does not stop the others.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path of the folder, as for O(path).
        type: path
        required: true
      requirements:
        description: Requirements of this environment, as for O(requirements).
        type: list
        elements: str
        required: true
  advice:
    description: Hint for the message if pip fails, instead of one that names settings of the role postgres.
    type: str
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.slices
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Install the management environment
  mala.hpc_db.python_env:
    path: ~/hpc_db/hpc_db/python
    python: /usr/bin/python3
    requirements:
      - psycopg2-binary>=2.9
      - optuna>=3.2
"""

RETURN = r"""
python:
  description: Python that can import the packages. All return values refer to O(path).
  returned: success
  type: str
packages:
  description: Version of each installed package, by its normalised name.
  returned: success
  type: dict
site_packages:
  description: Folder that contains the packages.
  returned: success
  type: str
"""

import functools
import glob
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _slices
from ansible_collections.mala.hpc_db.plugins.module_utils._marker import alone_at, rewrite
from ansible_collections.mala.hpc_db.plugins.module_utils._pip import (
    OFFLINE,
    Failed,
    call,
    explain,
    normalise,
    pip_command,
    source_arguments,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

# The first version of pip that installs manylinux_2_x wheels.
OLDEST_PIP = (20, 3)
# File that this module writes into a complete folder: the requirements as they were given.
STAMP = "hpc_db-requirements.txt"
# Suffix of the file beside a folder that is being filled: if it exists, an earlier run was interrupted.
UNFINISHED = ".unfinished"
# Seconds to wait for another run, or for a pip that outlived its run: it may have to download 100 MB.
PATIENCE = 600

Run = Callable[..., str]


# Former names of manylinux_2_x.
OLD_MANYLINUX = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


def required_names(requirements: list[str]) -> list[str]:
    """Return the names of the required projects. A line with a marker is left out, because pip evaluates the marker."""
    names = []
    for line in requirements:
        name = re.match(r"[A-Za-z0-9][\w.-]*", line.strip())
        if not name or len(line.splitlines()) > 1:
            raise Failed(f"requirements: {line!r} does not begin with a project's name")
        if ";" not in line:
            names.append(normalise(name.group().rstrip(".-_")))
    return names


def site_packages(path: str, layout: str) -> str:
    """Return the folder below ``path`` that contains the packages."""
    if layout != "venv":
        return path
    found = sorted(glob.glob(os.path.join(glob.escape(path), "lib", "python3*", "site-packages")))
    return found[-1] if found else os.path.join(path, "lib")


def installed(folder: str) -> dict[str, str]:
    """Return name and version of each package that has its metadata or a wheel in ``folder``."""
    names = (os.path.basename(each) for each in glob.glob(os.path.join(glob.escape(folder), "*.dist-info")))
    wheels = (os.path.basename(each) for each in glob.glob(os.path.join(glob.escape(folder), "*.whl")))
    both = [*(name[: -len(".dist-info")] for name in names), *("-".join(name.split("-")[:2]) for name in wheels)]
    return {normalise(name): version for name, _dash, version in sorted(each.rpartition("-") for each in both)}


def stamp(params: dict) -> str:
    """Return the stamp of the given requirements, as a requirements file."""
    host = params["host"] and json.dumps(params["host"], sort_keys=True)
    return "".join(f"{line}\n" for line in [*params["requirements"], *([f"# for {host}"] if host else [])])


def is_satisfied(params: dict) -> bool:
    """Return whether the folder was filled from exactly these requirements and still has all of them."""
    path, layout = params["path"], params["layout"]
    try:
        with open(os.path.join(path, STAMP), encoding="utf-8") as stream:
            given = stream.read()
    except OSError:
        return False
    # A venv is unusable once its interpreter has been removed.
    usable = layout != "venv" or os.access(os.path.join(path, "bin", "python"), os.X_OK)
    present = installed(site_packages(path, layout))
    wanted = required_names(params["requirements"])
    return usable and given == stamp(params) and all(name in present for name in wanted)


def pip_arguments(params: dict, requirements_file: str) -> list[str]:
    """Return pip's arguments for installing or downloading the requirements."""
    verb = "download" if params["layout"] == "wheels" else "install"
    arguments = ["--disable-pip-version-check", "--no-input", verb, "--quiet", "--only-binary=:all:"]
    arguments += source_arguments(params["wheelhouse"], params["index_url"])
    if params["layout"] == "flat":
        arguments += ["--no-deps", "--upgrade", f"--target={params['path']}"]
    if params["layout"] == "wheels":
        arguments += [f"--dest={params['path']}", f"--python-version={params['host']['python']}", "--implementation=cp"]
        arguments += [f"--platform={name}_{params['host']['machine']}" for name in platforms(params["host"]["glibc"])]
    return [*arguments, f"--requirement={requirements_file}"]


def platforms(glibc: str) -> list[str]:
    """Return pip's names of the platforms that a host with this glibc supports, the newest first."""
    found = re.fullmatch(r"2\.(\d{1,3})", glibc)
    if not found:
        raise Failed(f"host: {glibc!r} is not a version of glibc; allowed is one such as 2.28")
    minors = range(int(found.group(1)), 4, -1)
    former = [OLD_MANYLINUX[minor] for minor in minors if minor in OLD_MANYLINUX]
    return [*(f"manylinux_2_{minor}" for minor in minors), *former, "linux"]


def markers(host: dict) -> dict[str, str]:
    """Return the values of another host with which pip compares the markers of requirements."""
    return {
        "implementation_name": "cpython", "implementation_version": host["python"], "os_name": "posix",
        "platform_machine": host["machine"], "platform_python_implementation": "CPython", "platform_system": "Linux",
        "python_full_version": host["python"], "python_version": ".".join(host["python"].split(".")[:2]),
        "sys_platform": "linux",
    }


def pip_is_old(text: str) -> bool:
    """Return whether pip, by the output of ``pip --version``, is too old for current wheels."""
    found = re.search(r"pip (\d+)\.(\d+)", text)
    return found is not None and (int(found.group(1)), int(found.group(2))) < OLDEST_PIP


def bring(params: dict, run: Run) -> bool:
    """Create the environment and install into it; return whether this was still necessary.

    A run after an interruption completes the work: it waits for a pip that still runs, and starts again.
    """
    path, marker = params["path"], Path(params["path"] + UNFINISHED)
    marker.parent.mkdir(parents=True, exist_ok=True)
    with alone_at(marker, PATIENCE, "path", params) as note:
        left = note.read()
        if not left and is_satisfied(params):  # another run has finished it since
            return False
        # A venv without its interpreter is created again: its packages are below that interpreter's version.
        unusable = params["layout"] == "venv" and not os.path.exists(os.path.join(path, "bin", "python"))
        # Wheels are all downloaded again, otherwise those of other versions would remain among them.
        if left or unusable or params["layout"] == "wheels":
            shutil.rmtree(path, ignore_errors=True)
        rewrite(note, stamp(params))
        fill(params, functools.partial(run, pass_fds=(note.fileno(),)))
        close_to_others(path)
        # The stamp comes last, by a rename: it exists only once everything else does.
        os.rename(marker, os.path.join(path, STAMP))
    return True


def fill(params: dict, run: Run) -> None:
    """Create the environment, including pip in a venv, and let pip install or download."""
    path, python = params["path"], params["python"]
    if params["layout"] == "venv":
        if not os.path.exists(os.path.join(path, "bin", "python")):
            run([params["python"], "-m", "venv", path])
        python = os.path.join(path, "bin", "python")
        if pip_is_old(run(pip_command(python, ["--version"]))):
            run(pip_command(python, [*pip_arguments(params, os.devnull)[:-1], "--upgrade", "pip"]))
    host = markers(params["host"]) if params["layout"] == "wheels" else None
    run(pip_command(python, pip_arguments(params, path + UNFINISHED), host))


def close_to_others(path: str) -> None:
    """Remove all permissions of group and others: pip grants some regardless of the umask."""
    for folder, _folders, names in os.walk(path):
        for entry in [folder, *(os.path.join(folder, name) for name in names)]:
            if not os.path.islink(entry):
                os.chmod(entry, os.stat(entry).st_mode & 0o700)


def check_path(path: str) -> None:
    """Refuse a folder that was not created by this module."""
    if not os.path.isabs(path):
        raise Failed(f"path: {path!r} is not absolute; give a path that begins with / or ~")
    ours = os.path.exists(os.path.join(path, STAMP)) or os.path.exists(path + UNFINISHED)
    if os.path.lexists(path) and not ours and not (os.path.isdir(path) and not os.listdir(path)):
        raise Failed(f"{path} exists and was not made by this collection; move it away or choose another instance_root")


def ensure_packages(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the folder to the wanted state.

    ``run`` takes an argument list, and in ``pass_fds`` the files that the program keeps open, and returns stdout.
    """
    required_names(params["requirements"])
    path, layout = params["path"], params["layout"]
    check_path(path)
    before = installed(site_packages(path, layout))
    changed = os.path.exists(path + UNFINISHED) or not is_satisfied(params)
    there = os.path.exists(os.path.join(path, "bin", "python")) and not os.path.exists(path + UNFINISHED)
    if changed and layout == "venv" and not there:
        run([params["python"], "-m", "ensurepip", "--version"])
    if changed and not check_mode:
        changed = bring(params, run)
    folder = site_packages(path, layout)
    after = installed(folder)
    missing = [name for name in required_names(params["requirements"]) if name not in after]
    if missing and not check_mode:
        raise Failed(f"{path}: pip ended well but did not install {', '.join(missing)}")
    planned = dict.fromkeys(missing, "to be installed")
    return {
        "changed": changed,
        "python": os.path.join(path, "bin", "python") if layout == "venv" else params["python"],
        "packages": after,
        "site_packages": folder,
        "diff": {"before": as_lines(before), "after": as_lines({**after, **planned})},
    }


def ensure_all(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring all folders to the wanted state concurrently; return the result of the first."""
    each = [params, *({**params, "layout": "venv", **other} for other in params["beside"])]
    # Concurrently, because pip handles many small files on a file system with a high latency.
    with ThreadPoolExecutor(len(each)) as pool:
        running = [pool.submit(ensure_packages, one, run, check_mode) for one in each]
    results = [one.result() for one in running]
    diffs = [
        {**result["diff"], "before_header": one["path"], "after_header": one["path"]}
        for one, result in zip(each, results) if result["changed"]
    ]
    return {**results[0], "changed": any(result["changed"] for result in results), "diff": diffs}


def as_lines(packages: dict[str, str]) -> str:
    """Return packages as text for a diff."""
    return "".join(f"{name} {version}\n" for name, version in sorted(packages.items()))


def run_command(module: AnsibleModule, command: list[str], pass_fds: tuple[int, ...] = ()) -> str:
    """Run pip or venv; raise Failed with the end of its output."""
    returncode, stdout, stderr = call(module, command, pass_fds)
    if returncode and "ensurepip" in f"{command[:3]} {stdout} {stderr}":
        wrong = "cannot make environments with pip"
        if not module.params["advice"]:
            wrong = "cannot make environments with pip: set postgres_python to one that can"
        raise Failed(
            f"{explain(command, stdout, stderr)} ({command[0]} {wrong}; Debian and Ubuntu have the package "
            "python3-venv for it)"
        )
    if returncode:
        offline = module.params["advice"] or OFFLINE
        if module.params["layout"] == "wheels":
            offline = "the workstation asks for it: set postgres_python_index_url, or a folder of wheels there"
        raise Failed(explain(command, stdout, stderr, offline))
    return stdout


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "requirements": {"type": "list", "elements": "str", "required": True},
            "python": {"type": "path", "required": True},
            "layout": {"type": "str", "choices": ["venv", "flat", "wheels"], "default": "venv"},
            "host": {
                "type": "dict",
                "options": {name: {"type": "str", "required": True} for name in ("python", "machine", "glibc")},
            },
            "index_url": {"type": "str"},
            "wheelhouse": {"type": "path"},
            "beside": {"type": "list", "elements": "dict", "default": [], "options": {
                "path": {"type": "path", "required": True},
                "requirements": {"type": "list", "elements": "str", "required": True},
            }},
            "advice": {"type": "str"},
            **_slices.OPTIONS,
        },
        required_if=[("layout", "wheels", ["host"])],
        supports_check_mode=True,
    )
    os.umask(0o077)
    try:
        result = ensure_all(module.params, functools.partial(run_command, module), module.check_mode)
    except _slices.Waiting as waiting:
        result = waiting.result()
    except (Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
