#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: conda_env_info
short_description: Read the packages of a conda environment
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns the packages of an environment, and a lock file that reproduces it. Both are read from the environment.
options:
  prefix:
    description: Absolute path of the environment. It may be missing.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: Nothing is ever changed.
  diff_mode:
    support: none
    description: Nothing is ever changed.
seealso:
  - module: mala.hpc_db.conda_env
"""

EXAMPLES = r"""
- name: Read the packages of the environment
  mala.hpc_db.conda_env_info:
    prefix: ~/hpc_db/hpc_db/postgresql-17
  register: found

- name: Write its lock file next to the inventory
  ansible.builtin.copy:
    content: "{{ found.lock }}"
    dest: "{{ inventory_dir }}/lock/postgresql-17.txt"
    mode: "0644"
  delegate_to: localhost
"""

RETURN = r"""
prefix:
  description: Path of the environment without C(~).
  returned: success
  type: str
packages:
  description: Version and build of each package by name. V(null) if the environment is missing or incomplete.
  returned: success
  type: dict
  sample: {libpq: [17.10, h1_0]}
lock:
  description:
    - Lock file in conda's explicit format with checksums, without credentials.
    - V(null) if the environment is missing or incomplete.
  returned: success
  type: str
"""

import json
import platform
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import CondaError
from ansible_collections.mala.hpc_db.plugins.module_utils._lock import lock_text, platform_of
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line


def look(prefix: Path) -> dict:
    """Return the environment's data."""
    if not prefix.is_absolute():
        raise CondaError(f"prefix: '{prefix}' is not absolute; give a path that begins with / or ~")
    subdir = platform_of(platform.system(), platform.machine())
    records = read_records(prefix)
    return {
        "changed": False,
        "prefix": str(prefix),
        "packages": None if records is None else {
            record["name"]: [record["version"], record["build"]] for record in records
        },
        "lock": None if records is None else lock_text(records, subdir),
    }


def read_records(prefix: Path) -> list[dict] | None:
    """Return the environment's records; None if there is no environment or its installation is incomplete."""
    metadata = prefix / "conda-meta"
    if not metadata.is_dir() or prefix.with_name(prefix.name + ".unfinished").exists():
        return None
    try:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(metadata.glob("*.json"))]
        return [record for record in records if record["name"] and record["version"] and record["build"]]
    except (ValueError, KeyError):
        raise CondaError(f"prefix: a file in {metadata} is damaged; remove {prefix} and install it again") from None


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(argument_spec={"prefix": {"type": "path", "required": True}}, supports_check_mode=True)
    try:
        result = look(Path(module.params["prefix"]))
    except (CondaError, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
