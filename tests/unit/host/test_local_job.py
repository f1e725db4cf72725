# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scheduler for one machine, with real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hpc_db_host
import pytest
from hpc_db_host import processes

PYTHON = os.environ.get("HPC_DB_OLD_PYTHON", sys.executable)
SCRIPT = """
trap 'echo told to stop; exit 0' TERM
echo "started in $PWD, SLURM_JOB_ID=$SLURM_JOB_ID"
umask
while :; do sleep 0.05; done
"""


class Instance:
    """An instance directory with the supervisor in it, as the role installs it."""

    def __init__(self, root):
        self.root = root
        for folder in ("host", "run", "log"):
            (root / folder).mkdir()
        shutil.copytree(
            Path(hpc_db_host.__file__).parent, root / "host" / "hpc_db_host",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        self.script = root / "host" / "job's script.sh"
        self.script.write_text(SCRIPT)
        self.log = root / "log" / "job.log"
        self.record = root / "run" / "local_job.json"

    def call(self, *arguments, check=True):
        return subprocess.run(
            [PYTHON, "-m", "hpc_db_host.local_job", *arguments], cwd=self.root / "host", capture_output=True,
            text=True, check=check, timeout=20, env={**os.environ, "SLURM_JOB_ID": "99"},
        )

    def submit(self, name="hpc-db", check=True):
        return self.call("submit", "--name", name, "--script", self.script, "--output", self.log, check=check)

    def queue(self):
        return self.call("queue").stdout.strip()


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def instance(tmp_path):
    instance = Instance(tmp_path)
    yield instance
    running = instance.queue().partition("|")[0]
    if running:
        os.killpg(int(running), signal.SIGKILL)


@pytest.fixture
def stranger():
    """A process that does not belong to the instance."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_job_outlives_the_connection_that_started_it(instance):
    # The caller ends with its whole session, as when a connection drops.
    caller = subprocess.Popen(
        ["bash", "-c", '"$@"; sleep 60', "bash", PYTHON, "-m", "hpc_db_host.local_job", "submit",
         "--name", "hpc-db", "--script", instance.script, "--output", instance.log],
        cwd=instance.root / "host", start_new_session=True, stdout=subprocess.PIPE,
    )
    job_id = caller.stdout.readline().decode().strip()
    os.killpg(caller.pid, signal.SIGHUP)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    # No process holds the pipe: otherwise ssh would wait for the job's end.
    assert caller.stdout.read() == b""
    caller.stdout.close()

    time.sleep(0.3)

    assert instance.queue() == f"{job_id}|RUNNING|{os.uname().nodename}|UNLIMITED|hpc-db|None"
    assert os.getsid(int(job_id)) == int(job_id)
    assert os.readlink(f"/proc/{job_id}/fd/0") == "/dev/null"


def test_output_is_appended_privately_and_the_allocation_forgotten(instance):
    instance.log.write_text("of the last job\n")
    instance.submit()
    eventually(lambda: "0077" in instance.log.read_text())

    assert instance.log.read_text().splitlines() == [
        "of the last job", f"started in {instance.root / 'host'}, SLURM_JOB_ID=", "0077",
    ]
    assert instance.record.stat().st_mode & 0o777 == 0o600


def test_cancel_stops_the_job_and_only_then_it_leaves_the_queue(instance):
    job_id = instance.submit().stdout.strip()
    eventually(lambda: "0077" in instance.log.read_text())

    instance.call("cancel", job_id)
    eventually(lambda: instance.queue() == "")

    assert instance.log.read_text().endswith("told to stop\n")


def test_queue_is_empty_before_the_first_job(instance):
    assert instance.queue() == ""
    instance.call("cancel", "1")


def test_processes_that_run_are_told_with_their_start(instance, stranger):
    started = processes.start_time(stranger.pid)

    told = instance.call("processes", str(stranger.pid), "999999999", "x").stdout

    assert told == f"{stranger.pid}|{started}|RUNNING||{os.uname().nodename}|process|\n"
    assert instance.call("processes").stdout == ""


def test_second_job_of_an_instance_is_refused(instance):
    job_id = instance.submit().stdout.strip()

    refused = instance.submit("another", check=False)

    assert refused.returncode == 1
    assert refused.stderr == f"job {job_id} (hpc-db) of this instance is already running\n"
    assert instance.queue().startswith(job_id)


def test_job_that_ends_at_once_is_not_in_the_queue(instance):
    instance.script.write_text("exit 3\n")
    instance.submit()
    eventually(lambda: instance.queue() == "")

    instance.script.write_text(SCRIPT)
    job_id = instance.submit().stdout.strip()  # a new one may start
    assert instance.queue().startswith(f"{job_id}|RUNNING|")


@pytest.mark.parametrize("change", [
    {"started": "1"}, {"started": None}, {"host": "another boot pid:[1]"},
])
def test_reused_pid_is_neither_believed_nor_killed(change, instance, stranger):
    record = {
        "id": str(stranger.pid), "name": "hpc-db", "started": processes.start_time(stranger.pid),
        "host": processes.this_host(), "since": time.time(),
    }
    instance.record.write_text(json.dumps(record))
    assert instance.queue() != ""  # the record is otherwise right

    instance.record.write_text(json.dumps({**record, **change}))

    assert instance.queue() == ""
    instance.call("cancel", str(stranger.pid))
    time.sleep(0.2)
    assert stranger.poll() is None


def test_only_the_recorded_job_is_cancelled(instance, stranger):
    instance.submit()

    instance.call("cancel", str(stranger.pid))
    time.sleep(0.2)

    assert stranger.poll() is None
    assert instance.queue() != ""


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_half_a_record_is_none(content, instance):
    instance.record.write_text(content)

    assert instance.queue() == ""


def test_folder_that_is_missing_is_told_in_one_line(instance):
    instance.log.parent.rmdir()

    refused = instance.submit(check=False)

    assert refused.returncode == 1
    assert refused.stderr == f"[Errno 2] No such file or directory: '{instance.log}'\n"
    assert instance.queue() == ""
