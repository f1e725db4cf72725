# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""hosting_job and hosting_job_info against a stateful fake Slurm."""

import json
import os
import shutil
import threading

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._connection import safety
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SchedulerError, find_idle_nodes
from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Slice, Waiting
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json, write_state
from ansible_collections.mala.hpc_db.plugins.module_utils.host.lease import Lease
from ansible_collections.mala.hpc_db.plugins.modules import hosting_job
from ansible_collections.mala.hpc_db.plugins.modules.hosting_job import ensure_job
from ansible_collections.mala.hpc_db.plugins.modules.hosting_job_info import look

HEAD = "JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON\n"


class FakeSlurm:
    """Answers like sbatch, squeue, sinfo and scancel. A cancelled job stays for ``lingers`` calls of squeue."""

    last_id = 0
    deaf = False  # job scripts ignore signals
    printed = "{}"  # sbatch's output; ``{}`` is the id
    fails = ""  # sbatch's error after it has submitted the job
    refusal = ""  # answer to --test-only
    nodes = ""

    def __init__(self, *jobs, lingers=1):
        self.jobs = []
        self.lingers = lingers
        self.calls = []
        for name, state in jobs:
            self.add(name, state)

    def __call__(self, command):
        self.calls.append(command)
        return getattr(self, command[0])([argument.lstrip("-") for argument in command[1:]])

    def sbatch(self, arguments):
        flags = dict(argument.partition("=")[::2] for argument in arguments)
        if flags.get("partition", "defq") != "defq":
            raise SchedulerError("sbatch: error: Invalid partition name specified")
        if "test-only" in flags:
            if self.refusal:
                raise SchedulerError(self.refusal)
            return ""
        job_id = self.add(flags["job-name"], "PENDING")
        if self.fails:
            raise SchedulerError(self.fails)
        return self.printed.format(job_id) + "\n"

    def add(self, name, state):
        self.last_id += 1
        self.jobs.append({"id": str(self.last_id), "name": name, "state": state})
        return str(self.last_id)

    def squeue(self, arguments):
        flags = dict(argument.partition("=")[::2] for argument in arguments)
        self.lingers -= any(job["state"] == "COMPLETING" for job in self.jobs)
        if self.lingers < 0:
            self.jobs = [job for job in self.jobs if job["state"] != "COMPLETING"]
        return HEAD + "".join(
            f"{job['id']}|{job['state']}|c1|1:00|{job['name']}|None\n"
            for job in self.jobs
            if job["name"].lower() == flags.get("name", job["name"]).lower()  # like the real one
        )

    def sinfo(self, arguments):
        return self.nodes if "Node" in arguments else "defq|1-00:00:00\n"

    def scancel(self, arguments):
        for job in [job for job in self.jobs if job["id"] == arguments[-1]]:
            if self.deaf and "batch" in arguments:
                continue
            if job["state"] == "PENDING":
                self.jobs.remove(job)
            job["state"] = "COMPLETING"
        return ""

    @property
    def queue(self):
        return [(job["name"], job["state"]) for job in self.jobs]

    def called(self, program):
        return [call for call in self.calls if call[0] == program]


RUNNING, PENDING, COMPLETING = (("hpc-db", state) for state in ("RUNNING", "PENDING", "COMPLETING"))
OTHER = ("HPC-DB", "RUNNING")


def params(state="present", root="/nowhere", **changes):
    return {
        "name": "hpc-db", "state": state, "root": str(root), "scheduler": "slurm", "script": "/x/job.sh",
        "output": "/x/job.log", "options": {"dependency": "singleton"}, "timeout": 5, "nodes": False, "history": False,
        "placement": "job", **changes,
    }


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("state, queue, changed, after", [
    ("present", [], True, [PENDING]),
    ("present", [RUNNING], False, [RUNNING]),
    ("present", [PENDING], False, [PENDING]),
    ("present", [RUNNING, PENDING], False, [RUNNING, PENDING]),
    ("present", [("hpc-db", "TELEPORTING")], False, [("hpc-db", "TELEPORTING")]),
    ("present", [OTHER], True, [OTHER, PENDING]),
    ("absent", [RUNNING], True, []),
    ("absent", [PENDING], True, []),
    ("absent", [RUNNING, PENDING], True, []),
    ("absent", [COMPLETING], False, []),
    ("absent", [], False, []),
    ("absent", [OTHER], False, [OTHER]),
])
def test_changes_only_what_differs(state, queue, changed, after, check_mode):
    slurm = FakeSlurm(*queue)

    result = ensure_job(params(state), slurm, check_mode)

    assert result["changed"] is changed
    assert (result["diff"]["before"] != result["diff"]["after"]) is (changed or COMPLETING in queue)
    assert slurm.queue == (queue if check_mode else after)
    if not check_mode:
        assert (result["job"] or {}).get("name") == ("hpc-db" if state == "present" else None)


def test_job_gets_what_a_server_needs():
    said = ensure_job(params(options={"time": "1:00"}, memory="4G", notice=120, chain=True), FakeSlurm(), True)["diff"]

    assert said["after"]["jobs"][0]["options"] == {
        "mem": "4G", "dependency": "singleton", "signal": "B:USR1@120", "no-requeue": True, "time": "1:00",
    }


@pytest.mark.parametrize("check_mode", [False, True])
def test_option_of_the_login_alone_is_refused_before_anything_is_submitted(check_mode, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "hpc")
    slurm = FakeSlurm()

    with pytest.raises(ValueError, match="^server_job_options: account: not set, but your login shell sets SBATCH_AC"):
        ensure_job(params(), slurm, check_mode)
    assert (slurm.queue, slurm.called("sbatch")) == ([], [])

    ensure_job(params(options={"account": "hpc"}), slurm, check_mode)
    assert len(slurm.called("sbatch")) == 1


@pytest.mark.parametrize("printed, warned", [
    ("Welcome!\n{}\n--> 12 % of the allocation are left", False), ("{};mini", False), ("Submitted batch job {}", False),
    ("{}\n12", False), ("Your job is queued", True), ("", True),
])
def test_job_is_found_whatever_sbatch_prints(printed, warned):
    slurm = FakeSlurm(("hpc-db", "COMPLETING"), OTHER, lingers=99)
    slurm.printed = printed

    result = ensure_job(params(), slurm, check_mode=False)

    assert (result["changed"], result["job"]["id"]) == (True, "3")
    assert bool(result["warnings"]) is warned
    for warning in result["warnings"]:
        assert warning.startswith("sbatch printed no job id: ")
        assert warning.endswith("; job 3, found by its name hpc-db, is in the queue")


def test_sbatch_that_fails_after_it_has_submitted_is_told_with_the_job():
    slurm = FakeSlurm()
    slurm.fails = "Socket timed out on send/recv operation"

    with pytest.raises(SchedulerError, match=r"Socket timed out .*; but job 1 \(hpc-db\) is in the queue$"):
        ensure_job(params(), slurm, check_mode=False)

    slurm.fails = ""
    assert ensure_job(params(), slurm, check_mode=False)["changed"] is False


def test_submission_of_which_nothing_is_known_is_an_error():
    slurm = FakeSlurm()
    slurm.printed, slurm.add = "Welcome!", lambda name, state: ""

    with pytest.raises(SchedulerError, match=r"printed no job id: 'Welcome!', and no new job of the name hpc-db is"):
        ensure_job(params(), slurm, check_mode=False)


UNAVAILABLE = "sbatch: error: allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize("options, nodes, told", [
    ({}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|down*|4000|4\nbig|up|b1|idle|9000|4\n", "c1 drained, c2 down*"),
    ({"partition": "defq", "mem": "3G"}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|idle|2000|4\n", "c1 drained"),
    ({"partition": "defq"}, "Welcome!\ndefq*|up|c1|maint|4000|4\n", "c1 maint"),
    ({"partition": "defq"}, "defq*|down|c1|idle|4000|4\n", "partition defq down"),
    ({"nodes": 2}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|idle|4000|4\n", "c1 drained"),
    ({"ntasks": 8}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|idle|4000|4\n", "c1 drained"),
    ({"constraint": "a100"}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|idle|4000|4\n", "c1 drained"),
    ({"nodelist": "c1"}, "defq*|up|c1|idle^|4000|4\ndefq*|up|c2|idle|4000|4\n", "c1 idle^"),
    # No node is that large, whatever its state.
    ({"partition": "defq", "mem": "5G"}, "defq*|up|c1|drained|4000|4\n", None),
    ({"partition": "defq", "mem": 5000}, "defq*|up|c1|drained|4000|4\n", None),
    ({"partition": "defq", "mem-per-cpu": "2G", "cpus-per-task": 2}, "defq*|up|c1|drained|4000|4\n", None),
    ({"partition": "defq", "cpus-per-task": 8}, "defq*|up|c1|drained|4000|4\n", None),
    ({"partition": "defq", "nodes": "2-4"}, "defq*|up|c1|drained|4000|4\n", None),
    ({"partition": "defq", "ntasks": 8}, "defq*|up|c1|drained|4000|4\n", None),
    # All nodes are available, or enough of them, so the reason is another one.
    ({"constraint": False}, "defq*|up|c1|drained|4000|4\ndefq*|up|c2|idle|4000|4\n", None),
    ({"partition": "defq"}, "defq*|up|c1|idle|4000|4\ndefq*|up|c2|mixed|4000|4\n", None),
    ({"partition": "defq"}, "", None),
])
def test_refusal_that_is_true_only_now_is_said(options, nodes, told):
    slurm = FakeSlurm()
    slurm.refusal, slurm.nodes = UNAVAILABLE, nodes

    if told:
        (said,) = ensure_job(params(options=options), slurm, check_mode=True)["warnings"]
        assert said.startswith(f"server_job_options: sbatch says: {UNAVAILABLE}; this is temporary")
        assert said.endswith(f": {told}") and "\n" not in said
    else:
        with pytest.raises(SchedulerError, match="^server_job_options: sbatch says: .* is not available$"):
            ensure_job(params(options=options), slurm, check_mode=True)


@pytest.mark.parametrize("refusal", [
    "allocation failure: Invalid account or account/partition combination specified",
    "allocation failure: Requested partition configuration not available now",
    "sbatch: error: Invalid generic resource (gres) specification", "Unable to contact slurm controller",
])
def test_refusal_that_is_always_true_stays(refusal):
    slurm = FakeSlurm()
    slurm.refusal, slurm.nodes = refusal, "defq*|up|c1|drained|4000|4\n"

    with pytest.raises(SchedulerError, match="^server_job_options: sbatch says: "):
        ensure_job(params(), slurm, check_mode=True)


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("queue, left_behind, changed", [
    ([], True, True), ([], False, False), ([RUNNING], True, True), ([RUNNING], False, True), ([COMPLETING], True, True),
])
def test_endpoint_that_nobody_took_back_is_withdrawn(queue, left_behind, changed, check_mode):
    asked = []

    def endpoint(verb):
        asked.append(verb)
        return left_behind

    assert ensure_job(params("absent"), FakeSlurm(*queue), check_mode, endpoint)["changed"] is changed
    assert asked == ["look" if check_mode else "withdraw"]


def test_endpoint_of_a_job_on_a_dead_node_is_withdrawn_although_the_job_stays():
    asked = []

    def endpoint(verb):
        asked.append(verb)
        return True

    with pytest.raises(SchedulerError, match="hpc-db has not ended after 0 s: 1 COMPLETING on c1"):
        ensure_job(params("absent", timeout=0), FakeSlurm(COMPLETING, lingers=99), False, endpoint)
    assert asked == ["withdraw"]


def test_wait_for_the_end_goes_on_in_the_next_slice():
    slurm = FakeSlurm(RUNNING, lingers=3)

    with pytest.raises(Waiting) as first:
        ensure_job(params("absent", slice=1e-9, timeout=60), slurm, check_mode=False)
    resume = {**first.value.resume, "waited": 5.0}
    second = ensure_job(params("absent", slice=60, resume=resume, timeout=60), slurm, check_mode=False)

    assert (second["changed"], second["job"]) == (True, None)
    assert second["diff"] == {"before": {"jobs": [{"id": "1", "state": "RUNNING"}]}, "after": {"jobs": []}}
    assert str(first.value) == "hpc-db was told to end, 60 s are allowed: 1 RUNNING on c1"
    assert len(slurm.called("scancel")) == 1
    with pytest.raises(SchedulerError, match="has not ended after 60 s"):
        slow = FakeSlurm(RUNNING, lingers=99)
        ensure_job(params("absent", slice=60, timeout=60, resume={"waited": 60.0}), slow, check_mode=False)


def test_submits_behind_a_job_on_its_way_out():
    slurm = FakeSlurm(COMPLETING, lingers=5)

    result = ensure_job(params(), slurm, check_mode=False)

    assert result["changed"] is True
    assert result["job"]["id"] == "2"
    assert slurm.queue == [COMPLETING, PENDING]
    assert "--dependency=singleton" in slurm.called("sbatch")[0]


def test_running_job_is_the_one_returned_not_its_successor():
    assert ensure_job(params(), FakeSlurm(PENDING, RUNNING), check_mode=False)["job"]["id"] == "2"


def test_successor_is_cancelled_before_it_could_start():
    slurm = FakeSlurm(RUNNING, PENDING)

    ensure_job(params("absent"), slurm, check_mode=False)

    assert [call[1:] for call in slurm.called("scancel")] == [["2"], ["--batch", "--signal=TERM", "1"]]


class FakeGridEngine:
    """Answers like qstat and qdel; ``obeys`` makes the job end once its stop file exists."""

    def __init__(self, root, obeys, state="r"):
        self.path, self.obeys, self.state, self.calls = root / "run" / "stop.7", obeys, state, []

    def __call__(self, command):
        self.calls.append(command[0])
        if command[0] == "qdel" and not self.state:
            raise SchedulerError('denied: job "7" does not exist')
        if command[0] == "qdel" or self.obeys and self.path.exists():
            self.state = ""
        about = f"<JB_job_number>7</JB_job_number><JB_name>hpc-db</JB_name><state>{self.state}</state>"
        return f"<?xml version='1.0'?><job_info>{f'<job_list>{about}</job_list>' if self.state else ''}</job_info>"


@pytest.mark.parametrize("obeys, state, killed", [(True, "r", 0), (False, "r", 1), (True, "qw", 1)])
def test_job_that_only_a_kill_could_end_is_asked_by_a_file(obeys, state, killed, tmp_path, monkeypatch):
    monkeypatch.setattr(hosting_job, "GENTLE_SECONDS", 30 if obeys else 0.3)
    (tmp_path / "run").mkdir()
    grid_engine = FakeGridEngine(tmp_path, obeys, state)

    result = ensure_job(params("absent", tmp_path, scheduler="gridengine", options={}), grid_engine, False)

    assert (result["changed"], result["job"]) == (True, None)
    assert grid_engine.calls.count("qdel") == killed
    assert not grid_engine.path.exists()


def test_job_that_has_ended_meanwhile_needs_no_cancelling(tmp_path):
    grid_engine = FakeGridEngine(tmp_path, False, "")
    waiting = {"id": "7", "name": "hpc-db", "state": "PENDING", "node": "", "placement": "job"}

    told = params("absent", tmp_path, scheduler="gridengine")

    assert hosting_job._clear_queue(told, grid_engine, [waiting], Slice(told)) == []


def test_job_that_is_not_ended_by_its_script_is_ended_by_slurm(monkeypatch):
    slurm = FakeSlurm(RUNNING)
    slurm.deaf = True
    monkeypatch.setattr(hosting_job, "GENTLE_SECONDS", 0.5)

    ensure_job(params("absent"), slurm, check_mode=False)

    assert [call[1:] for call in slurm.called("scancel")] == [["--batch", "--signal=TERM", "1"], ["1"]]


def test_absent_waits_for_the_real_end():
    slurm = FakeSlurm(RUNNING, lingers=3)

    assert ensure_job(params("absent"), slurm, check_mode=False)["job"] is None
    assert len(slurm.called("squeue")) == 5
    assert len(slurm.called("scancel")) == 1


def test_absent_does_not_wait_for_ever():
    with pytest.raises(SchedulerError, match="hpc-db has not ended after 0 s: 1 RUNNING"):
        ensure_job(params("absent", timeout=0), FakeSlurm(RUNNING, lingers=99), check_mode=False)


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("changes, words", [
    ({"options": {"partition": "gone"}}, "Invalid partition name"),
    ({"options": {"partition": "defq", "time": "24:00:01"}}, r"above the limit \(defq 1-00:00:00\)"),
    ({"options": {"time": 259200}}, "quote it"),
    ({"options": {"wrap": "rm"}}, "hosting_job"),
    ({"name": "a b"}, "name: 'a b'"),
    ({"name": "-x"}, "name: '-x'"),
    ({"name": "a,b"}, "name: 'a,b'"),
])
def test_refusals_leave_nothing_behind(changes, words, check_mode):
    slurm = FakeSlurm()

    with pytest.raises((SchedulerError, ValueError), match=words):
        ensure_job(params(**changes), slurm, check_mode)

    assert slurm.queue == []


def test_check_mode_asks_sbatch_only_if_there_is_something_to_submit():
    slurm = FakeSlurm(RUNNING)

    ensure_job(params(options={"partition": "gone"}), slurm, check_mode=True)

    assert slurm.called("sbatch") == []


@pytest.mark.parametrize("state, changed", [("present", True), ("absent", False)])
def test_local_scheduler_that_is_not_installed_yet_has_no_job(state, changed, tmp_path):
    def no_call(command):
        raise AssertionError(command)

    result = ensure_job(params(state, tmp_path, scheduler="local"), no_call, check_mode=True)

    assert (result["changed"], result["job"]) == (changed, None)


def test_info_of_nothing(tmp_path):
    found = look(params(root=tmp_path / "none"), FakeSlurm())

    assert found == {
        "changed": False, "job": None, "endpoint": None, "state": None, "history": None, "idle_nodes": None,
        "disk": None, "log_tail": None, "outage": "", "may_start": False,
        "placement": "job",
    }


def test_info_knows_the_disk(tmp_path):
    disk = look(params(root=tmp_path), FakeSlurm())["disk"]

    assert 0 < disk["free"] < disk["total"] == shutil.disk_usage(tmp_path).total


@pytest.mark.parametrize("text, expected", [
    ('{"job": "1", "host": "c1", "tls": false, "state": ""}', {"job": "1", "host": "c1", "tls": False, "state": ""}),
    ('{"job": "1', None), ("", None), ("[1]", None),
    (b"\xff\xfe", None),
])
def test_info_takes_half_a_file_for_none(text, expected, tmp_path):
    (tmp_path / "run").mkdir()
    for file in ("endpoint", "state"):
        (tmp_path / "run" / f"{file}.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    found = look(params(root=tmp_path), FakeSlurm(RUNNING))

    assert found["state"] == expected
    assert found["endpoint"] == (expected and {**expected, "connect_params": safety("c1", expected["tls"])})
    assert found["job"]["state"] == "RUNNING"


@pytest.mark.parametrize("queue, published, serving", [
    ([RUNNING], "1", "1"), ([RUNNING], "7", None), ([], "1", None), ([PENDING], "1", None),
    ([(RUNNING[0], "COMPLETING"), RUNNING], "1", None),
    ([RUNNING, RUNNING], "2", "2"),  # the predecessor may not have ended yet
])
def test_info_believes_the_endpoint_of_a_job_that_runs(queue, published, serving, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "endpoint.json").write_text(json.dumps({"host": "c1", "port": 1, "job": published}))

    found = look(params(root=tmp_path), FakeSlurm(*queue))

    assert (found["endpoint"] or {}).get("job") == serving
    assert serving is None or found["job"]["id"] == serving


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("queue, published, serving", [
    ([RUNNING], "1", "1"), ([RUNNING, RUNNING], "2", "2"), ([RUNNING], "7", None), ([], "1", None),
    ([PENDING], "1", None),
])
def test_job_is_returned_with_the_endpoint_of_a_server_that_is_live(queue, published, serving, check_mode, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "endpoint.json").write_text(json.dumps({"host": "c1", "port": 1, "job": published}))

    found = ensure_job(params(root=tmp_path), FakeSlurm(*queue), check_mode)

    assert (found["endpoint"] or {}).get("job") == serving
    assert serving is None or found["job"]["id"] == serving


@pytest.mark.parametrize("queue, state, shown", [
    ([RUNNING], "serving", False), ([RUNNING], "failed", True), ([], "serving", True),
])
def test_info_shows_the_newest_log_in_trouble(queue, state, shown, tmp_path):
    for folder in ("run", "log"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "state.json").write_text(json.dumps({"state": state}))
    lines = b"".join(b"%d\n" % number for number in range(30))
    (tmp_path / "log" / "job.log").write_bytes(b"x" * 20000 + b"\xff\n" + lines)
    (tmp_path / "log" / "old.log").write_text("old\n")
    os.utime(tmp_path / "log" / "old.log", (1, 1))

    log_tail = look(params(root=tmp_path), FakeSlurm(*queue))["log_tail"]

    assert log_tail == ([str(number) for number in range(10, 30)] if shown else None)


@pytest.mark.parametrize("jobs, idle", [
    ("", ["c1", "c2", "c3"]),
    ("5|0|PENDING|N/A||train|\n", ["c1", "c2", "c3"]),
    ("5|0|RUNNING|7|c[1-2]|train|\n6|0|RUNNING|7|c1|hpc_db|\n", ["c3"]),
    ("Welcome to Slurm\n5|0|COMPLETING|7|c3|train|\n", ["c1", "c2"]),
])
def test_nodes_without_a_job_of_ours(jobs, idle):
    def run(command):
        if command[0] == "scontrol":
            assert command[1:3] == ["show", "hostnames"]
            names = {"c[1-2]": "c1\nc2\n"}
            return "".join(names.get(each, f"{each}\n") for each in command[3].split(","))
        return f"JOBID|\n{jobs}" if command[0] == "squeue" else "idle|c1\nidle|c1\nmix|c2\ndown*|c3\n"

    assert find_idle_nodes({"scheduler": "slurm"}, run) == idle


@pytest.mark.parametrize("printed", ["", "\n", "Welcome to Slurm\n"])
def test_nodes_are_not_idle_where_those_of_our_jobs_are_not_told(printed):
    answers = {"squeue": "JOBID|\n5|0|RUNNING|7|c1|train|\n", "sinfo": "idle|c1\n", "scontrol": printed}

    with pytest.raises(ValueError, match="^no nodes of c1 in what was printed: '"):
        find_idle_nodes({"scheduler": "slurm"}, lambda command: answers[command[0]])


def test_a_machine_without_a_scheduler_has_no_idle_nodes():
    assert find_idle_nodes({"scheduler": "local"}, None) == []


WORKERS = {"placement": "workers"}


@pytest.fixture
def in_worker_s_job(tmp_path):
    """A server in job 1, which is a worker's; the returned function ends it."""
    (tmp_path / "run").mkdir()
    holder = {"host": "c1", "pid": os.getpid(), "job": "1", "kind": "slurm", **WORKERS}
    lease = Lease(str(tmp_path / "run"), holder, lambda _holder: False)
    assert lease.try_acquire()
    write_state(str(tmp_path / "run/endpoint.json"), {"job": "1", "host": "c1", **WORKERS})
    write_state(str(tmp_path / "run/wanted.json"), {"wanted": True})

    def end():
        write_state(str(tmp_path / "run/endpoint.json"), {})
        lease.release()

    return end


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("queue, after", [([], []), ([PENDING], []), ([RUNNING, PENDING], [RUNNING])])
def test_no_server_job_is_left_in_the_queue_if_the_server_runs_in_the_workers_jobs(queue, after, check_mode, tmp_path):
    (tmp_path / "run").mkdir()
    slurm = FakeSlurm(*queue, lingers=0)

    result = ensure_job(params(root=tmp_path, **WORKERS), slurm, check_mode)

    slurm.squeue([])
    assert result["changed"] and not slurm.called("sbatch")
    assert slurm.queue == (queue if check_mode else after)
    assert (tmp_path / "run/wanted.json").exists() != check_mode
    if not check_mode:
        assert read_json(str(tmp_path / "run/wanted.json")) == {"wanted": True}
        assert read_json(str(tmp_path / "run/state.json"))["follows"]["told"] == "the next worker's job starts it"
        assert not ensure_job(params(root=tmp_path, **WORKERS), slurm, check_mode)["changed"]


def test_server_that_has_failed_in_the_workers_jobs_may_be_tried_again(tmp_path):
    (tmp_path / "run").mkdir()
    ensure_job(params(root=tmp_path, **WORKERS), FakeSlurm(), False)
    write_state(str(tmp_path / "run/state.json"), {"state": "failed", "failures": ["1", "2", "3"]})

    assert ensure_job(params(root=tmp_path, **WORKERS), FakeSlurm(), False)["changed"]

    assert read_json(str(tmp_path / "run/state.json"))["failures"] == []


@pytest.mark.usefixtures("in_worker_s_job")
def test_worker_s_job_that_serves_is_shown(tmp_path):
    slurm = FakeSlurm(("train", "RUNNING"), ("train", "RUNNING"))

    shown = ensure_job(params(root=tmp_path, **WORKERS), slurm, False)
    found = look(params(root=tmp_path), slurm)

    assert not shown["changed"] and found["may_start"]
    assert shown["job"] == found["job"]
    assert (found["job"]["id"], found["job"]["name"], found["job"]["placement"]) == ("1", "train", "workers")
    assert found["endpoint"]["job"] == "1"


@pytest.mark.usefixtures("in_worker_s_job")
def test_server_in_a_worker_s_job_does_not_replace_a_server_job(tmp_path):
    slurm = FakeSlurm(("train", "RUNNING"))

    result = ensure_job(params(root=tmp_path), slurm, False)

    assert result["changed"] and slurm.queue == [("train", "RUNNING"), PENDING]
    assert result["submitted"] == "2"


def test_stop_of_a_server_in_a_worker_s_job_leaves_that_job_alone(in_worker_s_job, tmp_path):
    slurm = FakeSlurm(("train", "RUNNING"), PENDING, lingers=0)
    timer = threading.Timer(0.5, in_worker_s_job)
    timer.start()

    result = ensure_job(params("absent", tmp_path, **WORKERS), slurm, False)

    timer.join()
    assert result["changed"] and result["job"] is None
    assert slurm.queue == [("train", "RUNNING")]
    assert read_json(str(tmp_path / "run/wanted.json")) == {"wanted": False}
    assert not look(params(root=tmp_path), slurm)["may_start"]
    assert not ensure_job(params("absent", tmp_path, **WORKERS), slurm, False)["changed"]


@pytest.mark.usefixtures("in_worker_s_job")
def test_server_in_a_worker_s_job_that_does_not_stop_is_named(tmp_path):
    with pytest.raises(SchedulerError, match="hpc-db has not ended after 1 s: 1 RUNNING on c1"):
        ensure_job(params("absent", tmp_path, timeout=1, **WORKERS), FakeSlurm(("train", "RUNNING")), False)
