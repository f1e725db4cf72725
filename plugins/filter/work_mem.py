# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: work_mem
short_description: Memory per connection for sorting
version_added: 0.1.0
description:
  - Returns the part of the job's memory that each connection can use for sorting, between 1 and 16 MB.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description:
      - The settings C(instance_memory), C(postgres_max_connections), C(postgres_shared_buffers) and
        C(postgres_settings), by their names.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Print the memory of each of 320 connections
  ansible.builtin.debug:
    msg: >-
      {{
        {'instance_memory': '16G', 'postgres_max_connections': 320, 'postgres_shared_buffers': '1638MB',
        'postgres_settings': {} } | mala.hpc_db.work_mem
      }}
"""

RETURN = r"""
_value:
  description: Memory with its unit, such as V(16MB).
  type: str
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._plan import sizes


def work_mem(settings: dict) -> str:
    """Return the memory with its unit."""
    return f"{sizes(settings).sort}MB"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"work_mem": work_mem}
