# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The schedulers that a test cluster can run."""

from __future__ import annotations

from types import ModuleType

import gridengine
import slurm
from state import State

SCHEDULERS: dict[str, ModuleType] = {"slurm": slurm, "gridengine": gridengine}


def scheduler_of(state: State) -> ModuleType:
    return SCHEDULERS[state.settings["scheduler"]]
