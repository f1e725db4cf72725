# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""short_job against a Slurm that ends the job after a few calls; tests/integration has a real one."""

import socket
import time

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SchedulerError
from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Waiting
from ansible_collections.mala.hpc_db.plugins.modules.short_job import run_job


class FakeSlurm:
    """Runs one job, which prints ``output`` when it ends, after ``looks`` calls."""

    def __init__(self, path, output, looks=3, refuses="", printed="12\n"):
        self.path, self.output, self.looks, self.refuses, self.printed = path, output, looks, refuses, printed
        self.cancelled = []
        self.submitted = False

    def __call__(self, command):
        if command[0] == "sbatch":
            if self.refuses:
                raise SchedulerError(self.refuses)
            self.submitted = True
            return self.printed
        if command[0] == "scancel":
            self.cancelled.append(command[1])
            return ""
        self.looks -= self.submitted
        other = "JOBID|\n11|RUNNING|c1|1:00|doctor|None\n"  # another, earlier job
        if not self.submitted or self.looks < 0:
            if self.submitted and self.output is not None:
                self.path.write_text(self.output)
            return other
        return f"{other}12|PENDING||1:00|doctor|Resources\n"


def params(tmp_path, **changes):
    return {
        "name": "doctor", "root": str(tmp_path), "scheduler": "slurm", "bin_dir": None, "script": "/x/job.sh",
        "output": str(tmp_path / "out"), "options": {"time": "00:05:00"}, "shorten": False, "timeout": 60,
        "listening": None, **changes,
    }


@pytest.mark.parametrize("output, answer, said", [
    ('{"host": "c1"}\n', {"host": "c1"}, ""),
    ('Welcome to c1\n{"host": "c1"}\n', {"host": "c1"}, ""),
    ("sh: python3: not found\n", None, "job 12 ended without a result: sh: python3: not found"),
    ("[1]\n", None, "job 12 ended without a result: [1]"),
    ("", None, "job 12 ended without a result: it printed nothing"),
    (None, None, "job 12 ended without a result: it printed nothing"),
])
def test_answer(output, answer, said, tmp_path):
    slept = []

    result = run_job(params(tmp_path), FakeSlurm(tmp_path / "out", output), slept.append)

    assert result == {"changed": False, "answer": answer, "said": said, "reached": None}
    assert sum(slept) < 70


def test_answer_that_the_file_system_shows_late(tmp_path):
    naps = iter(range(100))

    def sleep(_seconds):
        if next(naps) == 20:
            (tmp_path / "out").write_text('{"host": "c1"}\n')

    assert run_job(params(tmp_path), FakeSlurm(tmp_path / "out", None), sleep)["answer"] == {"host": "c1"}


def test_wait_goes_on_in_the_next_slice(tmp_path):
    slurm, told, resume = FakeSlurm(tmp_path / "out", None, looks=3), [], {}
    while True:
        try:
            result = run_job(params(tmp_path, slice=1e-9, resume=resume), slurm, lambda _seconds: time.sleep(0.01))
            break
        except Waiting as waiting:
            told.append(str(waiting))
            resume = {**waiting.resume, "waited": 1.0}
            if len(told) == 5:
                (tmp_path / "out").write_text('{"host": "c1"}\n')

    assert result["answer"] == {"host": "c1"}
    assert told[0] == "doctor: job 12 is PENDING (Resources), 60 s are allowed"
    assert told[4] == f"job 12 has ended, and {tmp_path}/out is not complete yet"


def test_job_is_found_whatever_sbatch_prints(tmp_path):
    slurm = FakeSlurm(tmp_path / "out", '{"host": "c1"}', printed="Welcome!\n13\n")

    assert run_job(params(tmp_path), slurm, lambda _seconds: None)["answer"] == {"host": "c1"}
    slurm = FakeSlurm(tmp_path / "out", "", looks=1000, printed="")
    run_job(params(tmp_path, timeout=0), slurm, lambda _seconds: None)
    assert slurm.cancelled == ["12"]


@pytest.mark.parametrize("printed, said", [
    ("12\n", ""),
    ("Hi\n", "sbatch printed no job id: 'Hi', and the queue cannot be read: x"),
])
def test_queue_that_cannot_be_asked_after_a_submission(printed, said, tmp_path):
    slurm = FakeSlurm(tmp_path / "out", '{"host": "c1"}', printed=printed)
    asked = []

    def run(command):
        asked.append(command[0])
        if asked == ["squeue", "sbatch", "squeue"]:
            raise SchedulerError("x")
        return slurm(command)

    assert run_job(params(tmp_path), run, lambda _seconds: None)["said"] == said


def test_option_of_the_login_alone_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_QOS", "long")

    said = run_job(params(tmp_path), FakeSlurm(tmp_path / "out", "{}"), lambda _seconds: None)["said"]

    assert said.startswith("server_job_options: qos: not set, but your login shell sets SBATCH_QOS='long'")


def test_job_that_does_not_start_is_cancelled(tmp_path):
    slurm = FakeSlurm(tmp_path / "out", "", looks=1000)

    result = run_job(params(tmp_path, timeout=0), slurm, lambda _seconds: None)

    assert result["said"] == "job 12 was PENDING (Resources) after 0 s, and was cancelled"
    assert slurm.cancelled == ["12"]


@pytest.mark.parametrize("options, refuses, said", [
    ({}, "sbatch: error: invalid partition\nsecond line", "sbatch: error: invalid partition second line"),
    ({"time": 300}, "", 'time: 300 is how YAML reads an unquoted time; quote it: "72:00:00"'),
])
def test_refusal_is_said(options, refuses, said, tmp_path):
    slurm = FakeSlurm(tmp_path / "out", "", refuses=refuses)

    assert run_job(params(tmp_path, options=options), slurm)["said"] == said


@pytest.mark.parametrize("says, reached", [
    ("127.0.0.1 {port}", True), ("127.0.0.1 {closed}", False), ("127.0.0.1 99999", False), ("127.0.0.1", None),
    (None, None),
])
def test_connects_to_where_the_job_listens(says, reached, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # no process listens there, and none can take the port
        ports = {"port": server.getsockname()[1], "closed": reserved.getsockname()[1]}
        if says:
            (tmp_path / "door").write_text(says.format(**ports))

        result = run_job(
            params(tmp_path, listening=str(tmp_path / "door")), FakeSlurm(tmp_path / "out", "{}"), lambda _seconds: None
        )

    assert result == {"changed": False, "answer": {}, "said": "", "reached": reached}
