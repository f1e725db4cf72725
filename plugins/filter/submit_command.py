# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: submit_command
short_description: The command that submits a job to Slurm
version_added: 0.1.0
description:
  - Gives the call of C(sbatch) that M(mala.hpc_db.hosting_job) makes, for a job that submits its own successor.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Options of C(sbatch) under their long names without dashes.
    type: dict
    required: true
  name:
    description: The job's name.
    type: str
    required: true
  script:
    description: The job script, an absolute path.
    type: str
    required: true
  output:
    description: The file that the job's output is appended to, an absolute path.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show how the job is submitted
  ansible.builtin.debug:
    msg: "{{ {'partition': 'defq'} | mala.hpc_db.submit_command('hpc_db', '/home/alice/job.sh', '/dev/null') }}"
"""

RETURN = r"""
_value:
  description: The list of arguments, C(sbatch) first.
  type: list
  elements: str
"""

from ansible_collections.mala.hpc_db.plugins.module_utils import _slurm


def submit_command(options: dict, name: str, script: str, output: str) -> list[str]:
    """Return the call of sbatch."""
    return _slurm.submit_command(name, script, options, output)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"submit_command": submit_command}
