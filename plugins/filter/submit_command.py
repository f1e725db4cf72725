# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: submit_command
short_description: Command that submits a job
version_added: 0.1.0
description:
  - Returns the command that M(mala.hpc_db.hosting_job) would run, for a job that submits its own successor.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Scheduler options in the format of M(mala.hpc_db.hosting_job).
    type: dict
    required: true
  name:
    description: Job name.
    type: str
    required: true
  script:
    description: Absolute path of the job script.
    type: str
    required: true
  output:
    description: Absolute path of the file to which the job's output is appended.
    type: str
    required: true
  scheduler:
    description: Scheduler that runs the job, as for M(mala.hpc_db.hosting_job).
    type: str
    default: slurm
"""

EXAMPLES = r"""
- name: Print the command
  ansible.builtin.debug:
    msg: "{{ {'partition': 'defq'} | mala.hpc_db.submit_command('hpc_db', '/home/alice/job.sh', '/dev/null') }}"
"""

RETURN = r"""
_value:
  description: List of arguments, beginning with the command.
  type: list
  elements: str
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS


def submit_command(options: dict, name: str, script: str, output: str, scheduler: str = "slurm") -> list[str]:
    """Return the call."""
    return SCHEDULERS[scheduler].submit_command(name, script, options, output)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"submit_command": submit_command}
