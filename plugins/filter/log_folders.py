# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: log_folders
short_description: Paths of a cluster's log folders on the workstation
version_added: 0.1.0
description:
  - Returns the path of each log folder on the workstation, and which folders have to be mounted or copied there. On the
    cluster itself, the folders are used in place.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Results of C(ansible.builtin.stat) in a loop over C(tensorboard_logs), whose items have a C(name).
    type: list
    elements: dict
    required: true
  ssh:
    description: Connection settings of the host, as the filter P(mala.hpc_db.ssh_settings#filter) returns them.
    type: dict
    required: true
  method:
    description: Method that makes the folders available on the workstation.
    type: str
    choices: [mount, copy]
    required: true
  root:
    description: Folder on the workstation for C(mounts) and C(copies), an absolute path.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Read the log folders
  ansible.builtin.stat:
    path: "{{ item.path }}"
  loop: [{name: be, path: ~/beryllium/logs}]
  register: logs

- name: Print their paths on the workstation
  ansible.builtin.debug:
    msg: "{{ (logs.results | mala.hpc_db.log_folders(ssh, 'mount', '/home/alice/tensorboard')).links }}"
  vars:
    ssh: "{{ hostvars[inventory_hostname] | mala.hpc_db.ssh_settings }}"
"""

RETURN = r"""
_value:
  description:
    - C(links) has the path of each folder on the workstation by its name.
    - C(mount) and C(copy) are lists of the folders that have to be mounted or copied, each with its C(name), its path
      C(src) on the cluster, and its path C(dest) on the workstation.
  type: dict
"""

from typing import Any

FOLDERS = {"mount": "mounts", "copy": "copies"}


def log_folders(found: list[dict[str, Any]], ssh: dict[str, Any], method: str, root: str) -> dict[str, Any]:
    """Return the path of each folder on the workstation, and the folders that have to get there."""
    paths = {each["item"]["name"]: each["stat"]["path"] for each in found}
    if ssh["local"]:
        return {"links": paths, "mount": [], "copy": []}
    links = {name: f"{root}/{FOLDERS[method]}/{name}" for name in paths}
    folders = [{"name": name, "src": path, "dest": links[name]} for name, path in paths.items()]
    return {"links": links, "mount": [], "copy": [], method: folders}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"log_folders": log_folders}
