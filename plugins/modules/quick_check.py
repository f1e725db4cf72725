#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: quick_check
short_description: Check whether an instance has changed since the last full run
author: mala.hpc_db contributors (@mala-project)
description:
  - Decides whether the playbook C(hpc_db) can end at once.
  - Compares O(fingerprint), and the checksums and permissions of all files in C(conf/), C(host/) and C(secrets/), with
    the recorded state. The server job must be running, and its server must have published its endpoint; unless the
    server runs in the workers' jobs, and they may start it.
  - Reads neither databases nor installed packages. Only a full run notices changes made there by hand.
  - If anything differs, is missing or cannot be read, a full run is needed. The reason is returned.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
options:
  state:
    description:
      - V(compared) compares without changing anything.
      - V(recorded) records the current state in C(run/kept.json) if the server is running.
    type: str
    choices: [compared, recorded]
    default: compared
  fingerprint:
    description: Checksum of all inputs of the run, as P(mala.hpc_db.fingerprint#filter) returns it.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Records nothing in check mode.
  diff_mode:
    support: none
    description: Recording the state does not count as a change.
"""

EXAMPLES = r"""
- name: Check whether anything changed since the last full run
  mala.hpc_db.quick_check:
    name: hpc_db
    root: ~/hpc_db/hpc_db
    fingerprint: "{{ hpc_db | mala.hpc_db.fingerprint }}"
  register: checked
"""

RETURN = r"""
root:
  description: Path of the instance directory without C(~).
  returned: success
  type: str
unchanged:
  description: Whether the instance is in the recorded state.
  returned: success
  type: bool
reason:
  description: Short description of the difference. Empty if there is none.
  returned: success
  type: str
  sample: files
endpoint:
  description: Endpoint of the server. V(null) if the server is not running, or if O(fingerprint) already differs.
  returned: success
  type: dict
outage:
  description: The outage at the end of the running job, as M(mala.hpc_db.hosting_job_info) returns it.
  returned: success
  type: str
"""

import hashlib
import json
import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_name,
    find_jobs,
    make_run,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host import outlook
from ansible_collections.mala.hpc_db.plugins.module_utils.host.candidate import may_start
from ansible_collections.mala.hpc_db.plugins.module_utils.host.endpoint import read_endpoint, serving_job
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json, write_json
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout

# Folders with few and small files, which only playbooks write.
FOLDERS = ("conf", "host", "secrets")


def checksum(root: str) -> str:
    """Return the checksum of paths, permissions and contents in FOLDERS, without Python's compiled files."""
    found = {}
    for folder in FOLDERS:
        for path, folders, names in os.walk(os.path.join(root, folder)):
            folders[:] = set(folders) - {"__pycache__"}
            for each in [path, *(os.path.join(path, name) for name in names)]:
                content = "" if each == path else hashlib.sha256(Path(each).read_bytes()).hexdigest()
                found[os.path.relpath(each, root)] = [os.stat(each).st_mode, content]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def find_serving(params: dict, run: Run) -> tuple[dict | None, dict | None]:
    """Return the running server job and its endpoint; None if no job serves."""
    check_name(params["name"])
    endpoint = read_endpoint(Layout(params["root"]))
    job = serving_job(endpoint, find_jobs(params, run))
    return job, endpoint if job else None


def check(params: dict, run: Run, check_mode: bool) -> dict:
    """Compare the instance with the recorded state, or record its state. ``run`` calls the scheduler."""
    path = Layout(params["root"]).recorded_state
    recorded = read_json(path) or {}
    recording = params["state"] == "recorded"
    job = endpoint = None
    if not recording and recorded.get("settings") != params["fingerprint"]:
        reason = "settings" if recorded else "no full run"
    else:
        job, endpoint = find_serving(params, run)
        kept = {"settings": params["fingerprint"], "files": checksum(params["root"])}
        layout = Layout(params["root"])
        placement = (read_json(layout.settings) or {}).get("placement", "job")
        # A server that is about to move to the other placement may still serve where it was.
        serves = job is not None and job["placement"] == placement
        found = kept if serves or placement == "workers" and may_start(layout) else {}
        if recording and found and not check_mode:
            write_json(path, found)
        reason = "no server" if not found else "" if recording or found == recorded else "files"
    outage = outlook.look(Layout(params["root"]), job)
    return {
        "changed": False, "root": params["root"], "unchanged": not reason, "reason": reason, "endpoint": endpoint,
        "outage": outage,
    }


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            state={"type": "str", "choices": ["compared", "recorded"], "default": "compared"},
            fingerprint={"type": "str", "required": True},
        ),
        supports_check_mode=True,
    )
    try:
        result = check(module.params, make_run(module), module.check_mode)
    except (OSError, SchedulerError, ValueError) as error:
        root, reason = module.params["root"], one_line(error)
        result = {
            "changed": False, "root": root, "unchanged": False, "reason": reason, "endpoint": None, "outage": "",
        }
    module.exit_json(**result)


if __name__ == "__main__":
    main()
