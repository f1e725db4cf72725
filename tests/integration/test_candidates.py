# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Candidates of workers' jobs with a real PostgreSQL: one of them serves, and the server moves when its job ends.

The scheduler is a stand-in; test_placement.py has the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hpc_db_host.candidate import FOLLOWS
from hpc_db_host.files import read_json, write_state
from hpc_db_host.layout import Layout
from test_handover import postmasters
from test_hosting_program import (  # noqa: F401 - fixtures  # pylint: disable=unused-import
    AS_OWNER,
    Instance,
    bindir,
    data,
    eventually,
    folder,
    instance,
    owner,
    wheels,
)

# A job is a file with its remaining minutes, as long as it runs.
SQUEUE = """#!/bin/sh
all="$*"
case "$all" in
*forecast*) exit;;
*--jobs=*) [ -e {folder}/jobs/${{all##*--jobs=}} ] && echo 'job|RUNNING|' || echo 'job|COMPLETED|'; exit;;
esac
echo 'JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON'
cd {folder}/jobs
for id in *; do [ ! -s $id ] || echo "$id|RUNNING|c1|$(cat $id):00/20:00|train|None"; done
"""


# Runs the supervisor, and at its end writes the times at which it named a file of the instance to the kernel.
COUNTED = """
import json, os, runpy, sys, time
root, out = sys.argv[1:3]
del sys.argv[1:3]
times = []

def note(path):
    if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(root):
        times.append(time.monotonic())

def counted(call):
    def count(path, *arguments, **options):
        note(path)
        return call(path, *arguments, **options)
    return count

events = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.link", "os.mkdir", "os.utime", "os.chmod"}
sys.addaudithook(lambda event, arguments: note(arguments[0]) if event in events else None)
os.stat, os.lstat = counted(os.stat), counted(os.lstat)  # which have no event
try:
    runpy.run_module("hpc_db_host", run_name="__main__", alter_sys=True)
finally:
    with open(out, "w") as stream:
        json.dump(times, stream)
"""


class Workers:
    """An instance whose server runs in the workers' jobs. The test is the scheduler."""

    def __init__(self, made: Instance) -> None:
        self.instance, self.layout = made, Layout(str(made.root))
        self.folder = made.root / "slurm"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        with owner():
            (self.folder / "jobs").mkdir(parents=True)
            for name, script in (("squeue", SQUEUE), ("sbatch", "exit 1"), ("scancel", "#!/bin/sh\n")):
                (self.folder / name).write_text(script.format(folder=self.folder))
                (self.folder / name).chmod(0o755)
        self.configure()
        self.want(True)
        with owner():
            (made.root / "log/job.log").touch()

    def configure(self, **changes: object) -> None:
        self.instance.configure(**{
            "placement": "workers", "workers": 5, "bin_dir": str(self.folder), "job_name": "hpc_db", "stop_notice": 60,
            "workers_shared_buffers": "16MB", **changes,
        })

    def want(self, wanted: bool) -> None:
        with owner():
            write_state(self.layout.wanted, {"wanted": wanted})

    def start(self, job: str, minutes: int = 15) -> subprocess.Popen[bytes]:
        """Start a worker's job."""
        with owner():
            (self.folder / "jobs" / job).write_text(str(minutes))
        self.running[job] = self.instance.start("candidate", job=job)
        return self.running[job]

    def end(self, job: str, number: int = signal.SIGTERM, gone: bool = True) -> int:
        """Send a signal to a candidate, whose job then ends; return its exit code."""
        process = self.running.pop(job)
        process.send_signal(number)
        code = process.wait(30)
        if gone:
            (self.folder / "jobs" / job).unlink()
        return code

    def server(self) -> str:
        """Return the job that serves; empty if none does."""
        said = self.instance.said("endpoint")
        return str(said.get("job", "")) if self.instance.said("state").get("state") == "serving" else ""

    def wait_for(self, *jobs: str, seconds: float = 20) -> str:
        eventually(lambda: self.server() in jobs, seconds)
        return self.server()

    def active(self) -> set[str]:
        """Return the jobs that wait actively, and can serve."""
        found = (read_json(self.layout.place(number)) or {} for number in range(1, 5))
        return {each["job"] for each in found if each.get("unfit") == ""}


@pytest.fixture
def workers(instance: Instance) -> Iterator[Workers]:  # noqa: F811
    yield Workers(instance)
    print(instance.log())  # for a test that failed


def test_first_job_starts_the_server_and_the_last_one_stops_it(workers: Workers) -> None:
    target = workers.instance
    began = time.monotonic()
    workers.start("11")
    workers.wait_for("11")
    assert time.monotonic() - began < 5
    target.psql("CREATE TABLE t AS SELECT 1 AS n")
    assert target.psql("SHOW shared_buffers") == "16MB"
    assert target.said("endpoint")["placement"] == "workers"
    others = [workers.start(job) for job in ("12", "13")]
    eventually(lambda: workers.active() == {"12", "13"})

    began = time.monotonic()
    assert workers.end("11") == 0
    second = workers.wait_for("12", "13")
    assert time.monotonic() - began < 5
    assert target.psql("SELECT n FROM t") == "1"
    assert all(each.poll() is None for each in others)
    assert len(postmasters(target.root)) == 1

    last = next(iter({"12", "13"} - {second}))
    assert workers.end(last) == 0
    assert workers.end(second) == 0
    assert (target.said("endpoint"), target.said("state")["state"]) == ({}, "ended")
    assert target.said("state")["follows"] == FOLLOWS
    assert not postmasters(target.root) and target.cluster_state() == "shut down"
    workers.start("14")
    workers.wait_for("14")
    assert target.psql("SELECT n FROM t") == "1"


def test_server_moves_before_the_end_of_its_job_to_one_that_ends_later(workers: Workers) -> None:
    target = workers.instance
    workers.configure(stop_notice=90)
    first = workers.start("11", minutes=1)
    workers.wait_for("11")
    time.sleep(3)
    assert workers.server() == "11"  # there is no other one

    workers.start("12")

    workers.wait_for("12")
    assert first.poll() is None
    assert "job 11 ends soon" in target.log()
    assert workers.end("12") == 0
    workers.wait_for("11")  # it serves again, since there is no other one


def test_killed_supervisor_is_replaced(workers: Workers) -> None:
    target = workers.instance
    workers.start("11")
    workers.wait_for("11")
    target.psql("CREATE TABLE t AS SELECT 1 AS n")
    workers.start("12")
    eventually(lambda: workers.active() == {"12"})

    assert workers.end("11", signal.SIGKILL, gone=False) == -signal.SIGKILL

    workers.wait_for("12")
    assert target.psql("SELECT n FROM t") == "1"
    assert len(postmasters(target.root)) == 1


def test_stopped_server_starts_only_when_it_is_wanted_again(workers: Workers) -> None:
    target = workers.instance
    jobs = [workers.start(job) for job in ("11", "12")]
    workers.wait_for("11", "12")

    workers.want(False)

    eventually(lambda: target.said("state")["state"] == "ended")
    assert target.said("state")["reason"] == "stopped by the playbook stop.yml"
    assert target.said("state")["follows"] is None  # workers give up
    jobs.append(workers.start("13"))
    time.sleep(5)
    assert not target.is_published() and all(job.poll() is None for job in jobs)
    workers.want(True)
    workers.wait_for("11", "12", "13")


def test_few_candidates_wait_actively_and_the_others_replace_them(workers: Workers) -> None:
    jobs = [str(number) for number in range(11, 18)]
    for job in jobs:
        workers.start(job)
    server = workers.wait_for(*jobs)
    eventually(lambda: len(workers.active()) == 3)
    time.sleep(2)
    active = workers.active()
    assert len(active) == 3 and server not in active

    for job in active:
        assert workers.end(job) == 0
    assert workers.server() == server
    eventually(lambda: len(workers.active() - active) == 3)

    assert workers.end(server) == 0
    workers.wait_for(*workers.active())


def test_one_candidate_in_each_job_which_leaves_when_it_is_told(workers: Workers) -> None:
    first = workers.start("11")
    workers.wait_for("11")

    assert workers.start("11").wait(20) == 0
    time.sleep(3)
    assert workers.server() == "11" and first.poll() is None

    assert workers.instance.start("leave", job="11").wait(30) == 0
    assert first.poll() == 0
    assert (workers.instance.said("state")["state"], workers.active()) == ("ended", set())
    assert workers.instance.start("leave", job="11").wait(30) == 0  # there is none


def test_server_that_cannot_start_is_not_tried_for_ever(workers: Workers) -> None:
    target = workers.instance
    with owner():
        (target.root / "conf/postgresql.conf").write_text("")
    jobs = [str(number) for number in range(11, 16)]
    processes = [workers.start(job) for job in jobs]

    eventually(lambda: len(target.said("state").get("failures", [])) == 3, 60)

    time.sleep(5)
    assert len(target.said("state")["failures"]) == 3
    assert target.said("state")["state"] == "failed"
    assert target.said("state")["reason"].startswith("postgres ended with exit code 2 while starting: ")
    assert target.said("state")["follows"] is None  # workers give up
    assert all(each.poll() is None for each in processes)
    events = [json.loads(line) for line in (target.root / "log/events.jsonl").read_text().splitlines()]
    assert len({each["job"] for each in events}) == 3


def test_server_moves_from_its_own_job_to_a_workers_and_back(workers: Workers) -> None:
    target = workers.instance
    successor = {"options": {}, "memory": "1G", "script": "/job.sh", "output": "/job.log"}
    workers.configure(placement="job")
    with owner():
        (workers.folder / "jobs" / "5").write_text("15")
    server = target.start("serve", job="5")
    workers.wait_for("5")
    candidate = workers.start("11")
    assert candidate.wait(20) == 0  # it has nothing to do

    workers.configure()
    workers.start("12")
    workers.wait_for("12", seconds=30)
    assert server.wait(20) == 0

    workers.configure(placement="job", chain=True, successor=successor, handover_after="1%")
    with owner():
        (workers.folder / "jobs" / "6").write_text("15")
    again = target.start("serve", "--lease-patience", "60", job="6")
    workers.wait_for("6", seconds=30)
    assert workers.running["12"].wait(20) == 0
    assert again.poll() is None and len(postmasters(target.root)) == 1


def test_candidates_of_a_thousand_jobs_make_few_requests_to_the_file_system(workers: Workers) -> None:
    """A sleeping candidate of a study with a hundredth of the workers makes a hundred times as many requests."""
    workers.configure(lease_ttl=90, workers=30)
    target = workers.instance
    counts = {job: target.root / f"counts.{job}" for job in ("11", "12", "13", "14", "15")}
    jobs = {}
    for job, path in counts.items():
        with owner():
            (workers.folder / "jobs" / job).write_text("15")
        jobs[job] = subprocess.Popen(
            [sys.executable, "-c", COUNTED, target.root, path, "candidate", "--root", target.root],
            cwd=target.root / "host", env={"PATH": os.defpath, "SLURM_JOB_ID": job}, **AS_OWNER,
        )
        target.processes.append(jobs[job])
    server = workers.wait_for(*jobs)
    eventually(lambda: len(workers.active()) == 3)
    active = workers.active()
    time.sleep(5)
    began = time.monotonic()
    time.sleep(60)
    ended = time.monotonic()
    assert (workers.server(), workers.active()) == (server, active)

    rates = {}
    for job, process in sorted(jobs.items(), key=lambda item: item[0] == server):
        process.terminate()
        process.wait(30)
        times = json.loads(counts[job].read_text())
        rates[job] = sum(began <= each <= ended for each in times) / (ended - began)
    (sleeping,) = (rate for job, rate in rates.items() if job not in active | {server})
    all_active = sum(rates[job] for job in active)
    every = rates[server] + all_active + 996 * sleeping * 30 / 1000
    print(f"requests per second of 1000 jobs: {every:.1f} (server {rates[server]:.1f}, active {all_active:.1f})")
    assert 0 < sleeping and every < 10


def test_job_that_ends_last_takes_over(workers: Workers) -> None:
    workers.start("11")
    workers.wait_for("11")
    for job, minutes in (("12", 5), ("13", 14), ("14", 9)):
        workers.start(job, minutes)
        eventually(lambda: job in workers.active())  # noqa: B023

    for server, follower in (("11", "13"), ("13", "14"), ("14", "12")):
        assert workers.end(server) == 0
        workers.wait_for(follower)
