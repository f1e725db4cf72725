# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's inventories, as Ansible reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.connection import ssh
from ansible.vars.manager import VariableManager
from ansible_collections.mala.hpc_db.plugins.lookup.unfilled import MARK, unfilled

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in (ROOT / "inventories").iterdir() if path.is_dir())
CLUSTERS = [folder for folder in FOLDERS if folder.name not in ("example", "local")]
# A setting, active or commented out; not the group of hosts.
SETTING = re.compile(r"^ *(?:# )?((?!hpc_db:)[a-z][a-z0-9]*_[a-z0-9_]+):(?: |$)", re.MULTILINE)


def known() -> set[str]:
    """Return every setting of a role, and of Ansible's connection."""
    names = {"ansible_connection", "ansible_python_interpreter"}
    options = yaml.safe_load(ssh.DOCUMENTATION)["options"].values()
    names.update(variable["name"] for option in options for variable in option.get("vars", []))
    for path in ROOT.glob("roles/*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            names.update(entry.get("options", {}))
    return names


def complaints(settings: dict[str, Any]) -> list[str]:
    """Return the errors of a role's argument check, as run by the playbooks."""
    said = []
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        options = yaml.safe_load(path.read_text())["argument_specs"]["main"].get("options", {})
        given = {name: value for name, value in settings.items() if name in options and MARK not in str(value)}
        spec = {name: {**options[name], "required": False} for name in given}
        said += ArgumentSpecValidator(spec).validate(given).error_messages
    return said


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.rglob("*.yml")))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def settings(folder: Path) -> dict[str, Any]:
    """Return the variables of the inventory's one host, as Ansible reads them."""
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(folder)])
    (host,) = inventory.get_hosts("hpc_db")
    return VariableManager(loader=loader, inventory=inventory).get_vars(host=host, include_hostvars=False)


def test_all_have_one_shape(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files == {"hosts.yml", "group_vars/all.yml"}


def test_every_setting_is_one_that_a_role_knows(folder: Path) -> None:
    text = text_of(folder)
    own = {name for name in SETTING.findall(text) if name.startswith("hpc_db_")}

    assert set(SETTING.findall(text)) - own - known() == set()
    assert {name for name in own if f"{{{{ {name} }}}}" not in text} == set()


def test_a_setting_with_a_slip_would_be_found() -> None:
    assert set(SETTING.findall("server_scheduller: slurm\n  # postgres_portt: 1\n")) - known() == {
        "server_scheduller", "postgres_portt",
    }


def test_is_complete_but_for_what_is_marked(folder: Path, settings: dict[str, Any]) -> None:
    marked = [line for line in text_of(folder).splitlines() if MARK in line and not line.startswith("#")]

    assert len(unfilled(settings)) == len(marked)
    assert all(re.search(rf"{MARK} # \S", line) for line in marked)
    assert settings["databases_studies"]
    assert settings["server_scheduler"] in ("slurm", "local")


def test_types_are_those_of_the_roles(settings: dict[str, Any]) -> None:
    assert complaints(settings) == []
    assert complaints({**settings, "databases_workers": "many", "server_scheduler": "none"}) != []


@pytest.mark.parametrize("folder", CLUSTERS, ids=lambda folder: folder.name)
def test_sources_are_named(folder: Path) -> None:
    text = text_of(folder)
    sources = re.findall(r"^# \[(\d)\] https://\S+", text, re.MULTILINE)

    assert sources == [str(number) for number in range(1, len(sources) + 1)]
    assert set(re.findall(r"\[(\d)\](?! https:)", text)) == set(sources)


def test_the_page_names_every_cluster() -> None:
    page = (ROOT / "docs/inventories.md").read_text(encoding="utf-8")

    assert set(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)) == {folder.name for folder in CLUSTERS}
