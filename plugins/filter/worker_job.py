# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: worker_job
short_description: Submit command and connection name of a workers' job script
version_added: 0.1.0
description:
  - Returns the scheduler's command that submits a job script of workers, and the connection name that lets
    M(mala.hpc_db.abandoned_trials) assign a worker's connections to its job.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Absolute path of the job script on the cluster.
    type: str
    required: true
  setting:
    description: Name of the setting with these options, for error messages.
    type: str
    required: true
  scheduler:
    description: Scheduler that runs the jobs, as for M(mala.hpc_db.hosting_job).
    type: str
    required: true
  options:
    description: Scheduler options in the format of M(mala.hpc_db.hosting_job).
    type: dict
    required: true
  cluster:
    description: Name of the cluster.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Print the command that starts workers
  ansible.builtin.debug:
    msg: "{{ ('/home/alice/job.sh' | mala.hpc_db.worker_job('workers_job_options', 'slurm', {}, 'mini')).submit }}"
"""

RETURN = r"""
_value:
  description:
    - C(submit) is the command as a list of arguments.
    - C(name) is the connection name. A shell in the worker's job expands it in double quotes.
  type: dict
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS


def worker_job(script: str, setting: str, scheduler: str, options: dict, cluster: str) -> dict:
    """Return the call, and the name."""
    spoken = SCHEDULERS[scheduler]
    try:
        spoken.check_options(options)
    except ValueError as error:
        raise AnsibleFilterError(f"{setting}: {error}") from None
    return {"submit": spoken.batch_command(script), "name": spoken.worker_name(cluster)}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"worker_job": worker_job}
