#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: hosting_job_info
short_description: See the hosting job, and what it says about itself
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns the job from the queue, the endpoint that it published and its own account of its state.
  - Whatever is missing, or half written, is V(null). Only a scheduler that does not answer is an error.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
options:
  nodes:
    description: Whether to ask which nodes have no job of this user, which takes up to three commands more.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Nothing is ever changed.
  diff_mode:
    support: none
    description: Nothing is ever changed.
seealso:
  - module: mala.hpc_db.hosting_job
"""

EXAMPLES = r"""
- name: Look at the job
  mala.hpc_db.hosting_job_info:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
  register: found

- name: Show where the server is
  mala.hpc_db.show:
    text: "{{ found.endpoint.host }}:{{ found.endpoint.port }}"
  when: found.endpoint is not none
"""

RETURN = r"""
job:
  description: The job, as M(mala.hpc_db.hosting_job) returns it; V(null) if there is none.
  returned: success
  type: dict
  sample: {id: "4711", name: hpc-db, state: RUNNING, node: c1, reason: "", time_left: 86000, time_limit: 259200}
endpoint:
  description: Where the server answers, from C(run/endpoint.json); V(null) while it does not serve.
  returned: success
  type: dict
  contains:
    instance:
      description: The instance's name.
      type: str
    cluster:
      description: The cluster's name.
      type: str
    host:
      description: The host that serves.
      type: str
    port:
      description: The port.
      type: int
    socket:
      description: The folder of the unix socket on that host.
      type: str
    job:
      description: The id of the job that serves.
      type: str
    tls:
      description: Whether connections over the network have TLS.
      type: bool
    since:
      description: Since when, in seconds since 1970.
      type: float
    pooler:
      description: C(host) and C(port) of PgBouncer; only while it answers.
      type: dict
    proxy:
      description: C(host) and C(port) of Optuna's storage proxy; only while it answers.
      type: dict
state:
  description: The hosting program's own account, from C(run/state.json); V(null) before its first start.
  returned: success
  type: dict
  contains:
    state:
      description: One of V(starting), V(serving), V(stopping), V(ended) and V(failed).
      type: str
    reason:
      description: Why, in one line.
      type: str
    job:
      description: The id of the job that wrote it.
      type: str
    host:
      description: Where it ran.
      type: str
    since:
      description: Since when, in seconds since 1970.
      type: float
disk:
  description: The file system of O(root) in bytes; V(null) if that is not there.
  returned: success
  type: dict
  contains:
    total:
      description: All of it.
      type: int
    free:
      description: What is left for ordinary users. A quota, of which the file system knows nothing, may be less.
      type: int
idle_nodes:
  description:
    - The nodes on which no job of this user is, with O(nodes=true); V(null) without.
    - There are none with O(scheduler=local).
  returned: success
  type: list
  elements: str
log_tail:
  description:
    - The last 20 lines of the newest file in C(log/), if there is no job or it says that it failed.
    - Else V(null).
  returned: success
  type: list
  elements: str
"""

import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_name,
    find_idle_nodes,
    find_jobs,
    make_run,
    serving_job,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json

LOG_LINES = 20
LOG_BYTES = 16384


def look(params: dict, run: Run) -> dict:
    """Return what is known of the job. ``run`` takes an argument list and returns its stdout."""
    check_name(params["name"])
    # The files first: a job that ends in between then has a stale file and no job, never the other way round.
    endpoint = read_json(os.path.join(params["root"], "run", "endpoint.json"))
    state = read_json(os.path.join(params["root"], "run", "state.json"))
    jobs = find_jobs(params, run)
    serving = serving_job(endpoint, jobs)
    job = serving or next(iter(jobs), None)
    troubled = job is None or (state is not None and state.get("state") == "failed")
    return {
        "changed": False,
        "job": job,
        "endpoint": {"tls": True, **endpoint} if endpoint and serving else None,
        "state": state,
        "idle_nodes": find_idle_nodes(params, run) if params["nodes"] else None,
        "disk": _disk(params["root"]),
        "log_tail": _log_tail(os.path.join(params["root"], "log")) if troubled else None,
    }


def _disk(path: str) -> dict | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _log_tail(folder: str) -> list[str] | None:
    try:
        logs = [entry.path for entry in os.scandir(folder) if entry.is_file()]
        with open(max(logs, key=os.path.getmtime), "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LOG_BYTES))
            return stream.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except (OSError, ValueError):  # no folder, no file in it, or one that was just rotated away
        return None


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(ARGUMENT_SPEC, nodes={"type": "bool", "default": False}), supports_check_mode=True
    )
    try:
        result = look(module.params, make_run(module))
    except (SchedulerError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
