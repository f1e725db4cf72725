# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: gauge
short_description: Bar of ASCII characters for a part of a whole
version_added: 0.1.0
description:
  - Uses only ASCII, so that the bar looks the same on a screen, in a log and in any locale.
  - Every part above zero has at least one character, and the bar is full only if the whole is reached.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: The part as a number, or several parts as a dictionary that maps each part's character to its number.
    type: raw
    required: true
  total:
    description: The whole. If it is 0, the bar is empty.
    type: float
    required: true
  width:
    description: Number of characters for the whole.
    type: int
    default: 20
"""

EXAMPLES = r"""
- name: Print the share of used connections
  ansible.builtin.debug:
    msg: "{{ 55 | mala.hpc_db.gauge(100) }}"  # [###########---------]

- name: Print trials by state
  ansible.builtin.debug:
    msg: "{{ {'#': 30, '>': 9, 'x': 1} | mala.hpc_db.gauge(40) }}"  # [###############>>>>x]
"""

RETURN = r"""
_value:
  description: Bar in brackets.
  type: str
"""

EMPTY = "-"


def gauge(parts: float | dict[str, float], total: float, width: int = 20) -> str:
    """Return the bar as text."""
    counts = parts if isinstance(parts, dict) else {"#": parts}
    counts = {mark: min(count, total) for mark, count in counts.items() if count > 0 and total > 0}
    cells = {mark: max(1, round(width * count / total)) for mark, count in counts.items()}
    room = width if sum(counts.values()) >= total else width - 1
    while sum(cells.values()) > max(room, len(cells)):
        cells[max(cells, key=lambda mark: cells[mark])] -= 1
    while cells and room == width and sum(cells.values()) < width:
        cells[max(cells, key=lambda mark: cells[mark])] += 1
    return "[" + "".join(mark * number for mark, number in cells.items()).ljust(width, EMPTY) + "]"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"gauge": gauge}
