# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: ssh_settings
short_description: Read the inventory's connection settings of a host
version_added: 0.1.0
description:
  - Collects the settings of Ansible's ssh connection under any of their names, for other programs on the workstation
    that connect to the same host.
  - In a task that runs on the workstation, only C(hostvars) contains the host's own settings.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Variables of the host, C(hostvars[inventory_hostname]).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Print the connection settings
  ansible.builtin.debug:
    msg: "{{ hostvars[inventory_hostname] | mala.hpc_db.ssh_settings }}"
"""

RETURN = r"""
_value:
  description:
    - C(local) is true if the host is this machine, without ssh. C(program) is the ssh program, and C(host) is the name
      or address of the host.
    - C(user), C(port) and C(identity_file) are V(null) if ssh decides. C(arguments) are additional arguments in one
      line.
  type: dict
"""

from collections.abc import Mapping

LOCAL = ("local", "ansible.builtin.local")
ARGUMENTS = ("ansible_ssh_args", "ansible_ssh_common_args", "ansible_ssh_extra_args")


def ssh_settings(variables: Mapping) -> dict:
    """Return the connection settings under names independent of Ansible's aliases."""

    def given(*names: str) -> object:
        return next((variables[name] for name in names if variables.get(name) not in (None, "")), None)

    return {
        "local": given("ansible_connection") in LOCAL,
        "program": given("ansible_ssh_executable") or "ssh",
        "host": given("ansible_host", "ansible_ssh_host") or variables["inventory_hostname"],
        "user": given("ansible_user", "ansible_ssh_user"),
        "port": given("ansible_port", "ansible_ssh_port"),
        "identity_file": given("ansible_private_key_file", "ansible_ssh_private_key_file"),
        "arguments": " ".join(str(variables[name]).strip() for name in ARGUMENTS if variables.get(name)),
    }


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"ssh_settings": ssh_settings}
