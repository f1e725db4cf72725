#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: folder_copy
short_description: Bring a folder from the target to this machine, and show the progress
author: mala.hpc_db contributors (@mala-project)
description:
  - Copies what is new or has changed in a folder of the target with C(rsync), over the ssh connection that the
    inventory describes, and prints a line every few seconds.
  - Files that are being written, and may be read here meanwhile, get longer in place. What was removed on the target
    stays here.
  - This machine needs C(rsync) 3.1 or newer, the target any.
  - A symbolic link within the folder stays one; what another one leads to is copied.
attributes:
  action:
    support: full
    description: It runs on this machine only.
  check_mode:
    support: full
    description: In check mode rsync tells what it would bring.
  diff_mode:
    support: none
    description: Only the number and the size of the files are told.
options:
  src:
    description: The folder on the target, an absolute path, taken literally.
    type: str
    required: true
  dest:
    description:
      - The folder on this machine that gets its content, an absolute path. It is made if need be, for the user alone,
        as what is copied is.
    type: path
    required: true
  label:
    description: What the lines call it; the folder's name if it is not given.
    type: str
"""

EXAMPLES = r"""
- name: Bring the logs
  mala.hpc_db.folder_copy:
    src: /home/alice/beryllium/logs
    dest: ~/logs/beryllium
"""

RETURN = r"""
files:
  description: How many files came, or in check mode would come.
  returned: success
  type: int
size:
  description: How many bytes these files have.
  returned: success
  type: int
"""
