# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: yaml_value
short_description: Write an untrusted value into a YAML inventory
version_added: 0.1.0
description:
  - Quotes a value for a YAML file, so that Ansible later reads the same value.
  - Refuses text with unprintable characters, and text that Ansible would evaluate as a template.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Value to write.
    type: raw
    required: true
  setting:
    description: Name of the setting, for error messages.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Write a variable
  ansible.builtin.copy:
    content: "server_bin_dir: {{ found.bin_dir | mala.hpc_db.yaml_value('server_bin_dir') }}\n"
    dest: group_vars/all.yml
"""

RETURN = r"""
_value:
  description: Value as one line of YAML.
  type: str
"""

from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import yaml_data


def yaml_value(value: Any, setting: str) -> str:
    """Return the value as YAML; raise AnsibleFilterError if it cannot be written safely."""
    try:
        return yaml_data(value, setting)
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from None


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"yaml_value": yaml_value}
