# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job counts as ended only if the scheduler says so without doubt; and one successor is queued."""

import json
import os
import subprocess
import sys
import time

import pytest
from hpc_db_host.processes import start_time
from hpc_db_host.scheduler import Queue, in_words, job_has_ended, run
from hpc_db_host.schedulers import SCHEDULERS

slurm, grid_engine = SCHEDULERS["slurm"], SCHEDULERS["gridengine"]
# Settings from a user's .bashrc, a site's profile or the surrounding job.
FOREIGN = """
SQUEUE_ACCOUNT SQUEUE_ALL SQUEUE_ARRAY SQUEUE_FEDERATION SQUEUE_FORMAT SQUEUE_FORMAT2 SQUEUE_LICENSES SQUEUE_LOCAL
SQUEUE_NAMES SQUEUE_PARTITION SQUEUE_PRIORITY SQUEUE_QOS SQUEUE_SIBLING SQUEUE_SORT SQUEUE_STATES SQUEUE_USERS
SINFO_ALL SINFO_FEDERATION SINFO_FORMAT SINFO_LOCAL SINFO_PARTITION SINFO_SORT SCONTROL_ALL SCONTROL_LOCAL
SCANCEL_ACCOUNT SCANCEL_BATCH SCANCEL_CTLD SCANCEL_FULL SCANCEL_HURRY SCANCEL_INTERACTIVE SCANCEL_NAME SCANCEL_PARTITION
SCANCEL_QOS SCANCEL_STATE SCANCEL_USER SCANCEL_VERBOSE SCANCEL_WCKEY SBATCH_ACCOUNT SBATCH_PARTITION SBATCH_WAIT
SLURM_CLUSTERS SLURM_EXIT_ERROR SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_ARRAY_TASK_ID SLURM_MEM_PER_NODE SRUN_DEBUG
SLURM_A_VARIABLE_OF_NEXT_YEAR MORE_INFO SGE_DEBUG_LEVEL SGE_TASK_ID JOB_ID PGSERVICEFILE PYTHONPATH LANGUAGE LC_MESSAGES
""".split()
NEEDED = {
    "slurm": {"SLURM_CONF": "/s", "SLURM_JWT": "t"},
    "gridengine": dict.fromkeys(("SGE_ROOT", "SGE_CELL", "SGE_CLUSTER_NAME", "SGE_QMASTER_PORT"), "x"),
}

GONE = "slurm_load_jobs error: Invalid job id specified\n"
BUSY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


@pytest.mark.parametrize("returncode, stdout, stderr, ended", [
    (0, "job|RUNNING|\n", "", False),
    (0, "job|PENDING|\n", "", False),
    (0, "job|COMPLETING|\n", "", False),
    (0, "job|SUSPENDED|\n", "", False),
    (0, "job|REQUEUED|\n", "", False),
    (0, "job|STOPPED|\n", "", False),
    (0, "job|TELEPORTING|\n", "", False),
    (0, "job|NODE_FAIL|\njob|RUNNING|\n", "", False),
    (0, "squeue: a message of the site\n", "", False),
    (0, "job|COMPLETED|\n", "", True),
    (0, "job|CANCELLED|\n", "", True),
    (0, "job|TIMEOUT|\n", "", True),
    (0, "job|NODE_FAIL|\n", "", True),
    (0, "job|PREEMPTED|\n", "", True),
    (0, "job|OUT_OF_MEMORY|\n", "", True),
    (0, "job|LAUNCH_FAILED|\n", "", False),
    (0, "job|REVOKED|\n", "", False),
    (0, "", "", False),
    (0, "\n", "", False),
    (0, "job|COMPLETED|\njob|CANCELLED|\n", "", True),
    (0, "job|COMPLETED|\njob|CANC", "", False),
    (0, "job|COMP", "", False),
    (0, "COMPLETED\n", "", False),
    (0, "Welcome to mini\njob|COMPLETED|\n--> 12 % of the allocation are left\n", "", True),
    (0, "Welcome | to mini\njob|RUNNING|\nCOMPLETED\n", "", False),
    (1, "", GONE, True),
    (1, "Welcome to mini\n" + GONE, "", True),
    (1, "job|COMPLETED|\n", BUSY, False),
    (1, "", "squeue: error: Invalid job id: 7x\n", False),
    (-9, "job|COMPLETED|\n", "", False),
    (1, "", BUSY, False),
    (1, "", "", False),
])
def test_answers_of_slurm(returncode, stdout, stderr, ended):
    assert slurm.has_ended(returncode, stdout, stderr) is ended


@pytest.mark.parametrize("returncode, stdout, stderr, ended", [
    (1, "", "Following jobs do not exist: \n9\n", True),
    (0, "==============================================================\njob_number:                 9\n", "", False),
    (1, "", "error: commlib error: got select error (Connection refused)\nunable to send message to qmaster\n", False),
    (1, "", "", False),
    (0, "", "", False),
    # -xml in ~/.sge_qstat
    (0, "<?xml version='1.0'?>\n<unknown_jobs >\n    <ST_name>77</ST_name>\n</unknown_jobs>\n", "", True),
    (0, "<?xml version='1.0'?>\n<detailed_job_info>\n</detailed_job_info>\n", "", False),
])
def test_answers_of_grid_engine(returncode, stdout, stderr, ended):
    assert grid_engine.has_ended(returncode, stdout, stderr) is ended


def test_queue_of_grid_engine():
    job = "<job_list><JB_job_number>{}</JB_job_number><JB_name>{}</JB_name><state>{}</state></job_list>"
    rows = [job.format(*row) for row in (("7", "hpc_db", "r"), ("8", "hpc_db", "hqw"), ("9", "hpc_db", "dr"))]
    text = "A message\n<?xml version='1.0'?>\n<job_info><queue_info>" + "".join(rows) + "</queue_info></job_info>"
    text += "\n--> 12 % of the allocation are left\n"

    assert [(job["id"], job["name"], job["state"]) for job in grid_engine.parse_queue(text)] == [
        ("7", "hpc_db", "RUNNING"), ("8", "hpc_db", "PENDING"), ("9", "hpc_db", "COMPLETING"),
    ]


@pytest.mark.parametrize("variables, bin_dir, root", [
    ({}, "/opt/sge/bin/lx-amd64", "/opt/sge"), ({"SGE_ROOT": "/other"}, "/opt/sge/bin/lx-amd64", "/other"),
    ({}, "/usr/bin", None), ({}, "", None),
])
def test_grid_engine_is_told_where_it_is(variables, bin_dir, root):
    assert grid_engine.environment(variables, bin_dir).get("SGE_ROOT") == root


@pytest.mark.parametrize("text", ["", "error: unable to contact qmaster\n", "<?xml version='1.0'?>\n<job_info>"])
def test_answer_of_grid_engine_that_is_no_queue(text):
    with pytest.raises(ValueError, match="the output is not XML"):
        grid_engine.parse_queue(text)


@pytest.fixture
def command(tmp_path):
    """Create a command of a scheduler, a shell script, in a folder."""
    def command(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path)

    return command


@pytest.mark.parametrize("scheduler", sorted(NEEDED))
def test_commands_get_a_few_variables_that_are_known(scheduler, command, monkeypatch):
    for name in FOREIGN:
        monkeypatch.setenv(name, "foreign")
    for name, value in {**NEEDED[scheduler], "LC_ALL": "de_DE"}.items():
        monkeypatch.setenv(name, value)
    dump = f"exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"

    got = json.loads(run(scheduler, command("squeue", dump), ["squeue"], 60).stdout)

    assert not {name for name, value in got.items() if value == "foreign"}
    assert got.items() >= NEEDED[scheduler].items()
    assert (got["HOME"], got["PATH"], got["LC_ALL"]) == (os.environ["HOME"], os.environ["PATH"], "C.UTF-8")


def test_nothing_is_left_of_a_command_that_does_not_answer(command, tmp_path):
    """A site's wrapper waits for the command, and the command holds the pipes."""
    folder = command("squeue", f"trap '' TERM; sleep 100 & echo $$ $! > {tmp_path}/pids; wait")

    with pytest.raises(subprocess.TimeoutExpired):
        run("slurm", folder, ["squeue"], 0.5)

    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    limit = time.monotonic() + 30
    while any(start_time(pid) for pid in pids):  # SIGKILL takes a moment
        assert time.monotonic() < limit
    assert len(pids) == 2


def test_answer_that_is_no_text_says_nothing(command):
    folder = command("squeue", "printf 'job|COMPLETED\\377|\\n'")

    assert job_has_ended("slurm", folder, "7") is False


@pytest.fixture
def bin_dir(tmp_path):
    """A squeue that knows one job, 7, which has completed."""
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\n"
        "case \"$*\" in *' --states=all --noheader --format=job|%T| --jobs=7') ;; *) echo \"$*\" >&2; exit 1; esac\n"
        "echo 'job|COMPLETED|'\n"
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


HEAD = "JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON"


def row(job, name, state, times="1:00/2:00", reason="None"):
    """Return a line of squeue's output."""
    return f"{job}|{state}||{times}|{name}|{reason}"


SUBMIT = [
    "sbatch", "--parsable", "--job-name=hpc_db", "--output=/r/job.log", "--open-mode=append", "--dependency=singleton",
    "--mem=4G", "--no-requeue", "--signal=B:USR1@120", "--time=24:00:00", "/r/job.sh",
]


SETTINGS = {"scheduler": "slurm", "job_name": "hpc_db", "handover_after": ""}


class FakeQueue(Queue):
    """Answers like Slurm: squeue lists all of the user's jobs, sbatch --parsable prints an id."""

    refuses = ""

    def __init__(self, *jobs, after=""):
        successor = {"options": {"time": "24:00:00"}, "memory": "4G", "script": "/r/job.sh", "output": "/r/job.log"}
        settings = {**SETTINGS, "stop_notice": 120, "handover_after": after, "successor": successor}
        Queue.__init__(self, settings, "7")
        self.jobs = list(jobs)
        self.submitted = []

    def _run(self, command, timeout=120):
        if "--format=forecast|%V|%S|" in command:
            return "forecast|1790000000|1790003600|\n"
        if command[0] == "squeue":
            return "\n".join([HEAD, *(row(*job) for job in self.jobs)])
        if command[0] == "sbatch":
            self.submitted.append(command)
            if self.refuses and any(self.refuses in flag for flag in command):
                raise OSError("sbatch: error: Batch job submission failed: Job dependency problem")
            job = str(7 + len(self.submitted))
            self.jobs.append((job, "hpc_db", "PENDING"))
            return f"{job}\n"
        assert command[:2] == ["scancel", "--state=PENDING"]
        self.jobs = [job for job in self.jobs if job[0] != command[2]]
        return ""


OURS = ("7", "hpc_db", "RUNNING")


@pytest.mark.parametrize("others, follower, queued", [
    ([], "job 8 follows", 2),
    ([("9", "hpc_db", "PENDING")], "job 9 follows", 2),
    ([("9", "hpc_db", "COMPLETING")], "job 8 follows", 3),
    ([("9", "HPC_DB", "PENDING"), ("10", "worker", "PENDING")], "job 8 follows", 4),
    ([("9", "hpc_db", "CANCELLED")], "job 8 follows", 3),
])
def test_one_successor_is_kept(others, follower, queued):
    queue = FakeQueue(OURS, *others)

    assert queue.ensure_successor() == follower
    assert queue.ensure_successor() == follower
    assert len(queue.jobs) == queued
    assert queue.submitted in ([], [SUBMIT])


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


WAITS = "cannot start earlier (server_handover_after, or dependency in server_job_options)"
LONG = ("7", "hpc_db", "RUNNING", "1:00:00/2:00:00")


@pytest.mark.parametrize("after, dependency", [
    ("50%", "after:7+60?afterany:7"), ("10%", "after:7+12?afterany:7"), ("30", "after:7+30?afterany:7"),
    ("1:30:30", "after:7+91?afterany:7"), ("", "singleton"), ("2:00:00", "singleton"), ("99%", "singleton"),
])
@pytest.mark.usefixtures("utc")
def test_successor_may_begin_before_its_predecessor_ends(after, dependency, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1790000000.0)
    queue = FakeQueue(LONG, after=after)

    assert queue.ensure_successor() == "job 8 follows"

    assert f"--dependency={dependency}" in queue.submitted[0]
    assert queue.successor == {
        "id": "8", "state": "PENDING", "reason": "", "submitted": 1790000000.0, "expected": 1790003600.0,
        "told": "queued as job 8 since 14:13, expected 15:13",
        "late": WAITS if dependency == "singleton" else "",
    }


@pytest.mark.parametrize("job, told", [
    ({"state": "PENDING", "reason": "Priority"}, "queued as job 8 since 14:13, Priority, expected 2026-09-22 15:13"),
    ({"state": "RUNNING", "reason": ""}, "job 8 is RUNNING"),
])
@pytest.mark.usefixtures("utc")
def test_message_for_waiting_workers(job, told, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1790000000.0)

    assert in_words({"id": "8", **job}, {"submitted": 1790000000.0, "expected": 1790090000.0}) == told


def test_without_a_forecast_only_the_reason_is_told():
    assert in_words({"id": "8", "state": "PENDING", "reason": "Priority"}, {"submitted": None, "expected": None}) == (
        "queued as job 8, Priority"
    )


def test_dependency_of_the_user_is_kept():
    queue = FakeQueue(LONG, after="50%")
    queue._settings["successor"]["options"]["dependency"] = "singleton"

    queue.ensure_successor()

    assert queue.submitted == [SUBMIT] and queue.successor["late"] == WAITS


@pytest.mark.parametrize("reason, late", [
    ("QOSMaxJobsPerUserLimit", True), ("AssocMaxJobsLimit", True), ("AssocGrpJobsLimit", True), ("Priority", False),
    ("Resources", False), ("Dependency", False), ("MaxJobsPerAccount", True), ("QOSMaxCpuPerUserLimit", True),
    ("AssocGrpCPUMinutesLimit", False), ("AssocGrpWallLimit", False), ("QOSMaxNodePerJobLimit", False),
])
def test_limit_on_running_jobs_is_known(reason, late):
    queue = FakeQueue(LONG, after="50%")
    queue.ensure_successor()

    assert bool(queue._why_late({"id": "8", "state": "PENDING", "reason": reason})) is late


def test_slurm_that_does_not_understand_the_dependency_gets_the_old_one():
    queue = FakeQueue(LONG, after="50%")
    queue.refuses = "?afterany"

    assert queue.ensure_successor() == (
        "job 9 follows, but only at the end of this job: "
        "sbatch: error: Batch job submission failed: Job dependency problem"
    )

    assert queue.submitted[1] == SUBMIT and queue.earliest is None


@pytest.mark.usefixtures("utc")
def test_successors_after_those_that_vanished_begin_later_and_later(monkeypatch):
    """But not later than the end of this job: one is always queued."""
    monkeypatch.setattr(time, "time", lambda: 1790000000.0)  # 14:13
    queue = FakeQueue(("7", "hpc_db", "RUNNING", "50:00/2:00:00"), after="50%")
    said = []

    for _turn in range(5):
        said.append(queue.ensure_successor())
        assert queue.ensure_successor() == said[-1]
        assert queue.trouble == ("" if len(said) == 1 else said[-1])
        queue.jobs = queue.jobs[:1]  # the successor has begun and ended

    assert said == [
        "job 8 follows", "job 8 has ended without taking over, job 9 follows",
        "job 9 has ended without taking over, job 10 follows at 14:14 or later",
        "job 10 has ended without taking over, job 11 follows at 14:15 or later",
        "job 11 has ended without taking over, job 12 follows at 14:17 or later",
    ]
    dependencies = [flag for command in queue.submitted for flag in command if "dependency" in flag]
    assert dependencies == [
        f"--dependency=after:7+{minutes}?afterany:7" for minutes in (60, 60, 71, 72, 74)
    ]


def test_successor_whose_submission_fails_is_no_longer_named():
    queue = FakeQueue(LONG, after="50%")
    queue.ensure_successor()
    queue.jobs, queue.refuses = [LONG], "sbatch"

    for _turn in range(2):
        with pytest.raises(OSError, match="Job dependency problem"):
            queue.ensure_successor()
        assert queue.successor is None
    queue.refuses = ""
    assert queue.ensure_successor() == "job 13 follows"


def test_workers_do_not_wait_for_a_successor_that_cannot_start():
    queue = FakeQueue(LONG, ("8", "hpc_db", "PENDING", "1:00/2:00", "JobHeldAdmin"), after="50%")

    assert queue.ensure_successor() == "job 8 cannot start (JobHeldAdmin)" == queue.trouble

    assert (queue.successor["id"], queue.successor["told"]) == ("8", "")


def test_predecessor_that_still_ends_is_not_a_successor():
    queue = FakeQueue(LONG, ("6", "hpc_db", "RUNNING"))
    queue.predecessor = "6"

    assert queue.ensure_successor() == "job 8 follows"


def test_last_look_updates_the_successor_if_the_scheduler_answers(monkeypatch):
    queue = FakeQueue(LONG)
    queue.ensure_successor()

    monkeypatch.setattr(queue, "_run", lambda *_arguments: raise_(subprocess.TimeoutExpired("squeue", 5)))
    queue.look(5)
    assert queue.successor["id"] == "8"
    monkeypatch.undo()
    queue.jobs = []  # filtered
    queue.look(5)
    assert queue.successor["id"] == "8"
    queue.jobs = [("7", "hpc_db", "COMPLETING")]
    queue.look(5)
    assert queue.successor is None


def raise_(error):
    raise error


def test_successors_are_cancelled_and_nobody_else():
    queue = FakeQueue(OURS, ("8", "hpc_db", "PENDING"), ("9", "worker", "PENDING"))

    queue.cancel_successors()

    assert queue.jobs == [OURS, ("9", "worker", "PENDING")]
    assert queue.successor is None
    with pytest.raises(OSError, match="^the server has failed for good$"):
        queue.ensure_successor()


@pytest.mark.parametrize("listed", [HEAD, f"{HEAD}\n{row(9, 'worker', 'PENDING')}"])
@pytest.mark.parametrize("state, submits", [
    ("echo 'job|RUNNING|'", False), ("true", False), ("exit 1", False), ("echo 'job|COMPLETED|'", True),
    (f"echo '{GONE.strip()}' >&2; exit 1", True),
])
def test_listing_without_our_own_job_brings_no_successor(listed, state, submits, command, tmp_path):
    """The list is filtered or empty; our own job may only be missing if it has ended, as for a program run by hand."""
    folder = command("squeue", f"case \"$*\" in *--jobs=7) {state};; *) echo '{listed}'; esac")
    command("sbatch", f"echo called >> {tmp_path}/called; echo 8")
    settings = {**SETTINGS, "bin_dir": folder, "successor": ["sbatch"]}

    if submits:
        assert Queue(settings, "7").ensure_successor() == "job 8 follows"
    else:
        with pytest.raises(OSError, match="^squeue does not list job 7, although it is running$"):
            Queue(settings, "7").ensure_successor()
    assert (tmp_path / "called").exists() is submits


def site(command, queue, printed, folder):
    """Create commands of a site that prints additional lines: sbatch queues a job, and prints ``printed``."""
    command("squeue", f"""[ -e {folder}/eight ] && more="$(printf '\\n{row(8, "hpc_db", "PENDING")}')"
cat << end
{queue}
end""")
    command("sbatch", f"touch {folder}/eight\ncat << 'end'\n{printed}\nend")
    return Queue({**SETTINGS, "bin_dir": str(folder), "successor": ["sbatch"]}, "7")


@pytest.mark.parametrize("queue", [
    f"{HEAD}\n{row(*OURS)}$more",
    f"Welcome to mini\n\x1b[1m{HEAD}\x1b[0m\n\x1b[32m{row(*OURS)}\x1b[0m$more\n--> 12 % are left",
])
@pytest.mark.parametrize("printed", [
    "8", "8;mini", "Welcome to mini\n8\n--> 12 % of the allocation are left", "\x1b[32m8\x1b[0m\r",
    # None of this is the id, which only the queue shows.
    "8\n12", "Your job is queued", "", "job-id=8, have fun",
])
def test_successor_is_found_whatever_a_site_prints(printed, queue, command, tmp_path):
    asked = site(command, queue, printed, tmp_path)

    assert asked.ensure_successor() == "job 8 follows"
    (tmp_path / "sbatch").unlink()
    assert asked.ensure_successor() == "job 8 follows"


@pytest.mark.parametrize("printed, follows", [
    ("8;mini", "job 8 follows"), ("Submitted batch job 8", "job 8 follows"),
    ("Welcome", r"^sbatch printed no job id \(Welcome\), and no job hpc_db is in the queue$"),
    ("", r"^sbatch printed no job id \(nothing at all\), and no job hpc_db is in the queue$"),
])
def test_successor_that_the_queue_does_not_show_yet(printed, follows, command, tmp_path):
    asked = site(command, f"{HEAD}\n{row(*OURS)}", printed, tmp_path)

    if follows.startswith("job"):
        assert asked.ensure_successor() == follows
    else:
        with pytest.raises(OSError, match=follows):
            asked.ensure_successor()


@pytest.mark.parametrize("printed", ["", "Welcome to mini\n", row(*OURS), "slurm_load_jobs error: x\n"])
def test_answer_of_slurm_that_is_no_queue(printed):
    with pytest.raises(ValueError, match="^squeue: the output is not a list of jobs"):
        slurm.parse_queue(printed)


@pytest.mark.parametrize("text, job", [
    ("12\n", "12"), ('Your job 12 ("hpc_db") has been submitted\n', "12"), ("Welcome!\n12\n--> 3 % are left\n", "12"),
    ("", None), ("Welcome!\n", None),
])
def test_id_of_a_submission_to_grid_engine(text, job):
    assert grid_engine.parse_submit(text) == job
