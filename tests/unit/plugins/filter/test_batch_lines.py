# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options at the head of a job script: nothing but options, whatever they hold."""

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.filter.batch_lines import batch_lines


@pytest.mark.parametrize("options, lines", [
    ({}, []),
    ({"partition": "defq", "time": "24:00:00", "exclusive": True, "requeue": False, "account": None},
     ["#SBATCH --exclusive", "#SBATCH --partition=defq", "#SBATCH --time=24:00:00"]),
    ({"comment": "a b; $(date)"}, ["#SBATCH '--comment=a b; $(date)'"]),
    ({"comment": "it's"}, ["#SBATCH '--comment=it'\"'\"'s'"]),
])
def test_options_are_quoted_for_sbatch(options, lines):
    head = ["#SBATCH --job-name=train", "#SBATCH --array=1-8", "#SBATCH '--output=/a b/log%%/%A_%a.log'"]

    assert batch_lines(options, "workers_job_options", "slurm", "train", 8, "/a b/log%") == head + lines


@pytest.mark.parametrize("options, says", [
    ({"comment": "a\n#SBATCH --wrap=date"}, "workers_job_options: comment: .* is more than one line"),
    ({"time": 86400}, "workers_job_options: time: 86400 is what YAML makes of a bare time"),
    ({"array": "1-9"}, "workers_job_options: array: hosting_job sets this itself"),
])
def test_refused_with_the_setting(options, says):
    with pytest.raises(AnsibleFilterError, match=says):
        batch_lines(options, "workers_job_options", "slurm", "train", 8, "/log")
