# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """The options of a module that waits in slices."""

    DOCUMENTATION = r"""
options:
  slice:
    description:
      - Return after this many seconds with what is waited for, in C(waiting); without it, at the end.
      - The action of this name sets it, shows that, and calls the module again.
    type: int
  resume:
    description: What an earlier slice has returned; set by the action.
    type: dict
    default: {}
"""
