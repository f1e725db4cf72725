# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: printable
short_description: Text that stays on its line, and that a terminal only shows
version_added: 0.1.0
description:
  - Writes each character that cannot be printed as an escape sequence, such as C(\n), C(\x1b) or C(\u202e).
  - For whatever a cluster says, in a comment or in a page for people.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: A text, or lists and dictionaries with texts in them.
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Show a host's name
  ansible.builtin.debug:
    msg: "# {{ found.host | mala.hpc_db.printable }}"
"""

RETURN = r"""
_value:
  description: The same, with each text in one line. What is no text stays as it is.
  type: raw
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable_data


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"printable": printable_data}
