# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: printable
short_description: Escape control characters in text
version_added: 0.1.0
description:
  - Replaces each unprintable character by an escape sequence, such as C(\n), C(\x1b) or C(\u202e).
  - Intended for text from a cluster that is written into a comment or shown to people.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Text, or lists and dictionaries that contain text.
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Print a host's name
  ansible.builtin.debug:
    msg: "# {{ found.host | mala.hpc_db.printable }}"
"""

RETURN = r"""
_value:
  description: The input with each text on one line. Other values are unchanged.
  type: raw
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable_data


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"printable": printable_data}
