# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether Slurm says that a job has ended. A doubt means no."""

import pytest
from hpc_db_host.scheduler import job_has_ended, slurm_has_ended

GONE = "slurm_load_jobs error: Invalid job id specified\n"
BUSY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


@pytest.mark.parametrize("returncode, stdout, stderr, ended", [
    (0, "RUNNING\n", "", False),
    (0, "PENDING\n", "", False),
    (0, "COMPLETING\n", "", False),
    (0, "SUSPENDED\n", "", False),
    (0, "REQUEUED\n", "", False),
    (0, "STOPPED\n", "", False),
    (0, "TELEPORTING\n", "", False),
    (0, "NODE_FAIL\nRUNNING\n", "", False),
    (0, "squeue: a message of the site\n", "", False),
    (0, "COMPLETED\n", "", True),
    (0, "CANCELLED\n", "", True),
    (0, "TIMEOUT\n", "", True),
    (0, "NODE_FAIL\n", "", True),
    (0, "PREEMPTED\n", "", True),
    (0, "OUT_OF_MEMORY\n", "", True),
    (0, "", "", True),
    (1, "", GONE, True),
    (1, "", BUSY, False),
    (1, "", "", False),
])
def test_answers_of_slurm(returncode, stdout, stderr, ended):
    assert slurm_has_ended(returncode, stdout, stderr) is ended


@pytest.fixture
def bin_dir(tmp_path):
    """A squeue that knows one job, 7, which has completed."""
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\n"
        "[ \"$*\" = '--noheader --format=%T --jobs=7' ] || { echo \"$*\" >&2; exit 1; }\n"
        "echo COMPLETED\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize("scheduler, job, ended", [
    ("slurm", "7", True), ("slurm", "8", False), ("slurm", "", False), ("local", "7", False), ("", "7", False),
])
def test_only_slurm_is_asked(scheduler, job, ended, bin_dir):
    assert job_has_ended(scheduler, bin_dir, job) is ended


def test_slurm_that_is_not_there_says_nothing(tmp_path):
    assert job_has_ended("slurm", str(tmp_path / "missing"), "7") is False
