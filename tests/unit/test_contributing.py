# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""roles/README.md lists all that the roles share; CONTRIBUTING.md has the current counts and imports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.action.settings import options_of_roles
from ansible_collections.mala.hpc_db.plugins.module_utils._plan import plan

ROOT = Path(__file__).parents[2]
INSTANCE = {"root": "/r", "owner": "alice", "major": None}
SHARE = "mala.hpc_db.share"


@pytest.fixture(scope="module")
def counts() -> ModuleType:
    """The program tools/counts."""
    loader = SourceFileLoader("counts", str(ROOT / "tools" / "counts"))
    spec = spec_from_loader("counts", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def listed(section: str) -> dict[str, list[str]]:
    """Return the rows of a section's table in roles/README.md: the other cells by the entry's name."""
    text = (ROOT / "roles" / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0].strip("`"): cells[1:] for cells in rows[1:]}


def tasks_in(content: Any) -> Iterator[dict[str, Any]]:
    """Yield each task of a task file or playbook, also those in blocks."""
    for task in content or []:
        yield task
        for inside in ("block", "rescue", "always", "pre_tasks", "tasks"):
            yield from tasks_in(task.get(inside))


def all_tasks() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each task of the roles and playbooks with its file, such as ``server/look.yml``."""
    for path in sorted([*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("playbooks/*.yml")]):
        for task in tasks_in(yaml.safe_load(path.read_text())):
            yield f"{path.parts[-3]}/{path.name}" if path.parent.name == "tasks" else path.name, task


def planned() -> set[str]:
    settings = {name: option.get("default") for name, option in options_of_roles().items()}
    return set(plan({**settings, "databases_studies": []}, INSTANCE))


def shared() -> dict[str, set[str]]:
    """Return the entries that tasks add themselves, each with its files."""
    found: dict[str, set[str]] = {}
    for file, task in all_tasks():
        values = task.get(SHARE, {}).get("values", {})
        names = list(values) if isinstance(values, dict) else re.findall(r"'(\w+)':", values)
        for name in names:
            found.setdefault(name, set()).add(file)
        assert SHARE not in task or names or "mala.hpc_db.plan" in values, f"{file}: {task['name']}"
    return found


def test_entries_of_the_plan_are_listed() -> None:
    assert set(listed("Derived from the settings")) == planned()


def test_results_of_tasks_are_listed_with_their_files() -> None:
    files = {name: set(re.findall(r"`(\w+/\w+\.yml)`", cells[1])) for name, cells in listed("Results of tasks").items()}

    assert files == shared()


def test_everything_read_is_listed() -> None:
    known = planned() | set(shared()) | set(options_of_roles())
    for path in [*ROOT.glob("roles/*/[!m]*/**/*.yml"), *ROOT.glob("roles/**/*.j2"), *ROOT.glob("playbooks/*.yml")]:
        text = re.sub(r"(?m)(^|\s)#.*$|\{#.*?#\}|\bhpc_db\.yml", "", path.read_text())
        read = set(re.findall(r"(?<![\w.])hpc_db(?:\.|\[')(\w+)", text))
        assert read <= known, f"{path}: {read - known}"


def test_parameters_are_listed() -> None:
    parameters = {
        name for path in ROOT.glob("roles/*/vars/main.yml") for name in yaml.safe_load(path.read_text())
        if not name.startswith("__")
    }
    for _file, task in all_tasks():
        if task.keys() & {"ansible.builtin.include_role", "ansible.builtin.import_role"}:
            parameters |= set(task.get("vars", {}))

    assert parameters == set(listed("Parameters"))


def test_every_entry_has_a_type_and_a_meaning() -> None:
    for section in ("Derived from the settings", "Results of tasks", "Parameters"):
        for name, cells in listed(section).items():
            assert all(cells), name


def test_private_variables_are_used_by_their_role_only(counts: ModuleType) -> None:
    assert counts.foreign_uses() == []


def test_use_of_another_roles_variable_is_found(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = {"server": "a: __server_job\nb: __client_stage\n# __client_stage\n", "client": "a: x.__server_job\n"}
    for role, text in texts.items():
        (tmp_path / "roles" / role / "vars").mkdir(parents=True)
        (tmp_path / "roles" / role / "vars" / "main.yml").write_text(text)
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks" / "one.yml").write_text("when: __server_job\n")
    monkeypatch.setattr(counts, "ROOT", tmp_path)

    assert counts.foreign_uses() == [
        "roles/server/vars/main.yml:2: __client_stage of client", "playbooks/one.yml:1: __server_job of server",
    ]


def test_setting_goes_the_documented_way(counts: ModuleType) -> None:
    assert counts.broken_hops() == []
    assert len(counts.HOPS) <= counts.HOPS_GOAL


def test_imports_form_no_circle(counts: ModuleType) -> None:
    assert counts.layers_of(counts.imports())
    assert counts.layers_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["c"], ["b"], ["a"]]
    with pytest.raises(ValueError, match="circle, or above one: a, b"):
        counts.layers_of({"a": {"b"}, "b": {"a"}, "c": set()})


def test_arrows_that_follow_from_others_are_left_out(counts: ModuleType) -> None:
    assert counts.direct({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_picture_of_the_imports_is_current(counts: ModuleType) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()

    assert f"```mermaid\n{counts.mermaid(counts.imports())}\n```\n" in text, "paste the output of tools/counts --graph"


def test_counts_of_files_are_current(counts: ModuleType) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for change in counts.CHANGES:
        number = len(counts.places_of(change)["code"])
        row = f"| {change.kind} | `{change.example}` | {number} | {change.goal} |\n"
        assert row in text, f"CONTRIBUTING.md lacks the row {row}"
