# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""server_wait on a clock that only moves during sleep; then server_wait and show in a real ansible-playbook."""

import json
import os
import subprocess
import sys

import pytest
from ansible_collections.mala.hpc_db.plugins.action.server_wait import WaitFailed, wait_for_server
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS


class Clock:
    """Advances only by sleeping."""

    def __init__(self):
        self.now = 1000.0
        self.pauses = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def job(state, reason="", node="", job_id="7"):
    return {"id": job_id, "name": "hpc-db", "state": state, "node": node, "reason": reason, "time_left": 60}


def found(job=None, endpoint=None, state=None, log_tail=None):
    return {"job": job, "endpoint": endpoint, "state": state, "log_tail": log_tail}


PENDING = found(job("PENDING", "Resources"))
RUNNING = found(job("RUNNING", node="c1"))
ENDPOINT = {"host": "c1", "port": 5433, "job": "7"}
SERVING = found(job("RUNNING", node="c1"), ENDPOINT)
NO_ANSWER = {"failed": True, "msg": "slurm_load_jobs error: Socket timed out"}


def wait(*looks, timeout=600, known=()):
    """Wait while the checks return these results, repeating the last; return the endpoint, the lines and the clock."""
    clock, lines, left = Clock(), [], list(looks)

    def look():
        return left.pop(0) if len(left) > 1 else left[0]

    try:
        found = wait_for_server(look, lines.append, timeout, SCHEDULERS["slurm"].is_hopeless, clock, known)
        return found, lines, clock
    except WaitFailed as failed:
        return failed, lines, clock


def test_reason_of_a_job_that_ended_before_the_wait_is_found():
    ended = found(state={"job": "7", "state": "failed", "reason": "disk full"}, log_tail=["x"])

    assert str(wait(ended, known=["7"])[0]) == "failed: disk full"
    assert str(wait(ended, known=["8"])[0]) == "the job is not in the queue; its log may show the reason"


def test_returns_at_once_if_it_serves():
    assert wait(SERVING)[:2] == (ENDPOINT, ["serving on c1:5433 after 0 s"])


def test_tells_what_changes():
    starting = {"state": "starting", "reason": "the lease", "job": "7"}

    endpoint, lines = wait(PENDING, PENDING, RUNNING, {**RUNNING, "state": starting}, SERVING)[:2]

    assert endpoint == ENDPOINT
    assert lines == [
        "PENDING (Resources), 0 s of at most 600 s",
        "RUNNING on c1, 1 s of at most 600 s",
        "RUNNING on c1, starting: the lease, 2 s of at most 600 s",
        "serving on c1:5433 after 4 s",
    ]


def test_is_never_silent_for_long_and_looks_less_and_less_often():
    failed, lines, clock = wait(PENDING, timeout=300)

    assert str(failed) == "PENDING (Resources), no server after 300 s; it stays queued: playbooks/status.yml"
    said = [float(line.split(", ")[1].split()[0]) for line in lines]
    assert all(later - earlier <= 40 for earlier, later in zip(said, said[1:]))
    assert (clock.pauses[0], max(clock.pauses)) == (0.5, 10.0)
    assert clock.now == 1300


@pytest.mark.parametrize("left_behind", [
    found(job("RUNNING")),
    found(job("RUNNING"), state={"state": "failed", "reason": "an old one", "job": "6"}),
    found(job("PENDING"), state={"state": "failed", "reason": "before the requeue", "job": "7"}),
])
def test_what_another_job_left_behind_counts_for_nothing(left_behind):
    endpoint, lines = wait(left_behind, SERVING)[:2]

    assert endpoint == ENDPOINT
    assert len(lines) == 2


ENDED = {"state": "ended", "reason": "stopped by SIGTERM", "job": "7"}
FAILED = {"state": "failed", "reason": "disk full", "job": "7"}


@pytest.mark.parametrize("looks, words", [
    ([PENDING, found()], "the job is not in the queue; its log may show the reason"),
    ([found()], "the job is not in the queue"),
    ([found(state={**FAILED, "job": "6"})], "the job is not in the queue; its log"),
    ([RUNNING, found(state=ENDED)], "(stopped by SIGTERM)"),
    ([RUNNING, found(state=FAILED)], "failed: disk full"),
    ([found(job("RUNNING"), state=FAILED)], "failed: disk full"),
    ([found(job("PENDING", "PartitionTimeLimit"))], "job 7 can never start with these options (PartitionTimeLimit)"),
    ([NO_ANSWER], "Socket timed out"),
])
def test_gives_up_at_once(looks, words):
    looks[-1]["log_tail"] = ["the end"]
    failed, _lines, clock = wait(*looks)

    assert words in str(failed)
    assert "\n" not in str(failed)
    assert clock.now < 1003
    assert failed.log_tail == (None if looks[-1] is NO_ANSWER else ["the end"])


def test_scheduler_that_does_not_answer_once_is_no_end():
    assert wait(PENDING, NO_ANSWER, NO_ANSWER, PENDING, NO_ANSWER, SERVING)[0] == ENDPOINT


@pytest.mark.parametrize("reason, hopeless", [
    ("PartitionTimeLimit", True), ("PartitionConfig", True), ("BadConstraints", True),
    ("InvalidAccount", True), ("InvalidQOS", True), ("QOSNotAllowed", True), ("AccountNotAllowed", True),
    ("DependencyNeverSatisfied", True),
    ("JobHeldUser", True), ("JobHeldAdmin", True), ("QOSMaxWallDurationPerJobLimit", True),
    ("QOSMaxMemoryPerNode", True), ("QOSMinCpuNotSatisfied", True), ("AssocMaxWallDurationPerJobLimit", True),
    ("AssocMaxCpuMinutesPerJobLimit", True), ("MaxMemPerLimit", True),
    ("Resources", False), ("Priority", False), ("Dependency", False), ("AssocMaxJobsLimit", False),
    ("AssocMaxSubmitJobLimit", False), ("AssocGrpCpuLimit", False), ("QOSMaxJobsPerUserLimit", False),
    ("QOSMaxCpuPerUserLimit", False), ("QOSGrpNodeLimit", False), ("MaxCpuPerAccount", False),
    ("PartitionNodeLimit", False), ("PartitionDown", False), ("ReqNodeNotAvail", False), ("BeginTime", False),
    ("Licenses", False), ("Reservation", False), ("SomethingNew", False),
])
def test_reasons_that_never_resolve(reason, hopeless):
    assert SCHEDULERS["slurm"].is_hopeless(reason) is hopeless


SQUEUE = """#!/bin/sh
[ -e "$0.looked" ] && state=RUNNING || state=PENDING
touch "$0.looked"
echo "JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON"
echo "7|$state|c1|1:00|hpc-db|Resources"
"""


@pytest.mark.parametrize("arguments, lines, skipped", [
    ([], ["[c] hpc-db: PENDING (Resources) on c1, ", "[c] hpc-db: serving on c1:5433 after "], []),
    (["--check"], [], ["hpc-db: "]),
])
def test_in_a_playbook(arguments, lines, skipped, tmp_path):
    """The lines reach the screen from Ansible's worker process, whatever the callback."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "endpoint.json").write_text(json.dumps(ENDPOINT))
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "play.yml").write_text(json.dumps([{
        "hosts": "c", "gather_facts": False, "tasks": [
            {"mala.hpc_db.server_wait": {
                "name": "hpc-db", "root": "$ROOT", "bin_dir": "$ROOT", "timeout": 60,
            }, "environment": {"ROOT": str(tmp_path)}},  # paths belong to the target
            {"mala.hpc_db.show": {"text": "postgresql+psycopg2:///?service='x'\nsecond line"}},
        ],
    }]))
    variables = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
    (tmp_path / "hosts").write_text(f"c {variables}\n")
    here = sys.modules[wait_for_server.__module__].__file__
    environment = {
        **os.environ, "ANSIBLE_COLLECTIONS_PATH": here.partition("/ansible_collections/")[0],
        "ANSIBLE_STDOUT_CALLBACK": "minimal", "ANSIBLE_NOCOLOR": "1", "HOME": str(tmp_path),
    }
    play = [sys.executable, "-m", "ansible", "playbook", "-i", "hosts", "play.yml", *arguments]

    done = subprocess.run(play, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    for line in [*lines, "\npostgresql+psycopg2:///?service='x'\nsecond line\n"]:
        assert line in done.stdout
    for line in skipped:
        assert line not in done.stdout
