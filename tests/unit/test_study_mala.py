# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The example program: which variables it takes as its own job's."""

import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

PROGRAM = Path(__file__).parents[2] / "roles/workers/files/study_mala.py"
JOB = {"HPC_DB_TRIALS": "9", "HPC_DB_STUDY": "mala", "HPC_DB_URL": "x", "HPC_DB_OUTAGE": "", "HPC_DB_WAIT_TIME": "5"}


@pytest.mark.parametrize("variables, several", [
    ({}, False), ({"SLURM_NTASKS": "4"}, False),  # from the allocation that it was submitted from
    ({"SLURM_STEP_NUM_TASKS": "1"}, False), ({"SLURM_STEP_NUM_TASKS": "4"}, True),
    ({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, True), ({"PMI_SIZE": "4"}, True),
])
def test_one_process_of_several_is_told_by_what_has_started_it(variables, several, monkeypatch):
    mala = MagicMock()
    monkeypatch.setitem(sys.modules, "mala", mala)
    for name, value in {**JOB, **variables}.items():
        monkeypatch.setenv(name, value)

    runpy.run_path(str(PROGRAM))

    assert mala.Parameters().optuna_singlenode_setup.called is several
