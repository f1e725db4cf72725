# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the scheduler says that a job has ended, where a doubt means no; and that one job follows."""

import pytest
from hpc_db_host import scheduler_gridengine, scheduler_slurm
from hpc_db_host.scheduler import Queue, job_has_ended

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
    assert scheduler_slurm.has_ended(returncode, stdout, stderr) is ended


@pytest.mark.parametrize("returncode, stdout, stderr, ended", [
    (1, "", "Following jobs do not exist: \n9\n", True),
    (0, "==============================================================\njob_number:                 9\n", "", False),
    (1, "", "error: commlib error: got select error (Connection refused)\nunable to send message to qmaster\n", False),
    (1, "", "", False),
])
def test_answers_of_grid_engine(returncode, stdout, stderr, ended):
    assert scheduler_gridengine.has_ended(returncode, stdout, stderr) is ended


def test_queue_of_grid_engine():
    job = "<job_list><JB_job_number>{}</JB_job_number><JB_name>{}</JB_name><state>{}</state></job_list>"
    rows = [job.format(*row) for row in (("7", "hpc_db", "r"), ("8", "hpc_db", "hqw"), ("9", "hpc_db", "dr"))]
    text = "A message\n<?xml version='1.0'?>\n<job_info><queue_info>" + "".join(rows) + "</queue_info></job_info>"

    assert scheduler_gridengine.parse_queue(text) == [("7", "hpc_db"), ("8", "hpc_db")]


@pytest.mark.parametrize("variables, bin_dir, root", [
    ({}, "/opt/sge/bin/lx-amd64", "/opt/sge"), ({"SGE_ROOT": "/other"}, "/opt/sge/bin/lx-amd64", "/other"),
    ({}, "/usr/bin", None), ({}, "", None),
])
def test_grid_engine_is_told_where_it_is(variables, bin_dir, root):
    assert scheduler_gridengine.environment(variables, bin_dir).get("SGE_ROOT") == root


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
    ("../slurm", "7", False),
])
def test_only_a_scheduler_is_asked(scheduler, job, ended, bin_dir):
    assert job_has_ended(scheduler, bin_dir, job) is ended


def test_slurm_that_is_not_there_says_nothing(tmp_path):
    assert job_has_ended("slurm", str(tmp_path / "missing"), "7") is False


class FakeQueue(Queue):
    """Answers like Slurm: squeue lists all of the user's jobs, sbatch --parsable prints an id."""

    def __init__(self, *jobs):
        successor = ["sbatch", "--parsable", "--job-name=hpc_db", "/r/host/job.sh"]
        settings = {"scheduler": "slurm", "job_name": "hpc_db", "successor": successor}
        Queue.__init__(self, settings, "7")
        self.jobs = list(jobs)

    def _run(self, command):
        if command[0] == "squeue":
            return "".join(f"{job}|{name}|{state}\n" for job, name, state in self.jobs)
        if command[0] == "sbatch":
            self.jobs.append(("8", "hpc_db", "PENDING"))
            return "8\n"
        assert command[:2] == ["scancel", "--state=PENDING"]
        self.jobs = [job for job in self.jobs if job[0] != command[2]]
        return ""


OURS = ("7", "hpc_db", "RUNNING")


@pytest.mark.parametrize("others, follower, queued", [
    ([], "job 8 follows", 2),
    ([("9", "hpc_db", "PENDING")], "job 9 follows", 2),
    ([("9", "hpc_db", "COMPLETING")], "job 8 follows", 3),
    ([("9", "HPC_DB", "PENDING"), ("10", "worker", "PENDING")], "job 8 follows", 4),
])
def test_one_successor_is_kept(others, follower, queued):
    queue = FakeQueue(OURS, *others)

    assert queue.ensure_successor() == follower
    assert queue.ensure_successor() == follower
    assert len(queue.jobs) == queued


def test_successors_are_cancelled_and_nobody_else():
    queue = FakeQueue(OURS, ("8", "hpc_db", "PENDING"), ("9", "worker", "PENDING"))

    queue.cancel_successors()

    assert queue.jobs == [OURS, ("9", "worker", "PENDING")]


def test_successor_gets_no_option_of_ours_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nenv | grep -E '^(SLURM|SBATCH)_' | sort | tr '\\n' ' ' >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SBATCH_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")

    with pytest.raises(OSError, match="^squeue: SLURM_CONF=x$"):
        Queue({"scheduler": "slurm", "job_name": "hpc_db", "bin_dir": str(tmp_path)}, "7").ensure_successor()
