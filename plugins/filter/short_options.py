# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: short_options
short_description: The options of a job that looks around for a moment
version_added: 0.1.0
description:
  - Gives the options of a job of five minutes that goes where a job with these options would go, without what ties that
    one to a node, a time or another job.
author: mala.hpc_db contributors (@mala-project)
extends_documentation_fragment:
  - mala.hpc_db.scheduler.filter
"""

EXAMPLES = r"""
- name: Show the options of a short job
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
