#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: job_script_check
short_description: Check whether the scheduler accepts a job script
author: mala.hpc_db contributors (@mala-project)
description:
  - Lets the scheduler check a job script without submitting it. If it is refused, the module fails with the scheduler's
    own message.
  - Warns if the job would have to wait because its nodes are down, drained or reserved. Also warns about
    C(SBATCH_PARTITION) and similar variables in the login's environment, which take precedence over the script.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
attributes:
  check_mode:
    support: full
    description: Nothing is ever changed. In check mode nothing is checked either, because the script may be missing.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  script:
    description: Absolute path of the job script.
    type: path
    required: true
  options:
    description: Options in the head of the script, in the format of M(mala.hpc_db.hosting_job).
    type: dict
    default: {}
  setting:
    description: Name of the setting with these options, for messages.
    type: str
    required: true
seealso:
  - module: mala.hpc_db.hosting_job
"""

EXAMPLES = r"""
- name: Check the workers' job script
  mala.hpc_db.job_script_check:
    name: hpc_db_workers
    root: /home/alice/hpc_db/hpc_db
    script: /home/alice/hpc_db/hpc_db/workers/job.sh
    options:
      partition: defq
      time: "04:00:00"
    setting: workers_job_options
"""

RETURN = r""" # """

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_environment,
    judge_job,
    make_run,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS


def judge(params: dict, run: Run) -> list[str]:
    """Raise the scheduler's objections to the script; return warnings.

    ``run`` takes an argument list and returns its stdout.
    """
    scheduler, setting = SCHEDULERS[params["scheduler"]], params["setting"]
    check_environment(params, setting)
    command = scheduler.check_batch_command(params["script"], params["options"])
    said = judge_job(params, run, command, setting) if command else []
    return [*said, *scheduler.overridden(os.environ, params["options"], setting)]


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            script={"type": "path", "required": True},
            options={"type": "dict", "default": {}},
            setting={"type": "str", "required": True},
        ),
        supports_check_mode=True,
    )
    try:
        for warning in [] if module.check_mode else judge(module.params, make_run(module)):
            module.warn(warning)
    except (SchedulerError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()
