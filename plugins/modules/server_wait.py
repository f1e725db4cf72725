#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: server_wait
short_description: Wait until the hosting job's server answers, and show the progress
author: mala.hpc_db contributors (@mala-project)
description:
  - Looks at the hosting job with M(mala.hpc_db.hosting_job_info), first every half second, at last every ten,
    until the server of the running job has published its endpoint.
  - Prints a line whenever something has changed, and at least every 30 seconds.
  - Fails when the job vanishes, says itself that it failed, waits for something that will never come (such as
    Slurm's C(PartitionTimeLimit)), or does not serve in time. It never touches the job.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
attributes:
  action:
    support: full
    description: The waiting is done on the controller, the looking on the target.
  check_mode:
    support: full
    description: In check mode there is nothing to wait for, and it returns at once.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  timeout:
    description: How many seconds to wait before it fails. The job stays in the queue.
    type: int
    default: 600
seealso:
  - module: mala.hpc_db.hosting_job
  - module: mala.hpc_db.hosting_job_info
"""

EXAMPLES = r"""
- name: Wait for the server to answer
  mala.hpc_db.server_wait:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
    timeout: 1200
  register: found
"""

RETURN = r"""
endpoint:
  description: Where the server answers, as M(mala.hpc_db.hosting_job_info) returns it; V(null) in check mode.
  returned: success
  type: dict
  sample:
    instance: hpc_db
    cluster: hemera5
    host: c1
    port: 5433
    socket: /home/alice/hpc_db/hpc_db/run
    job: "4711"
    since: 1760000000.0
log_tail:
  description: The last lines of the newest log, if the job vanished or failed.
  returned: failure
  type: list
  elements: str
"""
