# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: pythons
short_description: Choose a Python that runs modules
version_added: 0.1.0
description:
  - Reads versions and paths of Pythons from the output of a shell. Other lines, such as a login banner, are ignored.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Lines such as C(python 3.11.2 /usr/bin/python3), the preferred Python first.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Print the chosen Python
  ansible.builtin.debug:
    msg: "{{ (['python 3.6.8 /usr/bin/python3', 'python 3.11.2 /opt/python3'] | mala.hpc_db.pythons).chosen }}"
"""

RETURN = r"""
_value:
  description:
    - C(found) is the list of all Pythons 3, such as C(3.11.2 /usr/bin/python3), each once.
    - C(chosen) is the path of the first one of version 3.9 or newer. Empty if there is none.
  type: dict
"""

import re
from typing import Any

FOUND = re.compile(r"python (3[.].*)", re.DOTALL)
SUITABLE = re.compile(r"3[.](?:9|[1-9][0-9])[.][^ ]* (.*)", re.DOTALL)


def pythons(lines: list[str]) -> dict[str, Any]:
    """Return the Pythons in these lines, and the path of the first one that runs modules."""
    found = list(dict.fromkeys(match[1] for match in map(FOUND.match, lines) if match))
    suitable = [match[1] for match in map(SUITABLE.match, found) if match]
    return {"found": found, "chosen": suitable[0] if suitable else ""}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"pythons": pythons}
