# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: shell_path
short_description: Quote a path as one word of a shell script
version_added: 0.1.0
description:
  - Quotes the path. A leading C(~/) still expands to the home directory of the user who runs the script.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Path, or name of a program.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Write a script that starts a program
  ansible.builtin.copy:
    content: "exec python3 {{ '~/my studies/be.py' | mala.hpc_db.shell_path }}"
    dest: ~/start.sh
    mode: "0700"
"""

RETURN = r"""
_value:
  description: Quoted word.
  type: str
"""

import shlex


def shell_path(path: str) -> str:
    """Return the quoted path."""
    return f'"$HOME"{shlex.quote(path[1:])}' if path.startswith("~/") else shlex.quote(path)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"shell_path": shell_path}
