#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: hosting_job_info
short_description: Read the server job, its endpoint and its state
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns the job in the queue, the endpoint that it has published, and the state that its supervisor has reported.
  - Missing or incomplete values are V(null). Only a scheduler that does not answer is an error.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
options:
  nodes:
    description: Also read which nodes have no job of this user. This needs up to three more commands.
    type: bool
    default: false
  history:
    description: Also read the server's outages from its events.
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
- name: Read the server job
  mala.hpc_db.hosting_job_info:
    name: hpc-db
    root: /home/alice/hpc_db/hpc_db
  register: found

- name: Print the endpoint
  mala.hpc_db.show:
    text: "{{ found.endpoint.host }}:{{ found.endpoint.port }}"
  when: found.endpoint is not none
"""

RETURN = r"""
job:
  description: The job in the format of M(mala.hpc_db.hosting_job). V(null) if there is none.
  returned: success
  type: dict
  sample:
    id: "4711"
    name: hpc-db
    state: RUNNING
    node: c1
    reason: ""
    time_left: 86000
    time_limit: 259200
    placement: job
endpoint:
  description:
    - Endpoint of the server, from C(run/endpoint.json).
    - V(null) unless the server is live, that is, unless the job that the endpoint names is running.
  returned: success
  type: dict
  contains:
    instance:
      description: Name of the instance.
      type: str
    cluster:
      description: Name of the cluster.
      type: str
    host:
      description: Host of the server.
      type: str
    port:
      description: Port of the server.
      type: int
    socket:
      description: Folder of the unix socket on that host.
      type: str
    job:
      description: ID of the server job.
      type: str
    tls:
      description: Whether connections over the network use TLS.
      type: bool
    connect_params:
      description: Parameters of libpq that prevent a rogue server from collecting or relaying the password.
      type: dict
    since:
      description: Start of this state in seconds since 1970.
      type: float
    pooler:
      description: C(host) and C(port) of PgBouncer. Only while it answers.
      type: dict
    proxy:
      description: C(host) and C(port) of Optuna's storage proxy. Only while it answers.
      type: dict
state:
  description: State reported by the supervisor, from C(run/state.json). V(null) before its first start.
  returned: success
  type: dict
  contains:
    state:
      description: V(starting), V(serving), V(stopping), V(ended) or V(failed).
      type: str
    reason:
      description: Reason of the state in one line.
      type: str
    job:
      description: ID of the job that wrote it.
      type: str
    host:
      description: Host on which that job ran.
      type: str
    since:
      description: Start of this state in seconds since 1970.
      type: float
    follows:
      description: The next server job. V(null) if there is none.
      type: dict
      contains:
        id:
          description: ID of the job.
          type: str
        state:
          description: State of the job, such as V(PENDING).
          type: str
        reason:
          description: The scheduler's reason why it is not running.
          type: str
        submitted:
          description: Time of its submission in seconds since 1970. V(null) if unknown.
          type: float
        expected:
          description: Time at which the scheduler expects it to begin, in seconds since 1970. V(null) if unknown.
          type: float
        late:
          description: Why it cannot begin before the running job ends. Empty if it can.
          type: str
        told:
          description: Message for waiting workers. Empty if the job cannot start.
          type: str
    lease:
      description: C(epoch) of the lease, and C(ttl), its timeout in seconds.
      type: dict
disk:
  description: Size of the file system of O(root) in bytes. V(null) if O(root) does not exist.
  returned: success
  type: dict
  contains:
    total:
      description: Total size.
      type: int
    free:
      description: Free space for ordinary users. A quota, which the file system does not report, may leave less.
      type: int
idle_nodes:
  description:
    - Nodes without a job of this user, with O(nodes=true). Otherwise V(null).
    - Empty with O(scheduler=local).
  returned: success
  type: list
  elements: str
outage:
  description:
    - Start, reason and expected length of the outage at the end of the job, in one line.
    - Empty if the successor can take over before, or if nothing is known.
  returned: success
  type: str
placement:
  description: Where the server belongs since the last C(hpc_db.yml), V(job) or V(workers).
  returned: success
  type: str
may_start:
  description:
    - Whether a worker's job may start the server. Matters only with RV(placement=workers).
    - V(false) after C(stop.yml), and after the server could not start in three jobs.
  returned: success
  type: bool
log_tail:
  description:
    - The last 20 lines of the newest file in C(log/), if there is no job or its state is V(failed).
    - Otherwise V(null).
  returned: success
  type: list
  elements: str
history:
  description: Outages and problems from C(log/events.jsonl). V(null) unless O(history=true).
  returned: success
  type: dict
  contains:
    since:
      description: Time of the first event in seconds since 1970. V(null) if there is none.
      type: int
    serving:
      description: Whether the server is running, according to its last event.
      type: bool
    outages:
      description: Times without a running server between two servers, and since the last one. The oldest is first.
      type: list
      elements: dict
      contains:
        began:
          description: Start in seconds since 1970.
          type: int
        ended:
          description: Start of the next server. V(null) if there was none.
          type: int
        certain:
          description: Whether the start is exact. If V(false), it is the time of the last event before the outage.
          type: bool
        reason:
          description: Reason given by the supervisor. Empty if it was killed.
          type: str
    troubles:
      description: Problems of a running server, such as a full disk, with the same fields.
      type: list
      elements: dict
"""

import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_name,
    find_idle_nodes,
    find_jobs,
    make_run,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host import events, outlook
from ansible_collections.mala.hpc_db.plugins.module_utils.host.candidate import may_start
from ansible_collections.mala.hpc_db.plugins.module_utils.host.endpoint import read_endpoint, serving_job
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout

LOG_LINES = 20
LOG_BYTES = 16384


def look(params: dict, run: Run) -> dict:
    """Return the state of the job. ``run`` takes an argument list and returns its stdout."""
    check_name(params["name"])
    layout = Layout(params["root"])
    # The files first: if the job ends in between, the result is a stale file without a job, never the reverse.
    endpoint = read_endpoint(layout)
    written = read_json(layout.state) or {}
    state = written if "state" in written else None  # before the first start, only that a job was submitted
    jobs = find_jobs(params, run)
    serving = serving_job(endpoint, jobs)
    job = serving or next(iter(jobs), None)
    troubled = job is None or (state is not None and state.get("state") == "failed")
    return {
        "changed": False,
        "job": job,
        "endpoint": _published(endpoint) if endpoint and serving else None,
        "state": state,
        "idle_nodes": find_idle_nodes(params, run) if params["nodes"] else None,
        "disk": _disk(params["root"]),
        "history": events.account(events.read(params["root"])) if params["history"] else None,
        "outage": outlook.look(layout, serving),
        "placement": (read_json(layout.settings) or {}).get("placement", "job"),
        "may_start": may_start(layout),
        "log_tail": _log_tail(layout.log) if troubled else None,
    }


def _published(endpoint: dict) -> dict:
    """Return the endpoint with the parameters of a safe connection."""
    tls = endpoint.get("tls", True)
    return {**endpoint, "tls": tls, "connect_params": _connection.safety(endpoint["host"], tls)}


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
    except (OSError, ValueError):  # no folder, no file in it, or the file was just rotated away
        return None


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            nodes={"type": "bool", "default": False},
            history={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    try:
        result = look(module.params, make_run(module))
    except (SchedulerError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
