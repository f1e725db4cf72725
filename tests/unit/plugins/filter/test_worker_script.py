# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The head of a job script contains only options, whatever their values; each scheduler has its call and name."""

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.filter.worker_script import worker_script


def made(scheduler, options, folder="/a b/log%"):
    return worker_script("/job.sh", scheduler, "workers_job_options", options, "train", 8, folder, "mini")


@pytest.mark.parametrize("options, lines", [
    ({}, []),
    ({"partition": "defq", "time": "24:00:00", "exclusive": True, "requeue": False, "account": None},
     ["#SBATCH --exclusive", "#SBATCH --partition=defq", "#SBATCH --time=24:00:00"]),
    ({"comment": "a b; $(date)"}, ["#SBATCH '--comment=a b; $(date)'"]),
    ({"comment": "it's"}, ["#SBATCH '--comment=it'\"'\"'s'"]),
])
def test_options_are_quoted_for_sbatch(options, lines):
    head = ["#SBATCH --job-name=train", "#SBATCH --array=1-8", "#SBATCH '--output=/a b/log%%/%A_%a.log'"]

    assert made("slurm", options)["head"] == head + lines


@pytest.mark.parametrize("scheduler, submit, name", [
    ("slurm", ["sbatch", "/job.sh"], "$SLURM_JOB_ID."), ("gridengine", ["qsub", "/job.sh"], "$JOB_ID."),
    ("local", ["sh", "/job.sh"], "hpc_db $$."),
])
def test_call_and_name_are_the_scheduler_s(scheduler, submit, name):
    script = made(scheduler, {}, "/log")

    assert script["submit"] == submit
    assert name in script["connection"]


@pytest.mark.parametrize("scheduler, options, says", [
    ("slurm", {"comment": "a\n#SBATCH --wrap=date"}, "workers_job_options: comment: .* is more than one line"),
    ("slurm", {"time": 86400}, "workers_job_options: time: 86400 is how YAML reads an unquoted time"),
    ("slurm", {"array": "1-9"}, "workers_job_options: array: hosting_job sets this itself"),
    ("gridengine", {"l": {"h_rt": "soon"}}, "workers_job_options: l: h_rt: 'soon' is not a time"),
])
def test_refused_with_the_setting(scheduler, options, says):
    with pytest.raises(AnsibleFilterError, match=f"^{says}"):
        made(scheduler, options, "/log")
