# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client package: its wheel, made from its sources alone, and what an environment says that it holds.

A wheel is a zip file. pip would make it, too, but would fetch a build system, and login nodes may have no internet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zipfile
from typing import NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils._pip import Failed, normalise

ENTRY_POINTS = "sqlalchemy.plugins"
# One driver has two names: conda's and a distribution's own build is psycopg2.
OTHER_NAMES = {"psycopg2-binary": "psycopg2"}

# What the environment's own Python is asked; an old one has to understand it, too.
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


class Project(NamedTuple):
    """What a wheel's metadata has."""

    name: str
    version: str
    requires_python: str
    dependencies: list[str]
    plugins: dict[str, str]


def probe_command(python: str) -> list[str]:
    """Return the call that asks an environment; what belongs to the user beside it does not count."""
    names = ["hpc-db-client", "sqlalchemy", "psycopg2-binary", "psycopg2", "optuna"]
    return [python, "-I", "-c", PROBE, json.dumps(names)]


def parse_probe(stdout: str) -> dict:
    """Return the answer; a site may print lines of its own before it."""
    answers = [line[len("hpc_db ") :] for line in stdout.splitlines() if line.startswith("hpc_db ")]
    if not answers:
        raise Failed("it does not answer as a Python does")
    return json.loads(answers[-1])


def read_project(text: str) -> Project:
    """Return what a pyproject.toml says. Python 3.9 has no tomllib, but texts and lists are JSON's as well there."""

    def value(key: str) -> str:
        found = re.search(rf'^{key} = (".*?"|\[.*?\])$', text, re.MULTILINE | re.DOTALL)
        if not found:
            raise Failed(f"project: it does not say what its {key} is")
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
    """Return the normalised name and the versions of a requirement."""
    name = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    if not name:
        raise Failed(f"project: {requirement!r} is no requirement")
    return normalise(name[0]), requirement[name.end() :]


def allows(versions: str, version: str) -> bool:
    """Tell whether a version is among those that a requirement allows, which are bounded by >= and < alone."""
    def numbers(text: str) -> list[int]:
        found = [int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number]  # type: ignore[index]
        return found + [0] * (4 - len(found))

    held = numbers(version)
    return all(
        held >= numbers(limit) if sign == ">=" else held < numbers(limit)
        for sign, limit in re.findall(r"(>=|<)\s*([\d.]+)", versions)
    )


def wheel_name(project: Project) -> str:
    """Return the file name that pip expects."""
    return f"{normalise(project.name).replace('-', '_')}-{project.version}-py3-none-any.whl"


def write_wheel(folder: str, project: Project, files: dict[str, str]) -> str:
    """Write the wheel into ``folder`` and return its path. The same sources give the same bytes."""
    path = os.path.join(folder, wheel_name(project))
    info = "-".join(wheel_name(project).split("-")[:2]) + ".dist-info"
    plugins = "".join(f"{name} = {value}\n" for name, value in sorted(project.plugins.items()))
    metadata = [
        "Metadata-Version: 2.1", f"Name: {project.name}", f"Version: {project.version}",
        "License: GPL-3.0-or-later", f"Requires-Python: {project.requires_python}",
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
            entry = zipfile.ZipInfo(name)  # of 1980, whenever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return path


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return "sha256=" + digest.decode().rstrip("=")
