# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""job_script_check: its query and its messages; tests/resilience has a real Slurm."""

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SchedulerError
from ansible_collections.mala.hpc_db.plugins.modules.job_script_check import judge


def params(scheduler="slurm", **options):
    return {"scheduler": scheduler, "script": "/job.sh", "options": options, "setting": "workers_job_options"}


@pytest.mark.parametrize("scheduler, asked", [
    ("slurm", [["sbatch", "--test-only", "/job.sh"]]),
    ("gridengine", [["qsub", "-w", "v", "-N", "check", "-b", "y", "/bin/true"]]), ("local", []),
])
def test_script_is_judged(scheduler, asked):
    calls = []

    judge(params(scheduler), calls.append)

    assert calls == asked


def test_refusal_names_the_setting():
    def run(command):
        raise SchedulerError("invalid partition specified")

    with pytest.raises(SchedulerError, match="^workers_job_options: sbatch says: invalid partition specified$"):
        judge(params(), run)


def test_option_of_the_login_alone_is_refused(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "debug")

    with pytest.raises(ValueError, match="^workers_job_options: partition: not set, but your login shell sets"):
        judge(params(), print)
    assert judge(params(partition="debug"), print) == []
    (said,) = judge(params(partition="work"), print)
    assert said.startswith("workers_job_options: partition in the job script has no effect while your shell sets")


def test_script_that_would_only_wait_is_no_refusal():
    def run(command):
        if command[0] == "sinfo":
            return "defq*|up|c1|drained|4000|4\n"
        raise SchedulerError("allocation failure: Requested node configuration is not available")

    (said,) = judge(params(), run)

    assert said.startswith("workers_job_options: sbatch says: allocation failure: Requested node")
    assert said.endswith("c1 drained")
