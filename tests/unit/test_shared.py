# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The dictionary hpc_db that the roles share: a skipped task that registers it would empty it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMPORTS = ("ansible.builtin.import_role", "ansible.builtin.import_tasks")
FILES = sorted([*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")])


def tasks_of(path: Path) -> list[dict]:
    """Return the tasks of a task file or a playbook."""
    found = yaml.safe_load(path.read_text()) or []
    if path.parent.name != "playbooks":
        return found
    return [task for play in found for part in ("pre_tasks", "tasks", "post_tasks") for task in play.get(part, [])]


def registering(tasks: list[dict], folder: Path, is_conditional: bool) -> Iterator[str]:
    """Yield the name of each task that registers hpc_db and is skipped under a condition, imported ones included."""
    for task in tasks:
        depends = is_conditional or "when" in task
        for part in ("block", "rescue", "always"):
            yield from registering(task.get(part, []), folder, depends)
        if task.get("register") == "hpc_db" and depends:
            yield task["name"]
        for name in IMPORTS:
            if name in task:
                path = imported(task[name], folder)
                yield from registering(tasks_of(path), path.parent, depends)


def imported(given: object, folder: Path) -> Path:
    """Return the path of the task file that a task imports."""
    if isinstance(given, dict) and "name" in given:
        role = given["name"].rpartition(".")[2]
        return ROOT / "roles" / role / "tasks" / f"{given.get('tasks_from', 'main')}.yml"
    return folder / str(given["file"] if isinstance(given, dict) else given)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_task_that_shares_is_skipped(path: Path) -> None:
    assert list(registering(tasks_of(path), path.parent, False)) == []


def test_such_a_task_would_be_found() -> None:
    share = {"name": "Share", "mala.hpc_db.share": {}, "register": "hpc_db"}
    look = {"name": "Look", "ansible.builtin.import_tasks": "check.yml", "when": "x"}

    assert list(registering([{"block": [share], "when": "x"}], ROOT, False)) == ["Share"]
    assert list(registering([look], ROOT / "roles/instance/tasks", False)) != []
