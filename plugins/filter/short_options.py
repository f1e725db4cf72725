# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: short_options
short_description: Scheduler options of a short job
version_added: 0.1.0
description:
  - Returns options of a job of five minutes that runs in the same place as a job with the given options. Options that
    tie the job to a node, a time or another job are removed.
author: mala.hpc_db contributors (@mala-project)
extends_documentation_fragment:
  - mala.hpc_db.scheduler.filter
"""

EXAMPLES = r"""
- name: Print the options of a short job
  ansible.builtin.debug:
    msg: "{{ {'partition': 'defq', 'time': '24:00:00'} | mala.hpc_db.short_options('slurm') }}"
"""

RETURN = r"""
_value:
  description: The options.
  type: dict
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS


def short_options(options: dict, scheduler: str) -> dict:
    """Return the options."""
    return SCHEDULERS[scheduler].short_options(options)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"short_options": short_options}
