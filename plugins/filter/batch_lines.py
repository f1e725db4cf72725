# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: batch_lines
short_description: Head of a job script for a job array of workers
version_added: 0.1.0
description:
  - Returns the lines with the scheduler's options, such as C(#SBATCH), quoted as the scheduler reads them.
author: mala.hpc_db contributors (@mala-project)
extends_documentation_fragment:
  - mala.hpc_db.scheduler.filter
options:
  setting:
    description: Name of the setting with these options, for error messages.
    type: str
    required: true
  name:
    description: Job name.
    type: str
    required: true
  number:
    description: Number of workers in the job array.
    type: int
    required: true
  folder:
    description: Absolute path of the folder for the workers' logs.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Print the head of a job script
  ansible.builtin.debug:
    msg: "{{ {'partition': 'defq'} | mala.hpc_db.batch_lines('my_options', 'slurm', 'train', 8, '/home/alice/log') }}"
"""

RETURN = r"""
_value:
  description: The lines.
  type: list
  elements: str
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS


def batch_lines(options: dict, setting: str, scheduler: str, name: str, number: int, folder: str) -> list[str]:
    """Return the lines."""
    try:
        SCHEDULERS[scheduler].check_options(options)
        return SCHEDULERS[scheduler].batch_lines(name, number, folder, options)
    except ValueError as error:
        raise AnsibleFilterError(f"{setting}: {error}") from None


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"batch_lines": batch_lines}
