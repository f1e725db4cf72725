#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: client_package
short_description: Install the client package into the workers' environment
description:
  - Installs the client package into an environment of the user, and a database driver if there is none. The package's
    SQLAlchemy plugin makes workers wait for their server.
  - Builds the package's wheel from its sources itself, so that no build system is downloaded.
  - Changes no other packages. An incompatible version of SQLAlchemy or of the driver is refused, not replaced,
    because other packages may need it.
author: mala.hpc_db contributors (@mala-project)
options:
  environment:
    description:
      - Folder of a conda or virtual environment, or path of its Python. Python 3.9 or newer.
      - It must belong to this user and have pip.
    type: path
    required: true
  project:
    description: Content of the package's C(pyproject.toml).
    type: str
    required: true
  files:
    description: Content of each of the package's Python files, by its path in the wheel.
    type: dict
    required: true
  index_url:
    description:
      - URL of the package index for missing packages, instead of pip's own default.
      - Put credentials into the user's pip configuration.
    type: str
  wheelhouse:
    description: Folder with all packages that may be missing, for hosts without internet. Replaces the index.
    type: path
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
seealso:
  - module: mala.hpc_db.python_env
"""

EXAMPLES = r"""
- name: Install the client package
  mala.hpc_db.client_package:
    environment: ~/miniforge3/envs/mala
    project: "{{ lookup('ansible.builtin.file', 'client/pyproject.toml') }}"
    files:
      hpc_db_client/__init__.py: "{{ lookup('ansible.builtin.file', 'client/src/hpc_db_client/__init__.py') }}"
"""

RETURN = r"""
python:
  description: Path of the environment's Python.
  returned: success
  type: str
packages:
  description: Versions of the client package, SQLAlchemy, the driver and Optuna, if installed.
  returned: success
  type: dict
missing:
  description: Other requirements that were, or would be, installed, as lines of a pip requirements file.
  returned: success
  type: list
  elements: str
host:
  description: Platform of the environment's wheels, in the format of O(mala.hpc_db.python_env#module:host).
  returned: success
  type: dict
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import zipfile
from typing import Callable, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._pip import (
    Failed,
    call,
    explain,
    normalise,
    pip_command,
    source_arguments,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

OLDEST_PYTHON = [3, 9]

ENTRY_POINTS = "sqlalchemy.plugins"
# The driver has two names: conda and Linux distributions call their own build psycopg2.
OTHER_NAMES = {"psycopg2-binary": "psycopg2"}

# Runs in the environment's own Python. Its syntax must also work in an old Python.
PROBE = r"""
import hashlib, json, os, sys, sysconfig
said = {"version": list(sys.version_info[:3]), "executable": sys.executable}
if sys.version_info >= (3, 9):
    import importlib.metadata, importlib.util, platform
    site = sysconfig.get_paths()["purelib"]
    own = sys.prefix == sys.base_prefix
    said["machine"], said["glibc"] = platform.machine(), platform.libc_ver()[1]
    said["site"], said["writable"] = site, os.access(site, os.W_OK)
    said["managed"] = own and os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
    said["pip"] = importlib.util.find_spec("pip") is not None
    said["packages"], said["files"], said["entry_points"], said["driver"] = {}, {}, {}, ""
    for name in json.loads(sys.argv[1]):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        said["packages"][name] = found.version
        if name == "hpc-db-client":
            for each in found.entry_points:
                said["entry_points"][each.name] = each.value
            for path in found.files or []:
                if str(path).startswith("hpc_db_client/") and str(path).endswith(".py") and path.locate().is_file():
                    said["files"][str(path)] = hashlib.sha256(path.locate().read_bytes()).hexdigest()
    try:
        import psycopg2
    except Exception as error:
        said["driver"] = " ".join(str(error).split())
print("hpc_db " + json.dumps(said))
"""

Run = Callable[[list[str]], str]


class Project(NamedTuple):
    """The metadata that the wheel needs."""

    name: str
    version: str
    requires_python: str
    dependencies: list[str]
    plugins: dict[str, str]


def probe_command(python: str) -> list[str]:
    """Return the call that inspects an environment; -I excludes the user's own site-packages."""
    names = ["hpc-db-client", "sqlalchemy", "psycopg2-binary", "psycopg2", "optuna"]
    return [python, "-I", "-c", PROBE, json.dumps(names)]


def parse_probe(stdout: str) -> dict:
    """Return the probe's answer; a site's start-up files may print lines before it."""
    answers = [line[len("hpc_db ") :] for line in stdout.splitlines() if line.startswith("hpc_db ")]
    if not answers:
        raise Failed("it is not a Python")
    return json.loads(answers[-1])


def read_project(text: str) -> Project:
    """Parse a pyproject.toml. Python 3.9 has no tomllib, but the strings and lists in this file are also valid JSON."""

    def value(key: str) -> str:
        found = re.search(rf'^{key} = (".*?"|\[.*?\])$', text, re.MULTILINE | re.DOTALL)
        if not found:
            raise Failed(f"project: its {key} is missing")
        return re.sub(r",\s*\]$", "]", found[1])

    plugins = re.search(rf'^\[project\.entry-points\."{re.escape(ENTRY_POINTS)}"\]\n((?:\w.*\n)+)', text, re.MULTILINE)
    try:
        return Project(
            json.loads(value("name")), json.loads(value("version")), json.loads(value("requires-python")),
            json.loads(value("dependencies")),
            dict(re.findall(r'^(\w+) = "(.+)"$', plugins[1] if plugins else "", re.MULTILINE)),
        )
    except ValueError as error:
        raise Failed(f"project: {error}") from None


def project_of(requirement: str) -> tuple[str, str]:
    """Return the normalised name and the version bounds of a requirement."""
    name = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    if not name:
        raise Failed(f"project: {requirement!r} is not a requirement")
    return normalise(name[0]), requirement[name.end() :]


def allows(versions: str, version: str) -> bool:
    """Return whether the version satisfies the bounds; only >= and < are supported."""
    def numbers(text: str) -> list[int]:
        found = [int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number]  # type: ignore[index]
        return found + [0] * (4 - len(found))

    held = numbers(version)
    return all(
        held >= numbers(limit) if sign == ">=" else held < numbers(limit)
        for sign, limit in re.findall(r"(>=|<)\s*([\d.]+)", versions)
    )


def wheel_name(project: Project) -> str:
    """Return the wheel's file name as pip expects it."""
    return f"{normalise(project.name).replace('-', '_')}-{project.version}-py3-none-any.whl"


def write_wheel(folder: str, project: Project, files: dict[str, str]) -> str:
    """Write the wheel into ``folder`` and return its path. The same sources give the same bytes.

    pip could build a wheel too, but it would download a build system, and login nodes may have no internet access.
    """
    path = os.path.join(folder, wheel_name(project))
    info = "-".join(wheel_name(project).split("-")[:2]) + ".dist-info"
    plugins = "".join(f"{name} = {value}\n" for name, value in sorted(project.plugins.items()))
    metadata = [
        "Metadata-Version: 2.1", f"Name: {project.name}", f"Version: {project.version}",
        "License: BSD-3-Clause", f"Requires-Python: {project.requires_python}",
        *(f"Requires-Dist: {dependency}" for dependency in project.dependencies),
    ]
    content = {
        **files,
        f"{info}/METADATA": "\n".join([*metadata, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: mala.hpc_db\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{ENTRY_POINTS}]\n{plugins}",
    }
    record = "".join(f"{name},{_digest(text)},{len(text.encode())}\n" for name, text in sorted(content.items()))
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(content.items()):
            entry = zipfile.ZipInfo(name)  # dated 1980, so that the bytes do not depend on the build time
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return path


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return "sha256=" + digest.decode().rstrip("=")


def python_of(environment: str) -> str:
    """Return the path of the environment's Python, without resolving links: a virtual environment's Python is one."""
    if not os.path.isabs(environment):
        raise Failed(f"{environment!r} is not absolute; give a path that begins with / or ~")
    python = os.path.join(environment, "bin", "python") if os.path.isdir(environment) else environment
    if not os.path.isfile(python):
        raise Failed(
            f"{python} does not exist; give the folder of a conda or virtual environment, or the path of its Python"
        )
    return python


def ask(python: str, run: Run) -> dict:
    """Return the environment's contents, as found by the probe."""
    held = parse_probe(run(probe_command(python)))
    if held["version"] < OLDEST_PYTHON:
        version = ".".join(str(number) for number in held["version"])
        raise Failed(f"{python} is Python {version}, but the client package needs 3.9 or newer")
    return held


def look_at_dependencies(project: Project, held: dict) -> tuple[list[str], Project]:
    """Return the missing requirements, and the project with its dependencies named as in this environment."""
    missing, named = [], []
    for requirement in project.dependencies:
        name, versions = project_of(requirement)
        present = next((each for each in (name, OTHER_NAMES.get(name)) if each in held["packages"]), None)
        if present is None:
            missing.append(requirement)
        elif not allows(versions, held["packages"][present]):
            raise Failed(
                f"{present} {held['packages'][present]} there is not allowed; the client package needs {requirement}:"
                " change it yourself, since other packages may depend on this version"
            )
        elif "psycopg2" in present and held["driver"]:
            raise Failed(f"its Python cannot import psycopg2, though it is there: {held['driver']}")
        named.append(f"{present}{versions}" if present else requirement)
    return missing, project._replace(dependencies=named)


def has_client(project: Project, files: dict[str, str], held: dict) -> bool:
    """Return whether exactly this client package is installed."""
    wanted = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    return (
        held["packages"].get(project.name) == project.version
        and held["files"] == wanted
        and held["entry_points"] == project.plugins
    )


def check_installable(held: dict) -> None:
    """Refuse an environment that the user must not change."""
    if held["managed"] or not held["writable"]:
        why = "belongs to the operating system" if held["managed"] else f"is not yours to write to ({held['site']})"
        raise Failed(
            f"it {why}; make an environment of your own, as with: {held['executable']} -m venv"
            " --system-site-packages DIR"
        )
    if not held["pip"]:
        raise Failed(f"it has no pip; install it there, as with: {held['executable']} -m ensurepip")


def install(params: dict, project: Project, missing: list[str], python: str, run: Run) -> None:
    """Install the missing requirements, then the client package."""
    pip = ["--disable-pip-version-check", "--no-input", "install", "--quiet"]
    if missing:
        source = source_arguments(params["wheelhouse"], params["index_url"])
        run(pip_command(python, [*pip, "--only-binary=:all:", *source, *missing]))
    with tempfile.TemporaryDirectory(prefix="hpc_db-client-") as folder:
        wheel = write_wheel(folder, project, params["files"])
        run(pip_command(python, [*pip, "--no-index", "--no-deps", "--force-reinstall", wheel]))


def ensure_client(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the environment to the wanted state. ``run`` takes an argument list and returns its stdout."""
    project = read_project(params["project"])
    python = python_of(params["environment"])
    held = ask(python, run)
    missing, named = look_at_dependencies(project, held)
    changed = bool(missing) or not has_client(project, params["files"], held)
    before = held["packages"]
    if changed:
        check_installable(held)
        if not check_mode:
            install(params, named, missing, python, run)
            held = ask(python, run)
            if look_at_dependencies(project, held)[0] or not has_client(project, params["files"], held):
                raise Failed("pip succeeded but did not install everything there")
    planned = {project.name: project.version, **{project_of(each)[0]: "to be installed" for each in missing}}
    return {
        "changed": changed,
        "python": python,
        "packages": held["packages"],
        "missing": missing,
        "host": {
            "python": ".".join(str(number) for number in held["version"]), "machine": held["machine"],
            "glibc": held["glibc"],
        },
        "diff": {"before": as_lines(before), "after": as_lines({**planned, **held["packages"]} if changed else before)},
    }


def as_lines(packages: dict[str, str]) -> str:
    """Return packages as text for a diff."""
    return "".join(f"{name} {version}\n" for name, version in sorted(packages.items()))


def run_command(module: AnsibleModule, command: list[str]) -> str:
    """Run a Python command; raise Failed with the end of its output."""
    returncode, stdout, stderr = call(module, command)
    if returncode:
        raise Failed(explain(command, stdout, stderr))
    return stdout


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "environment": {"type": "path", "required": True},
            "project": {"type": "str", "required": True},
            "files": {"type": "dict", "required": True},
            "index_url": {"type": "str"},
            "wheelhouse": {"type": "path"},
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_client(module.params, lambda command: run_command(module, command), module.check_mode)
    except (Failed, OSError) as error:
        module.fail_json(msg=f"client_environment: {one_line(error)}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
