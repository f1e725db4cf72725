#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: folder_copy
short_description: Copy a folder from the target to this machine and show the progress
author: mala.hpc_db contributors (@mala-project)
description:
  - Copies new and changed files with C(rsync) over the inventory's ssh connection, and prints a line every few
    seconds.
  - Files that are still being written grow in place, so that they can be read here at the same time. Files that were
    removed on the target stay here.
  - This machine needs C(rsync) 3.1 or newer. The target can have any version.
  - Symbolic links that stay within the folder are copied as links. The targets of other links are copied.
attributes:
  action:
    support: full
    description: Runs only on this machine.
  check_mode:
    support: full
    description: In check mode, rsync reports the files that it would copy.
  diff_mode:
    support: none
    description: Only the number and the size of the files are reported.
notes:
  - C(ansible.posix.synchronize) cannot replace this module. It shows no progress, and rsync then fails if the login
    shell on the target prints text.
options:
  src:
    description: Absolute path of the folder on the target, taken literally.
    type: str
    required: true
  dest:
    description:
      - Absolute path of the folder on this machine that receives the content. It is created if needed. Only this user
        can access the folder and the copied files.
    type: path
    required: true
  label:
    description: Name of the folder in the progress lines. The default is the folder's own name.
    type: str
"""

EXAMPLES = r"""
- name: Copy the logs
  mala.hpc_db.folder_copy:
    src: /home/alice/beryllium/logs
    dest: ~/logs/beryllium
"""

RETURN = r"""
files:
  description: Number of files that were, or would be, copied.
  returned: success
  type: int
size:
  description: Size of these files in bytes.
  returned: success
  type: int
"""
