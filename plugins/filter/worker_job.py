# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: worker_job
short_description: How a job script of workers is started, and what its connections are called
version_added: 0.1.0
description:
  - Gives for the scheduler at hand the call that submits a job script of workers, and the name by which
    M(mala.hpc_db.abandoned_trials) ties a worker's connections to its job.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: The job script, an absolute path on the cluster.
    type: str
    required: true
  setting:
    description: The setting that the options come from, for the message if one is not allowed.
    type: str
    required: true
  scheduler:
    description: Who is to run the jobs, as for M(mala.hpc_db.hosting_job).
    type: str
    required: true
  options:
    description: The scheduler's options, as M(mala.hpc_db.hosting_job) takes them.
    type: dict
    required: true
  cluster:
    description: The cluster's name.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show how workers are started
  ansible.builtin.debug:
    msg: "{{ ('/home/alice/job.sh' | mala.hpc_db.worker_job('workers_job_options', 'slurm', {}, 'mini')).submit }}"
"""

RETURN = r"""
_value:
  description:
    - C(submit) is a list of arguments.
    - C(name) is for a shell in the worker's job, to be put in double quotes.
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
