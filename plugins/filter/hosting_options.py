# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: hosting_options
short_description: The options with which the hosting job is submitted
version_added: 0.1.0
description:
  - Adds to the inventory's options what the hosting job needs from the scheduler at hand, where they do not say
    something else. One job at a time, memory, a signal before the walltime, and whether it may be run again.
author: mala.hpc_db contributors (@mala-project)
extends_documentation_fragment:
  - mala.hpc_db.scheduler.filter
options:
  name:
    description: The job's name.
    type: str
    required: true
  memory:
    description: The memory that it needs, such as V(4G).
    type: str
    required: true
  notice:
    description: How many seconds before its walltime it is to be told.
    type: int
    required: true
  chain:
    description: Whether it submits a successor.
    type: bool
    required: true
"""

EXAMPLES = r"""
- name: Show with which options the job is submitted
  ansible.builtin.debug:
    msg: "{{ {'time': '24:00:00'} | mala.hpc_db.hosting_options('slurm', 'hpc_db', '4G', 120, true) }}"
"""

RETURN = r"""
_value:
  description: The options.
  type: dict
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS


def hosting_options(options: dict, scheduler: str, name: str, memory: str, notice: int, chain: bool) -> dict:
    """Return the options."""
    return SCHEDULERS[scheduler].server_options(options, name, memory, int(notice), chain)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"hosting_options": hosting_options}
