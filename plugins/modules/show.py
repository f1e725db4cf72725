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
  - Prints the text to the screen, without quotes or a host name, whatever the stdout callback is.
  - Only line breaks stay; what else a terminal would obey is printed as an escape sequence, such as C(\x1b).
  - For what a person reads or copies, such as a URL.
attributes:
  action:
    support: full
    description: It runs on the controller only.
  check_mode:
    support: full
    description: The text is printed in check mode too.
  diff_mode:
    support: none
    description: Nothing is ever changed.
options:
  text:
    description: The text, of one line or more.
    type: str
    required: true
  about:
    description: The same for a program that runs the playbook, and reads what tasks return.
    type: dict
"""

EXAMPLES = r"""
- name: Show the URL
  mala.hpc_db.show:
    text: postgresql+psycopg2:///?service=hpc_db
"""

RETURN = r"""
text:
  description: The text.
  returned: success
  type: str
about:
  description: What was given as O(about).
  returned: success
  type: dict
"""
