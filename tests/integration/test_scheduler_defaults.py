# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Users' own defaults for a scheduler's commands hide no job from the modules and the supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from target import CLUSTER, ROOT, Target

# Each of these alone hides a job that runs in the partition work, changes the output, or declines the request.
SLURM = {
    "SQUEUE_PARTITION": "debug", "SQUEUE_STATES": "PREEMPTED", "SQUEUE_NAMES": "other", "SQUEUE_USERS": "root",
    "SQUEUE_FORMAT": "%i", "SQUEUE_ACCOUNT": "other", "SINFO_PARTITION": "debug", "SINFO_FORMAT": "%N",
    "SCANCEL_INTERACTIVE": "true", "SCANCEL_PARTITION": "debug", "SCANCEL_STATE": "SUSPENDED", "SLURM_EXIT_ERROR": "0",
}
SLEEP = "--partition=work --time=10 --wrap='sleep 600'"
LOOK = """
import json, sys
from hpc_db_host import scheduler
from hpc_db_host.settings import complete
settings, job, ask = json.loads(sys.argv[1])
settings = complete(settings)
queue = scheduler.Queue(settings, job)
bin_dir = settings["bin_dir"]
answer = {"ended": [scheduler.job_has_ended(settings["scheduler"], bin_dir, each) for each in ask]}
if settings["successor"]:
    answer["follows"] = [queue.ensure_successor() for _look in range(3)]
    queue.cancel_successors()
print(json.dumps(answer))
"""


# Text that a site's own wrapper prints before and after an answer.
WRAPPER = r"""#!/bin/sh
printf '\033[1;33mWelcome to | Mini3\033[0m\n'
{program} "$@" > /tmp/answer.$$; code=$?
{show} /tmp/answer.$$; rm /tmp/answer.$$
[ $code = 0 ] && echo '--> 12 % of the allocation mini3 are left'
exit $code
"""
SHOWN = {"as it is": "cat", "coloured": "sed 's/.*/\033[32m&\033[0m/'", "of a federation": "sed 's/$/;mini3/'",
         "without an id": "sed 's/[0-9]//g'"}


class Site:
    """A test cluster, and alice's view of it."""

    def __init__(self, state: Path, scheduler: str) -> None:
        self.state, self.scheduler = state, scheduler
        self.paths: dict[str, str] = {}
        self.login = Target([], ["ssh", "-F", f"{state}/ssh_config", "login"], {})

    def host_program(self, job: str, ask: list[str], successor: list[str], environment: str = "") -> dict:
        """Call the supervisor's scheduler functions for a job, in a given environment."""
        settings = {
            "scheduler": self.scheduler, "job_name": "hpc_db", "successor": successor, "bin_dir": "", **self.paths
        }
        (self.state / "home/alice/look.py").write_text(LOOK)
        asked = json.dumps([settings, job, ask])
        self.login.run("mkdir -p package; ln -sfn /srv/host package/hpc_db_host")
        return json.loads(self.login.run(f"{environment} PYTHONPATH=package python3 look.py '{asked}'"))

    def module(self, name: str, _check: bool = False, **parameters: object) -> dict:
        """Run a module of the collection on the login node."""
        words = {"name": "hpc_db", "root": "/home/alice/hpc_db", "scheduler": self.scheduler, **parameters}
        call = ["ansible", "--inventory", str(ROOT / "molecule/default/inventory"), "hpc_db",
                "--module-name", f"mala.hpc_db.{name}", "--args", json.dumps(words),
                *["--check"] * _check]
        chosen = {"HPC_DB_CLUSTER": str(self.state), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
        environment = {**self.login.environment, **chosen}
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r"=> (\{.*\})", done.stdout, re.DOTALL)
        assert found, done.stdout + done.stderr
        told = re.findall(r"^\[WARNING\]: ((?:server_job_options:|sbatch|qsub) .*)$", done.stderr, re.MULTILINE)
        return {**json.loads(found[1]), "told": told}

    @contextlib.contextmanager
    def wrapped(self, **shown: str) -> Iterator[str]:
        """Wrap programs as a site would, each with a way to show the answer; yield their folder."""
        folder = self.state / "home/alice/bin"
        folder.mkdir()
        for name in ("scancel", "sinfo", "squeue", "sbatch", "qsub", "qstat", "qdel"):
            program = self.login.run(f"command -v {name} || true")
            if program:
                show = SHOWN[shown.get(name, "as it is")]
                (folder / name).write_text(WRAPPER.format(program=program, show=show))
                (folder / name).chmod(0o755)
        try:
            yield "/home/alice/bin"
        finally:
            shutil.rmtree(folder)

    def present(self, **options: object) -> dict:
        """Ensure that the server job is in the queue, held so that it never starts."""
        script = self.state / "home/alice/job.sh"
        script.write_text("#!/bin/sh\nexec sleep 600\n")
        script.chmod(0o755)
        paths = {"script": "/home/alice/job.sh", "output": "/home/alice/job.log", **self.paths}
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
        pytest.skip("the test cluster needs root")
    state = Path(f"/tmp/hpc-db-defaults-{scheduler}-{os.getpid()}")
    up = [str(CLUSTER), "up", "--state", str(state), "--nodes=1", f"--scheduler={scheduler}", *options]
    subprocess.run([*up, f"--mount={ROOT / 'plugins/module_utils/host'}:/srv/host"], check=True)
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
    """A requeued job has not ended, nor an array with a running task, nor any job while Slurm does not answer."""
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


@pytest.mark.parametrize("sbatch", SHOWN)
def test_job_is_found_whatever_a_site_prints_around_its_id(sbatch: str, slurm: Site) -> None:
    ended = slurm.login.run("sbatch --parsable --partition=work --wrap=true")
    wait(lambda: slurm.login.run(f"squeue --noheader --states=all --format=%T --jobs={ended}") == "COMPLETED")
    with slurm.wrapped(sbatch=sbatch, squeue="coloured" if sbatch == "coloured" else "as it is") as folder:
        slurm.paths = {"bin_dir": folder}
        first = slurm.present(partition="work", time="10", hold=True)
        second = slurm.present(partition="work", time="10", hold=True)
        asked = slurm.host_program(first["job"]["id"], [first["job"]["id"], ended, "4711"], [])
        queue = slurm.login.run("squeue --noheader --me --format='%i %j' --sort=i").splitlines()
        stopped = slurm.module("hosting_job", state="absent", bin_dir=folder)
    slurm.paths = {}
    slurm.login.run("scancel --me")

    assert (first["changed"], second["changed"], stopped["changed"]) == (True, False, True), first
    assert queue[0] == f"{first['job']['id']} hpc_db" == f"{second['job']['id']} hpc_db"
    assert asked["ended"] == [False, True, True]
    said = f"; job {first['job']['id']}, found by its name hpc_db, is in the queue"
    assert [each.endswith(said) for each in first["told"]] == [True] * (sbatch == "without an id")


def test_successor_is_found_by_its_name(slurm: Site) -> None:
    running = slurm.login.run(f"sbatch --parsable --job-name=hpc_db {SLEEP}")
    successor = ["sbatch", "--parsable", "--job-name=hpc_db", "--partition=work", "--begin=now+1hour", "--wrap=true"]
    with slurm.wrapped(sbatch="without an id") as folder:
        slurm.paths = {"bin_dir": folder}
        said = slurm.host_program(running, [], successor)
    slurm.paths = {}
    slurm.login.run("scancel --me")

    assert said["follows"] == [f"job {int(running) + 1} follows"] * 3


def test_job_that_only_waits_for_nodes_is_not_refused(slurm: Site) -> None:
    def on_controller(*words: str) -> None:
        command = [str(CLUSTER), "exec", "ctl", "--state", str(slurm.state), "--", "scontrol", *words]
        subprocess.run(command, check=True, timeout=60)

    def checked(**options: object) -> dict:
        return slurm.module("hosting_job", _check=True, script="/x", output="/x", options={"time": "10", **options})

    on_controller("update", "nodename=c1", "state=drain", "reason=maintenance")
    try:
        told = checked(partition="work")
        too_large = checked(partition="work", mem="9G")
        nowhere = checked(partition="gone")
        submitted = slurm.present(partition="work", time="10")
    finally:
        on_controller("update", "nodename=c1", "state=resume")
        slurm.module("hosting_job", state="absent")

    (said,) = told["told"]
    assert said.startswith("server_job_options: sbatch says: ")
    assert said.endswith("the job is queued and waits: c1 drained")
    assert (submitted["changed"], submitted["job"]["state"]) == (True, "PENDING")
    assert too_large["msg"].startswith("server_job_options: sbatch says: ")
    assert "nvalid partition" in nowhere["msg"]


def test_endpoint_that_a_dead_server_left_behind_is_withdrawn(slurm: Site) -> None:
    """Only once no job of that name is left."""
    home = slurm.state / "home/alice"
    slurm.login.run("mkdir -p hpc_db/host hpc_db/run; ln -s /srv/host hpc_db/host/hpc_db_host")
    settings = dict.fromkeys(["instance", "job_name", "cluster"], "hpc_db")
    (home / "hpc_db/host/settings.json").write_text(json.dumps(settings))
    (home / ".pg_service.conf").write_text("[hpc_db]\nhost=c1\n[other]\nhost=x\n")
    slurm.login.run("""echo '{"host": "c1"}' > hpc_db/run/endpoint.json""")

    job = slurm.present(partition="work", time="10")
    wait(lambda: slurm.login.run("squeue --noheader --me --format=%T") == "RUNNING")
    checked = slurm.module("hosting_job", _check=True, state="absent")
    before = slurm.login.run("cat hpc_db/run/endpoint.json")
    stopped = [slurm.module("hosting_job", state="absent") for _once in range(2)]

    assert job["changed"] and checked["changed"] and before == '{"host": "c1"}'
    assert [each["changed"] for each in stopped] == [True, False]
    assert slurm.login.run("cat hpc_db/run/endpoint.json").split() == ["{}"]
    assert slurm.login.run("cat .pg_service.conf") == "[other]\nhost=x"
    slurm.login.run("rm -r hpc_db .pg_service.conf")


@pytest.mark.parametrize("qsub", ["as it is", "coloured", "without an id"])
def test_job_of_grid_engine_is_found_whatever_a_site_prints(qsub: str, grid_engine: Site) -> None:
    with grid_engine.wrapped(qsub=qsub) as folder:
        grid_engine.paths = {"bin_dir": folder}
        first = grid_engine.present(q="all.q", h=True)
        second = grid_engine.present(q="all.q", h=True)
        job = first["job"]["id"]
        successor = ["qsub", "-terse", "-N", "hpc_db", "-h", "-o", "/dev/null", "-b", "y", "true"]
        said = grid_engine.host_program(job, [job, "4711"], successor)
        stopped = grid_engine.module("hosting_job", state="absent", bin_dir=folder)
    grid_engine.paths = {}

    assert (first["changed"], second["changed"], stopped["changed"]) == (True, False, True), first
    assert said == {"ended": [False, True], "follows": [f"job {int(job) + 1} follows"] * 3}
    assert len(first["told"]) == (qsub == "without an id")
    assert grid_engine.login.run("qstat") == ""


def test_queues_that_are_shut_for_now_are_no_refusal(grid_engine: Site) -> None:
    def on_controller(*words: str) -> None:
        command = [str(CLUSTER), "exec", "ctl", "--state", str(grid_engine.state), "--", *words]
        subprocess.run(command, check=True, timeout=60)

    def checked(**options: object) -> dict:
        return grid_engine.module("hosting_job", _check=True, script="/x", output="/x", options=options)

    on_controller("qmod", "-d", "*")
    try:
        shut = checked(q="all.q", l={"h_rt": "00:10:00"})
        never = checked(q="all.q", l={"h_rt": "99:00:00"})
    finally:
        on_controller("qmod", "-e", "*")

    assert shut["changed"], shut
    assert never["msg"].startswith("server_job_options: qsub says: ")


def test_defaults_of_qsub_with_which_no_job_is_hosted_are_refused(grid_engine: Site) -> None:
    own = grid_engine.state / "home/alice/.sge_request"
    own.write_text("-q all.q\n-sync y\n")
    refused = grid_engine.present(h=True)
    own.write_text("-q all.q -m n -sync n\n")
    taken = grid_engine.present(h=True)
    grid_engine.module("hosting_job", state="absent")
    own.unlink()

    assert refused["msg"].startswith("/home/alice/.sge_request: the option -sync changes every job that qsub submits")
    assert taken["changed"], taken
