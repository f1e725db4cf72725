# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What users set for their own use of a scheduler's commands hides no job from the modules and the hosting program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from target import CLUSTER, ROOT, Target

# Each by itself hides a job that runs in the partition work, prints something else, or declines what is asked for.
SLURM = {
    "SQUEUE_PARTITION": "debug", "SQUEUE_STATES": "PREEMPTED", "SQUEUE_NAMES": "other", "SQUEUE_USERS": "root",
    "SQUEUE_FORMAT": "%i", "SQUEUE_ACCOUNT": "other", "SINFO_PARTITION": "debug", "SINFO_FORMAT": "%N",
    "SCANCEL_INTERACTIVE": "true", "SCANCEL_PARTITION": "debug", "SCANCEL_STATE": "SUSPENDED", "SLURM_EXIT_ERROR": "0",
}
SLEEP = "--partition=work --time=10 --wrap='sleep 600'"
LOOK = """
import json, sys
from hpc_db_host import scheduler
settings, job, ask = json.loads(sys.argv[1])
queue = scheduler.Queue(settings, job)
answer = {"ended": [scheduler.job_has_ended(settings["scheduler"], "", each) for each in ask]}
if settings["successor"]:
    answer["follows"] = [queue.ensure_successor() for _look in range(3)]
    queue.cancel_successors()
print(json.dumps(answer))
"""


class Site:
    """A mini cluster, and what alice sees of it."""

    def __init__(self, state: Path, scheduler: str) -> None:
        self.state, self.scheduler = state, scheduler
        self.login = Target([], ["ssh", "-F", f"{state}/ssh_config", "login"], {})

    def host_program(self, job: str, ask: list[str], successor: list[str], environment: str = "") -> dict:
        """Let the hosting program of a job look around, in such an environment."""
        settings = {"scheduler": self.scheduler, "job_name": "hpc_db", "successor": successor}
        (self.state / "home/alice/look.py").write_text(LOOK)
        asked = json.dumps([settings, job, ask])
        return json.loads(self.login.run(f"{environment} PYTHONPATH=/srv/host python3 look.py '{asked}'"))

    def module(self, name: str, **parameters: object) -> dict:
        """Run a module of the collection on the login node."""
        words = {"name": "hpc_db", "root": "/home/alice/hpc_db", "scheduler": self.scheduler, **parameters}
        call = ["ansible", "--inventory", str(ROOT / "molecule/default/inventory"), "hpc_db",
                "--module-name", f"mala.hpc_db.{name}", "--args", json.dumps(words)]
        chosen = {"HPC_DB_CLUSTER": str(self.state), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
        environment = {**self.login.environment, **chosen}
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r"=> (\{.*\})", done.stdout, re.DOTALL)
        assert found, done.stdout + done.stderr
        return json.loads(found[1])

    def present(self, **options: object) -> dict:
        """Have the hosting job in the queue, held back so that it never begins."""
        script = self.state / "home/alice/job.sh"
        script.write_text("#!/bin/sh\nexec sleep 600\n")
        script.chmod(0o755)
        paths = {"script": "/home/alice/job.sh", "output": "/home/alice/job.log"}
        return self.module("hosting_job", state="present", options=options, **paths)


def variables(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.2)


def site(scheduler: str, *options: str) -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("the mini cluster needs root")
    state = Path(f"/tmp/hpc-db-defaults-{scheduler}-{os.getpid()}")
    up = [str(CLUSTER), "up", "--state", str(state), "--nodes=1", f"--scheduler={scheduler}", *options]
    subprocess.run([*up, f"--mount={ROOT / 'roles/server/files'}:/srv/host"], check=True)
    yield Site(state, scheduler)
    subprocess.run([str(CLUSTER), "down", "--state", str(state)], check=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Site]:
    yield from site("slurm", "--slurm=MessageTimeout=2")


@pytest.fixture(scope="module")
def grid_engine() -> Iterator[Site]:
    yield from site("gridengine")


def test_variables_of_slurm_reach_no_command_of_the_hosting_program(slurm: Site) -> None:
    submit = f"sbatch --parsable --job-name=hpc_db {SLEEP}"
    running = slurm.login.run(submit)
    ended = slurm.login.run("sbatch --parsable --partition=work --wrap=true")
    state = "squeue --noheader --states=all --format=%T --jobs="
    wait(lambda: slurm.login.run(state + running) == "RUNNING")
    wait(lambda: slurm.login.run(state + ended) == "COMPLETED")
    successor = ["sbatch", "--parsable", "--job-name=hpc_db", "--partition=work", "--begin=now+1hour", "--wrap=true"]

    said = slurm.host_program(running, [running, ended, "4711"], successor, variables(SLURM))
    left = slurm.login.run("squeue --noheader --me --format=%i")
    slurm.login.run("scancel --me")

    assert said["ended"] == [False, True, True]
    assert len(set(said["follows"])) == 1
    assert left == running


def test_job_has_ended_once_all_of_it_has_and_slurm_says_so(slurm: Site) -> None:
    """Not one that is queued again, not an array with a task that runs, and nothing while Slurm does not answer."""
    task = "--array=1-2 --wrap='[ $SLURM_ARRAY_TASK_ID = 1 ] || sleep 600'"
    array = slurm.login.run(f"sbatch --parsable --partition=work {task}")
    again = slurm.login.run(f"sbatch --parsable --requeue {SLEEP}")
    states = f"squeue --noheader --states=all --array --format=%T --jobs={array} | sort | xargs"
    wait(lambda: slurm.login.run(states) == "COMPLETED RUNNING")
    wait(lambda: slurm.login.run(f"squeue --noheader --format=%T --jobs={again}") == "RUNNING")
    slurm.login.run(f"scontrol requeue {again}")
    asked = [array, f"{array}_1", f"{array}_2", again]
    before = slurm.host_program(array, asked, [])["ended"]

    def on_controller(script: str) -> None:
        command = [str(CLUSTER), "exec", "ctl", "--state", str(slurm.state), "--", "sh", "-c", script]
        subprocess.run(command, check=True, timeout=60)

    on_controller("kill -STOP $(pgrep -x slurmctld)")
    mute = slurm.host_program(array, [f"{array}_1"], [], "SLURM_EXIT_ERROR=0")["ended"]
    on_controller("kill -CONT $(pgrep -x slurmctld)")

    assert (before, mute) == ([False, True, False, False], [False])
    slurm.login.run("scancel --me")


def test_variables_of_slurm_reach_no_module(slurm: Site) -> None:
    (slurm.state / "home/alice/.bashrc").write_text(f"export {variables(SLURM)}\n")
    first = slurm.present(partition="work", time="10", hold=True)
    second = slurm.present(partition="work", time="10", hold=True)
    nodes = slurm.module("hosting_job_info", nodes=True)
    stopped = slurm.module("hosting_job", state="absent")
    (slurm.state / "home/alice/.bashrc").unlink()

    assert (first["changed"], second["changed"], stopped["changed"]) == (True, False, True)
    assert nodes["job"]["id"] == second["job"]["id"] == first["job"]["id"]
    assert nodes["idle_nodes"] in ([], ["c1"])
    wait(lambda: slurm.login.run("squeue --noheader --me") == "")


def test_variable_of_sbatch_is_refused_with_its_setting(slurm: Site) -> None:
    (slurm.state / "home/alice/.bashrc").write_text("export SBATCH_PARTITION=debug\n")
    refused = slurm.present(time="00:01:00", hold=True)
    taken = slurm.present(time="00:01:00", partition="work", hold=True)
    partition = slurm.login.run("squeue --noheader --me --format=%P")
    slurm.module("hosting_job", state="absent")
    (slurm.state / "home/alice/.bashrc").unlink()

    assert refused["msg"].startswith("server_job_options: partition: not set, but your login shell sets SBATCH_PARTI")
    assert (taken["changed"], partition) == (True, "work")


def test_defaults_of_qstat_hide_no_job(grid_engine: Site) -> None:
    own = grid_engine.state / "home/alice/.sge_qstat"
    own.write_text("-s z\n-u root -ext\n")
    job = grid_engine.present(q="all.q", h=True)["job"]["id"]
    again = grid_engine.present(q="all.q", h=True)
    successor = ["qsub", "-terse", "-N", "hpc_db", "-h", "-o", "/dev/null", "-b", "y", "true"]
    said = grid_engine.host_program(job, [job, "4711"], successor)
    stopped = grid_engine.module("hosting_job", state="absent")
    own.unlink()

    assert (again["changed"], again["job"]["id"], stopped["changed"]) == (False, job, True)
    assert said["ended"] == [False, True]
    assert len(set(said["follows"])) == 1
    assert grid_engine.login.run("qstat") == ""


def test_defaults_of_qstat_that_cannot_be_overridden_are_refused(grid_engine: Site) -> None:
    own = grid_engine.state / "home/alice/.sge_qstat"
    own.write_text("-q nothing\n")
    refused = grid_engine.module("hosting_job_info")
    own.unlink()

    assert refused["msg"] == "/home/alice/.sge_qstat: the option -q changes what every qstat shows; remove it there"
