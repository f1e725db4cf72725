#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: settings
short_description: Read the settings of all roles with their types
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns each setting of this collection's roles, converted to its type in C(argument_specs). Text
    (C(-e NAME=VALUE)), YAML and JSON therefore give the same result.
  - The roles read settings only from this module's result. A setting that is not given has its default, or V(null)
    without one. The same holds for a setting of a role outside of the play whose template cannot be evaluated.
  - "In text, a list is C(a,b) or C([a, b]), and a dictionary is C(name=value,name=value) or C({name: value}). An empty
    text and V(null) become an empty text, list or dictionary."
  - A value of another type or outside of the choices is refused with the name of the setting and the allowed values.
    All such errors are reported together. The same holds for a value that breaks a rule of the given roles.
attributes:
  action:
    support: full
    description: Runs only on the controller.
  check_mode:
    support: full
    description: Also reads the settings in check mode.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  roles:
    description: Roles whose rules the settings must follow, such as a port from 1024 to 65535.
    type: list
    elements: str
    choices: [instance, databases, postgres, server, workers, dashboard, tensorboard]
    default: []
"""

EXAMPLES = r"""
- name: Read the settings
  mala.hpc_db.settings:
  register: hpc_db

- name: Refuse invalid settings of two roles
  mala.hpc_db.settings:
    roles: [instance, postgres]

- name: Print one
  ansible.builtin.debug:
    msg: "{{ hpc_db.server_wait }}"
"""

RETURN = r"""
server_wait:
  description: Value of this setting. Every other setting is returned in the same way.
  returned: success
  type: bool
"""
