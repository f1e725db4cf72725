# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: batch_lines
short_description: Options of a job as the lines at the head of a job script
version_added: 0.1.0
description:
  - Gives the C(#SBATCH) lines for options of C(sbatch), each quoted as C(sbatch) reads it.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Options of C(sbatch) under their long names without dashes, as M(mala.hpc_db.hosting_job) takes them.
    type: dict
    required: true
  setting:
    description: The setting that the options come from, for the message if one is not allowed.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show the head of a job script
  ansible.builtin.debug:
    msg: "{{ {'partition': 'defq'} | mala.hpc_db.batch_lines('workers_job_options') }}"
"""

RETURN = r"""
_value:
  description: The lines.
  type: list
  elements: str
"""

import shlex

from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.module_utils import _slurm


def batch_lines(options: dict, setting: str) -> list[str]:
    """Return the options as lines of a job script."""
    try:
        _slurm.check_options(options)
    except ValueError as error:
        raise AnsibleFilterError(f"{setting}: {error}") from None
    return [f"#SBATCH {shlex.quote(flag)}" for flag in _slurm.flags(options)]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"batch_lines": batch_lines}
