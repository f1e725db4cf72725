#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: file_fetch
short_description: Fetch a file from the target, complete or not at all
author: mala.hpc_db contributors (@mala-project)
description:
  - Works like C(ansible.builtin.fetch), but only this user can read the new file, and it gets its name only after its
    checksum was compared with the target's.
  - Output of a login shell, for example from C(.bashrc), does not damage the file. Without sftp, ssh puts such output
    in front of the file, so a module reads the whole file into memory.
attributes:
  action:
    support: full
    description: Runs only on this machine, except for C(ansible.builtin.fetch) on the target.
  check_mode:
    support: none
    description: Fetches nothing in check mode.
  diff_mode:
    support: none
    description: The content of the file is not shown.
options:
  src:
    description: Absolute path of the file on the target.
    type: str
    required: true
  dest:
    description: Absolute path of the file on this machine. Its folder must exist.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Fetch a dump
  mala.hpc_db.file_fetch:
    src: /home/alice/hpc_db/hpc_db/dumps/studies.dump
    dest: ~/hpc_db_dumps/studies.dump
"""

RETURN = r"""#"""
