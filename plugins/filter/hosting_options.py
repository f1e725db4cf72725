# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: hosting_options
short_description: Scheduler options of the server job
version_added: 0.1.0
description:
  - Adds the server job's default options for the scheduler to the inventory's options, which take precedence. They
    cover one job at a time, memory, a signal before the end of the walltime, and whether the job may be requeued.
author: mala.hpc_db contributors (@mala-project)
extends_documentation_fragment:
  - mala.hpc_db.scheduler.filter
options:
  name:
    description: Job name.
    type: str
    required: true
  memory:
    description: Memory of the job, such as V(4G).
    type: str
    required: true
  notice:
    description: Seconds before the end of the walltime at which the job gets a signal.
    type: int
    required: true
  chain:
    description: Whether the job submits a successor.
    type: bool
    required: true
"""

EXAMPLES = r"""
- name: Print the options of the server job
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
    return SCHEDULERS[scheduler].hosting_options(options, name, memory, int(notice), chain)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"hosting_options": hosting_options}
