# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: unfilled
short_description: Settings of an inventory that are not filled in yet
version_added: 0.1.0
description:
  - Finds the settings of this host whose value is still V(FILL_IN). The inventories of this collection contain it where
    only the user knows the value.
  - Each setting is returned with the inventory's file and line, and with the comment on that line.
author: mala.hpc_db contributors (@mala-project)
options: {}
"""

EXAMPLES = r"""
- name: Check that the inventory is complete
  ansible.builtin.assert:
    that: query('mala.hpc_db.unfilled') | length == 0
    fail_msg: "{{ query('mala.hpc_db.unfilled') | join('; ') }}"
"""

RETURN = r"""
_raw:
  description: One sentence for each setting.
  type: list
  elements: str
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase

MARK = "FILL_IN"
# Variables that Ansible adds to a host's settings: aliases of two settings, and the settings of other hosts.
NOT_SETTINGS = ("ansible_ssh_host", "ansible_ssh_user", "groups", "hostvars", "vars")


def unfilled(variables: Mapping) -> list[str]:
    """Return a sentence for each setting that is not filled in yet."""
    inventory = Path(variables.get("inventory_dir") or ".")
    found = sorted(path for name in variables if name not in NOT_SETTINGS for path in marked(variables[name], name))
    return [f"{path}: {MARK} must be replaced by your own value, {locate(inventory, path)}" for path in found]


def marked(value: Any, path: str) -> Iterator[str]:
    """Yield the places of the mark in a value, such as ``server_job_options.account``."""
    if isinstance(value, str):
        if MARK in value:
            yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from marked(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from marked(inner, f"{path}[{index}]")


def locate(inventory: Path, path: str) -> str:
    """Return the inventory's file and line with the setting, and the comment on that line."""
    key = re.sub(r"\[\d+\]", "", path).rpartition(".")[2]
    line_of = re.compile(rf"\s*(?:- )?{re.escape(key)}:[^#]*{MARK}[^#]*(?:#\s*(?P<comment>.*))?")
    for file in sorted([*inventory.glob("*.yml"), *inventory.glob("*_vars/**/*.yml")]):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found = line_of.fullmatch(line)
            if found:
                shown = os.path.relpath(file)
                comment = f": {found['comment']}" if found["comment"] else ""
                return f"in {file if shown.startswith(os.pardir) else shown} line {number}{comment}"
    return "in the inventory"


class LookupModule(LookupBase):  # type: ignore[misc]
    """The incomplete settings of the current host."""

    def run(self, terms: list, variables: Mapping | None = None, **kwargs: Any) -> list[str]:
        return unfilled(variables or {})
