# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""hosting_options, short_options, submit_command and worker_job: what the roles ask of the scheduler at hand."""

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.mala.hpc_db.plugins.filter.hosting_options import hosting_options
from ansible_collections.mala.hpc_db.plugins.filter.short_options import short_options
from ansible_collections.mala.hpc_db.plugins.filter.submit_command import submit_command
from ansible_collections.mala.hpc_db.plugins.filter.worker_job import worker_job


@pytest.mark.parametrize("scheduler, options, made", [
    ("slurm", {"time": "1:00", "dependency": "after:7"}, {
        "mem": "4G", "dependency": "after:7", "signal": "B:USR1@120", "no-requeue": True, "time": "1:00",
    }),
    ("gridengine", {"l": {"h_rt": 600}}, {
        "hold_jid": "hpc_db", "r": True, "l": {"h_rt": 600, "s_rt": 480, "mem_free": "4G"},
    }),
    ("gridengine", {"l": ["h_rt"]}, {"l": ["h_rt"]}),  # which is refused later
    ("local", {"mem": "1G"}, {"mem": "1G"}),
])
def test_hosting_options(scheduler, options, made):
    assert hosting_options(options, scheduler, "hpc_db", "4G", "120", True) == made


def test_short_options_of_slurm():
    made = short_options({"partition": "defq", "time": "72:00:00", "nodelist": "c1", "mem": "16G"}, "slurm")

    assert {key: value for key, value in made.items() if value is not False} == {
        "partition": "defq", "time": "00:05:00", "mem": "512M",
    }
    assert short_options({"mem": "1G"}, "local") == {"mem": "1G"}


@pytest.mark.parametrize("scheduler, program", [("slurm", "sbatch"), ("gridengine", "qsub"), ("local", "python3")])
def test_submit_command_is_the_scheduler_s(scheduler, program):
    assert submit_command({}, "hpc_db", "/job.sh", "/job.log", scheduler)[0] == program


@pytest.mark.parametrize("scheduler, submit, name", [
    ("slurm", ["sbatch", "/job.sh"], "$SLURM_JOB_ID."), ("gridengine", ["qsub", "/job.sh"], "$JOB_ID."),
    ("local", ["sh", "/job.sh"], "hpc_db $$."),
])
def test_worker_job(scheduler, submit, name):
    made = worker_job("/job.sh", "workers_job_options", scheduler, {}, "mini")

    assert made["submit"] == submit
    assert name in made["name"]


@pytest.mark.parametrize("scheduler, options", [("slurm", {"time": 60}), ("gridengine", {"l": {"h_rt": "soon"}})])
def test_worker_job_names_the_setting(scheduler, options):
    with pytest.raises(AnsibleFilterError, match="^workers_job_options: .*time"):
        worker_job("/job.sh", "workers_job_options", scheduler, options, "mini")
