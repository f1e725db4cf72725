#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: share
short_description: Add entries to the dictionary that the roles share
author: mala.hpc_db contributors (@mala-project)
description:
  - Returns a dictionary with more entries. Registered as C(hpc_db), it passes the results of one role to the following
    roles. C(roles/README.md) lists the entries.
attributes:
  action:
    support: full
    description: Runs only on the controller.
  check_mode:
    support: full
    description: Does the same in check mode.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  known:
    description: Current dictionary.
    type: dict
    required: true
  values:
    description: Entries to add. They replace those of the same name.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Share the instance directory
  mala.hpc_db.share:
    known: "{{ hpc_db }}"
    values:
      root: /home/alice/hpc_db/hpc_db
  register: hpc_db
"""

RETURN = r"""
root:
  description: Value of this entry. Every other entry is returned in the same way.
  returned: if it was added
  type: str
  sample: /home/alice/hpc_db/hpc_db
"""
