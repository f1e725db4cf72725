# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The variables of a scheduler's commands, and so of the jobs that they submit: chosen by name, never all there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Those of every scheduler. The hosting program's scheduler.py has the same, so that each job is told the same.
INHERITED = ("HOME", "KRB5CCNAME", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "TZ", "USER")


def build_environment(variables: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return what the commands get of ``variables``; ``names`` are the scheduler's own."""
    kept = {name: variables[name] for name in (*INHERITED, *names) if name in variables}
    return {**kept, "LC_ALL": "C.UTF-8"}  # their words are read here
