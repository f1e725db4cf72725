# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: worker_script
short_description: Head of a job script of workers, and the call that submits it
version_added: 0.1.0
description:
  - Returns the head of the job script, the call that submits it, and the name of the workers' connections.
    M(mala.hpc_db.abandoned_trials) uses this name to find the job of a worker.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Absolute path of the job script on the cluster.
    type: str
    required: true
  scheduler:
    description: Scheduler that runs the job, as for M(mala.hpc_db.hosting_job).
    type: str
    required: true
  setting:
    description: Name of the setting with these options, for messages.
    type: str
    required: true
  options:
    description: Scheduler options in the format of M(mala.hpc_db.hosting_job).
    type: dict
    required: true
  name:
    description: Name of the jobs.
    type: str
    required: true
  number:
    description: Number of workers. Each is one job of the array.
    type: int
    required: true
  folder:
    description: Absolute path of the folder for the workers' logs.
    type: str
    required: true
  cluster:
    description: Name of the cluster.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Print how workers are submitted
  ansible.builtin.debug:
    msg: >-
      {{
        ('/home/alice/job.sh'
        | mala.hpc_db.worker_script('slurm', 'workers_job_options', {}, 'train', 8, '/home/alice/log', 'mini')).submit
      }}
"""

RETURN = r"""
_value:
  description:
    - C(head) is the list of the script's lines with the scheduler's options, such as C(#SBATCH), each quoted.
    - C(submit) is a list of arguments.
    - C(connection) is the name of a worker's connections, for a shell in its job and within double quotes.
  type: dict
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS


def worker_script(
    script: str, scheduler: str, setting: str, options: dict, name: str, number: int, folder: str, cluster: str
) -> dict:
    """Return head, call and name; raise AnsibleFilterError for an option that is not allowed."""
    chosen = SCHEDULERS[scheduler]
    try:
        chosen.check_options(options)
        head = chosen.batch_lines(name, number, folder, options)
    except ValueError as error:
        raise AnsibleFilterError(f"{setting}: {error}") from None
    return {"head": head, "submit": chosen.batch_command(script), "connection": chosen.worker_name(cluster)}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"worker_script": worker_script}
