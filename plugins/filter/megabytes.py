# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: megabytes
short_description: Convert a memory size of Slurm or PostgreSQL into megabytes
version_added: 0.1.0
description:
  - Returns whole megabytes, rounded down. Returns 0 if the text is not a memory size.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Number with or without K, M, G or T, such as V(16G) or V(128 MB).
    type: str
    required: true
  bare:
    description: Unit of a number without a letter, in kilobytes.
    type: int
    default: 1024
"""

EXAMPLES = r"""
- name: Print the memory of the job
  ansible.builtin.debug:
    msg: "{{ '16G' | mala.hpc_db.megabytes }} MB"

- name: Print the size of a number of PostgreSQL's blocks
  ansible.builtin.debug:
    msg: "{{ 16384 | mala.hpc_db.megabytes(8) }} MB"
"""

RETURN = r"""
_value:
  description: Size in megabytes.
  type: int
"""

from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import megabytes


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"megabytes": megabytes}
