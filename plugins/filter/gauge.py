# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: gauge
short_description: A part of a whole as a bar of plain characters
version_added: 0.1.0
description:
  - Draws with ASCII only, so that the bar is the same on a screen, in a log and in any locale.
  - Whatever is not nothing has one character at least, and the bar is full only if nothing is missing.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: The part as a number, or several parts as a dictionary of their numbers, each by its character.
    type: raw
    required: true
  total:
    description: The whole. With nothing in it, the bar is empty.
    type: float
    required: true
  width:
    description: How many characters stand for the whole.
    type: int
    default: 20
"""

EXAMPLES = r"""
- name: Show how many connections are used
  ansible.builtin.debug:
    msg: "{{ 55 | mala.hpc_db.gauge(100) }}"  # [###########---------]

- name: Show trials by state
  ansible.builtin.debug:
    msg: "{{ {'#': 30, '>': 9, 'x': 1} | mala.hpc_db.gauge(40) }}"  # [###############>>>>x]
"""

RETURN = r"""
_value:
  description: The bar, in brackets.
  type: str
"""

EMPTY = "-"


def gauge(parts: float | dict[str, float], total: float, width: int = 20) -> str:
    """Return the bar."""
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
