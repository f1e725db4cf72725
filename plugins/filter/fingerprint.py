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
  - The checksum changes if the settings or any file of the collection's playbooks, plugins, roles and client package
    change.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Settings by name.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Print the checksum
  ansible.builtin.debug:
    msg: "{{ {'instance_name': instance_name} | mala.hpc_db.fingerprint }}"
"""

RETURN = r"""
_value:
  description: SHA-256 checksum in hexadecimal digits.
  type: str
"""

import hashlib
import json
from pathlib import Path

COLLECTION = Path(__file__).parents[2]
PARTS = ("client", "playbooks", "plugins", "roles")


def fingerprint(settings: dict, collection: Path = COLLECTION) -> str:
    """Return the checksum as hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
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
