# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """Options that identify the server job."""

    DOCUMENTATION = r"""
options:
  name:
    description:
      - Job name.
      - Identifies the job among this user's jobs; must be unique per instance.
      - Letters, digits, C(.), C(_) and C(-). The first character must be a letter or digit.
    type: str
    required: true
  root:
    description: Absolute path of the instance directory on the cluster.
    type: path
    required: true
  scheduler:
    description:
      - Scheduler that runs the job.
      - V(gridengine) submits with C(qsub). Job options are those of C(qsub), such as C(q), C(pe), or C(l) with
        resources such as C(h_rt).
      - V(local) is a single machine without a scheduler. The job is a background process of this user.
    type: str
    choices: [slurm, local, gridengine]
    default: slurm
  bin_dir:
    description:
      - Folder of the scheduler's commands. Needed if it is not on the PATH of a non-interactive shell.
      - With O(scheduler=gridengine), C(SGE_ROOT) is derived from it unless it is set, for example C(/opt/sge) from
        C(/opt/sge/bin/lx-amd64).
      - Not used by O(scheduler=local).
    type: path
attributes:
  action_group:
    description: Use C(group/mala.hpc_db.scheduler) in C(module_defaults) to set these options for several tasks.
    support: full
    membership: [mala.hpc_db.scheduler]
"""

    # Options of filters about jobs.
    FILTER = r"""
options:
  _input:
    description: Scheduler options in the format of M(mala.hpc_db.hosting_job).
    type: dict
    required: true
  scheduler:
    description: Scheduler that runs the job, as for M(mala.hpc_db.hosting_job).
    type: str
    required: true
"""
