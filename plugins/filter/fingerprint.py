# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: fingerprint
short_description: Checksum of settings and of this collection
version_added: 0.1.0
description:
  - The checksum changes if a setting that the playbook C(hpc_db.yml) reads, its lock file, the cluster's Python, or any
    file of the collection's playbooks, plugins, roles and client package changes.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Settings by name, as M(mala.hpc_db.settings) returns them.
    type: dict
    required: true
  inventory:
    description: The inventory's folder, to which the path of the lock file is relative.
    type: str
    default: ""
  python:
    description: Path of the cluster's Python, C(ansible_python_interpreter).
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Print the checksum
  ansible.builtin.debug:
    msg: "{{ hpc_db | mala.hpc_db.fingerprint(inventory_dir) }}"
"""

RETURN = r"""
_value:
  description: SHA-256 checksum in hexadecimal digits.
  type: str
"""

import hashlib
import json
from pathlib import Path

from ansible_collections.mala.hpc_db.plugins.module_utils._plan import lock_of

COLLECTION = Path(__file__).parents[2]
PARTS = ("client", "playbooks", "plugins", "roles")
# What the playbook reads, and what of it has no effect on the cluster.
ROLES = ("instance_", "databases_", "upgrade_", "postgres_", "client_", "server_")
WITHOUT_EFFECT = {"server_look_closely", "server_wait", "server_wait_timeout"}


def fingerprint(settings: dict, inventory: str = "", python: str = "", collection: Path = COLLECTION) -> str:
    """Return the checksum as hexadecimal digits."""
    read = {name: value for name, value in settings.items() if name.startswith(ROLES) and name not in WITHOUT_EFFECT}
    lock = lock_of({"postgres_lock_file": "", **settings}, inventory)["lock"]
    digest = hashlib.sha256(json.dumps([read, lock, python], sort_keys=True, default=str).encode())
    paths = sorted(path for part in PARTS for path in (collection / part).rglob("*"))
    for path in paths:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"\0{path.relative_to(collection)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"fingerprint": fingerprint}
