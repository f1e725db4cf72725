# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The schedulers by the value of the setting server_scheduler. A new one needs a file here and an entry below."""

from typing import Dict

from .base import Scheduler
from .gridengine import GridEngine
from .local import Local
from .slurm import Slurm

SCHEDULERS: Dict[str, Scheduler] = {each.name: each for each in (Slurm(), Local(), GridEngine())}
