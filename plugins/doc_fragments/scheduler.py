# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """The options that say which hosting job is meant."""

    DOCUMENTATION = r"""
options:
  name:
    description:
      - The job's name.
      - The job is found by it, among this user's jobs only, so two instances need two names.
      - Letters, digits, C(.), C(_) and C(-); it begins with a letter or a digit.
    type: str
    required: true
  root:
    description: The instance directory, an absolute path on the cluster.
    type: path
    required: true
  scheduler:
    description:
      - Who runs the job.
      - V(local) is one machine without a scheduler, where the job is a background process of this user.
    type: str
    choices: [slurm, local, gridengine]
    default: slurm
  bin_dir:
    description:
      - The folder of the scheduler's commands, where the PATH of a non-interactive shell lacks it.
      - With O(scheduler=gridengine), C(SGE_ROOT) follows from it where it is not set, as C(/opt/sge) from
        C(/opt/sge/bin/lx-amd64).
      - Not used by O(scheduler=local).
    type: path
attributes:
  action_group:
    description: Use C(group/mala.hpc_db.scheduler) in C(module_defaults) to set these options for several tasks.
    support: full
    membership: [mala.hpc_db.scheduler]
"""

    # What filters about jobs are given.
    FILTER = r"""
options:
  _input:
    description: The scheduler's options, as M(mala.hpc_db.hosting_job) takes them.
    type: dict
    required: true
  scheduler:
    description: Who is to run the job, as for M(mala.hpc_db.hosting_job).
    type: str
    required: true
"""
