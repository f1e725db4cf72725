# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """Options of a module that waits in slices."""

    DOCUMENTATION = r"""
options:
  slice:
    description:
      - Return after this many seconds with the current state in C(waiting). If not set, return at the end.
      - The action plugin of the same name sets it, shows the state, and calls the module again.
    type: int
  resume:
    description: Result of the previous slice. The action plugin sets it.
    type: dict
    default: {}
"""
