#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Print a text
author: mala.hpc_db contributors (@mala-project)
description:
  - Prints a text on the screen, without quotes or a host name, regardless of the stdout callback.
  - Line breaks are kept. Other control characters are printed as escape sequences, such as C(\x1b).
  - Intended for text that people read or copy, such as a URL.
attributes:
  action:
    support: full
    description: Runs only on the controller.
  check_mode:
    support: full
    description: Also prints the text in check mode.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  text:
    description: Text of one or more lines.
    type: str
    required: true
  about:
    description: The same information for a program that runs the playbook and reads the tasks' results.
    type: dict
"""

EXAMPLES = r"""
- name: Print the URL
  mala.hpc_db.show:
    text: postgresql+psycopg2:///?service=hpc_db
"""

RETURN = r"""
text:
  description: The printed text.
  returned: success
  type: str
about:
  description: Value of O(about).
  returned: success
  type: dict
"""
