#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: settings
short_description: Read the settings of all roles as their types have them
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns each setting that a role of this collection documents, as the type in its C(argument_specs) has it.
    Whether it is given as text (C(-e NAME=VALUE)), in YAML or as JSON makes no difference then.
  - The roles read the settings from here only. A setting that is not given has its default, or else V(null). So has one
    of a role that is not in the play, if it is a template that cannot be evaluated there.
  - "In a text, a list may be written as C(a,b) or C([a, b]), and a dictionary as C(name=value,name=value) or
    C({name: value}). An empty text and V(null) are an empty text, list or dictionary."
  - A value that does not fit its type, or is none of the choices, is refused with the setting's name and what is
    allowed; all that are wrong at once.
attributes:
  action:
    support: full
    description: It runs on the controller only.
  check_mode:
    support: full
    description: The settings are read in check mode too.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options: {}
"""

EXAMPLES = r"""
- name: Read the settings
  mala.hpc_db.settings:
  register: __settings

- name: Print one
  ansible.builtin.debug:
    msg: "{{ __settings.server_wait }}"
"""

RETURN = r"""
server_wait:
  description: The setting of this name; and so on, for each one.
  returned: success
  type: bool
"""
