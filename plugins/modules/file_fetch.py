#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: file_fetch
short_description: Bring a file from the target to this machine, whole or not at all
author: mala.hpc_db contributors (@mala-project)
description:
  - Does what C(ansible.builtin.fetch) does, into a file that only the user can read, and that is there under its name
    only when its checksum is that of the target's.
  - A login shell that prints (in C(.bashrc), say) does no harm. Where ssh has no sftp, such text comes before the file.
    The file is then read by a module, as a whole into memory.
attributes:
  action:
    support: full
    description: It runs on this machine only, besides what C(ansible.builtin.fetch) runs on the target.
  check_mode:
    support: none
    description: Nothing is brought in check mode.
  diff_mode:
    support: none
    description: What is in the file is not shown.
options:
  src:
    description: The file on the target, an absolute path.
    type: str
    required: true
  dest:
    description: The file on this machine, an absolute path. Its folder has to be there.
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
