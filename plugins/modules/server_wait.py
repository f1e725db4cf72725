#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: server_wait
short_description: Wait for the job's server and show the progress
author: mala.hpc_db contributors (@mala-project)
description:
  - Polls the server job with M(mala.hpc_db.hosting_job_info) until the server of the running job has published its
    endpoint. The interval grows from 0.5 to 10 seconds.
  - Prints a line after each change, and at least every 30 seconds.
  - Fails if the job disappears, reports a failure, can never start (such as with Slurm's C(PartitionTimeLimit)), or if
    the server is not running in time. It never changes the job.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
attributes:
  action:
    support: full
    description: Waits on the controller and polls on the target.
  check_mode:
    support: full
    description: Returns at once in check mode, because there is nothing to wait for.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  job:
    description:
      - ID of the job that was just submitted. If it ends before this module sees it in the queue, the reason that it
        has reported is still found.
    type: str
  timeout:
    description: Maximum wait in seconds. Then the module fails, but the job stays in the queue.
    type: int
    default: 600
seealso:
  - module: mala.hpc_db.hosting_job
  - module: mala.hpc_db.hosting_job_info
"""

EXAMPLES = r"""
- name: Wait for the server
  mala.hpc_db.server_wait:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
    timeout: 1200
  register: found
"""

RETURN = r"""
endpoint:
  description: Endpoint of the server in the format of M(mala.hpc_db.hosting_job_info). V(null) in check mode.
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
  description: The last lines of the newest log, if the job disappeared or failed.
  returned: failure
  type: list
  elements: str
"""
