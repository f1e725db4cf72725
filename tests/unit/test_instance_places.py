# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every place in the instance directory is compared by the quick check, or ignored by it for a documented reason.

A role that writes to a new place fails this test until the quick check compares the place, or it is in IGNORED.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.module_utils._plan import programs
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.modules.quick_check import FOLDERS

ROOT = Path(__file__).parents[2]
# The places that the quick check ignores. A name that ends with "-" is followed by a version or by random characters.
IGNORED = {
    # Packages and programs: a full run compares them with the settings.
    "postgresql-", "system-", "python", "rattler", "pgbouncer",
    # PostgreSQL's data: a full run ensures that it exists, and brings roles, databases and studies to the settings.
    "data",
    # Written by the running server job: a full run ensures that the folders exist and are private.
    "run", "log", "dumps",
    # Packages from the workstation: removed at the end of the same run.
    "staged",
    # Written by the playbook workers.yml, which has no quick check.
    "workers",
    # Temporary folders of the doctor and of reports: removed at the end of the same run.
    ".doctor-", ".trials-",
}
# The instance directory in a task, variable or template, followed by a name, by a variable in a path, or by neither.
USE = re.compile(r"hpc_db\.(?:instance_)?root\b(.{0,60})")
NAME = re.compile(r"(?: \}\}/| ~ '/)([\w.-]+)")
VARIABLE = re.compile(r"(?: \}\}/| ~ '/' ~ )(?:\{\{ )?([\w.]+)")
BARE = re.compile(r" \}\}(?!/)| \| quote|\) \| list")
# What files of the module "instance" are called in an expression: a name, or a variable.
IN_EXPRESSION = re.compile(r"(?:'path': |path: \{\{ \(?|query\('mala\.hpc_db\.supervisor', )('?)([\w.-]+)")


@cache
def role_files() -> dict[Path, str]:
    """Return the text of each file that Ansible evaluates."""
    patterns = ("playbooks/*.yml", "roles/*/tasks/*.yml", "roles/*/vars/*.yml", "roles/*/defaults/*.yml",
                "roles/*/templates/**/*.j2")
    return {path: path.read_text() for pattern in patterns for path in sorted(ROOT.glob(pattern))}


@cache
def variables() -> dict[str, Any]:
    """Return the variables of all roles, and the prefix of each temporary folder by the name of its result."""
    found: dict[str, Any] = {}
    for path in ROOT.glob("roles/*/vars/main.yml"):
        found.update(yaml.safe_load(path.read_text()) or {})
    found.update((task["register"], task["ansible.builtin.tempfile"]["prefix"])
                 for task in tasks() if "register" in task and "ansible.builtin.tempfile" in task)
    # The loop over the environments of pip in roles/postgres/tasks/stage.yml.
    return {**found, "item": re.findall(r"folder: (\w+)", role_files()[ROOT / "roles/postgres/vars/main.yml"])}


@cache
def tasks() -> list[dict[str, Any]]:
    """Return every mapping in the roles' tasks that could be a task."""

    def inside(content: Any) -> Iterator[dict[str, Any]]:
        if isinstance(content, dict):
            yield content
        for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
            yield from inside(each)

    texts = [text for path, text in role_files().items() if path.parent.name == "tasks"]
    return [task for text in texts for task in inside(yaml.safe_load(text))]


def first(path: Any) -> set[str]:
    """Return the places that a path relative to the instance directory is in. Unknown expressions are an error."""
    if isinstance(path, list):
        return {place for each in path for place in first(each)}
    variable = re.match(r"\{\{ *([\w.]+)", path)
    if variable:
        return resolve(variable[1])
    name = re.match(r"[\w.-]+", path)
    assert name, f"cannot tell which place {path!r} is"
    return {name[0]}


def resolve(name: str) -> set[str]:
    """Return the places that a variable in a path stands for."""
    if name.startswith("hpc_db."):
        made = programs({"postgres_major": 17, "postgres_provider": "rattler"}, "")
        return first(made[name.partition(".")[2]].lstrip("/"))
    assert name in variables(), f"cannot tell which places {name} is"
    value = variables()[name]
    inside = IN_EXPRESSION.findall(value) if isinstance(value, str) else []
    return in_expression(inside) if inside else first(value)


def in_expression(found: list[tuple[str, str]]) -> set[str]:
    return {place for quote, name in found for place in ({name} if quote else resolve(name))}


def named_below_root() -> dict[str, str]:
    """Return each place that a path in roles and playbooks names, with one file that does."""
    found = {}
    for path, text in role_files().items():
        for tail in USE.findall(text):
            name, variable = NAME.match(tail), VARIABLE.match(tail)
            assert name or variable or BARE.match(tail), f"{path}: cannot tell which place root{tail} is"
            for place in {name[1]} if name else resolve(variable[1]) if variable else set():
                found[place] = str(path)
    return found


def written_by_tasks() -> dict[str, str]:
    """Return each place that the tasks with the module ``instance``, or for a temporary folder, write."""
    found = {}
    for task in tasks():
        made = task.get("mala.hpc_db.instance")
        for_root = isinstance(made, dict) and "hpc_db." in str(made.get("root"))
        for path in made.get("directories", []) if for_root else ():
            found.update(dict.fromkeys(first(path), task["name"]))
        files = made.get("files", []) if for_root else []
        if isinstance(files, list):
            found.update((place, task["name"]) for each in files for place in first(each["path"]))
        else:
            inside = IN_EXPRESSION.findall(files)
            found.update(dict.fromkeys(in_expression(inside) if inside else first(files), task["name"]))
        temporary = task.get("ansible.builtin.tempfile", {})
        if temporary.get("path") == "{{ hpc_db.root }}":
            found[temporary["prefix"]] = task["name"]
    return found


def named_by_python() -> dict[str, str]:
    """Return each place that the supervisor and the plugins name."""
    layout = Layout("")
    paths = [path for path in vars(layout).values() if path]
    paths += [getattr(layout, name)(17) for name, value in vars(Layout).items() if callable(value) and name[0] != "_"]
    found = {path.partition("/")[0]: "layout.py" for path in paths}
    plan = (ROOT / "plugins/module_utils/_plan.py").read_text()
    return {**found, **dict.fromkeys(re.findall(r"\{root\}/([\w.-]+)", plan), "_plan.py")}


@pytest.mark.parametrize("find", [named_below_root, written_by_tasks, named_by_python])
def test_every_place_is_compared_or_ignored_for_a_reason(find: Any) -> None:
    found = find()

    assert len(found) > 5
    for place, where in found.items():
        known = re.sub(r"^(postgresql-|system-).*", r"\1", place)
        assert known in {*FOLDERS, *IGNORED}, f"{where}: nothing compares {place}: see quick_check, or IGNORED"


def test_every_reason_is_still_needed() -> None:
    found = {**named_below_root(), **written_by_tasks(), **named_by_python()}
    known = {re.sub(r"^(postgresql-|system-).*", r"\1", place) for place in found}

    assert known == {*FOLDERS, *IGNORED}


def test_python_names_places_in_the_layout_only() -> None:
    joined = re.compile(r"""join\((?:self\.)?(?:params\["root"\]|root), f?["']""")

    assert not [str(path) for path in ROOT.glob("plugins/**/*.py") if joined.search(path.read_text())]
