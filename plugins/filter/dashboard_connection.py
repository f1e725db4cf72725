# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: dashboard_connection
short_description: Connection of a dashboard on the workstation to the server
version_added: 0.1.0
description:
  - Returns the URL of each database for the read-only role, the file of libpq's service entry, and the settings of the
    tunnel that writes this file.
  - On the cluster itself there is no tunnel, and the dashboards use the service entry that the supervisor writes.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: The settings and the values derived from them, C(hpc_db).
    type: dict
    required: true
  ssh:
    description: Connection settings of the host, as the filter P(mala.hpc_db.ssh_settings#filter) returns them.
    type: dict
    required: true
  folder:
    description: Folder of the dashboards on the workstation, an absolute path.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Print the URLs of the dashboards
  ansible.builtin.debug:
    msg: "{{ (hpc_db | mala.hpc_db.dashboard_connection(ssh, '/home/alice/dashboard')).urls }}"
  vars:
    ssh: "{{ hostvars[inventory_hostname] | mala.hpc_db.ssh_settings }}"
"""

RETURN = r"""
_value:
  description:
    - C(urls) has the URL of each of C(dashboard_databases) by its name, without passwords.
    - C(service_file) is the path for libpq's C(PGSERVICEFILE).
    - C(tunnel) are the settings of the tunnel, or V(null) without one.
  type: dict
"""

import os
import shlex
from typing import Any
from urllib.parse import quote

# Seconds that a page waits for the server: long enough for a hand-over, but not for a job that waits in the queue. The
# browser then retries.
PATIENCE = 60
# Seconds between two reads of the server's address.
POLL = 3


def dashboard_connection(settings: dict[str, Any], ssh: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return URLs, service file and the tunnel's settings."""
    local, role = ssh["local"], settings["databases_reader_role"]
    # On this machine, the supervisor's service entry follows the server, but it is for the study role. The tunnel's own
    # entry is for the read-only role.
    user = f"{role}@" if local else ""
    passfile = f"&passfile={quote(settings['root'] + '/secrets/pgpass')}" if local else ""
    limits = f"hpc_db_patience={PATIENCE}&hpc_db_max_wait={PATIENCE}"
    query = f"service={settings['instance_name']}&plugin=hpc_db&{limits}{passfile}"
    owners = f"~{settings['owner']}/.pg_service.conf"
    return {
        "urls": {name: f"postgresql+psycopg2://{user}/{name}?{query}" for name in settings["dashboard_databases"]},
        "service_file": os.path.expanduser(owners) if local else f"{folder}/pg_service.conf",
        "tunnel": None if local else {
            "ssh": ssh["program"],
            "host": ssh["host"],
            "arguments": ssh_arguments(ssh),
            "root": settings["root"],
            "role": role,
            "folder": folder,
            "service": settings["instance_name"],
            "poll": POLL,
            "parameters": settings["services"]["tunnel"],
        },
    }


def ssh_arguments(ssh: dict[str, Any]) -> str:
    """Return ssh's arguments in one line for a shell; those of the inventory are such a line already."""
    parts = [ssh["arguments"]]
    if ssh["port"]:
        parts.append(f"-o Port={ssh['port']}")
    if ssh["user"]:
        parts.append(f"-o User={shlex.quote(str(ssh['user']))}")
    if ssh["identity_file"]:
        parts.append(f"-i {shlex.quote(os.path.expanduser(ssh['identity_file']))}")
    return " ".join(filter(None, parts))


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"dashboard_connection": dashboard_connection}
