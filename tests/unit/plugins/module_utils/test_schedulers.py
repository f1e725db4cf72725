# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Slurm adapter's commands, and the parsing of its answers; and the interface common to all adapters."""

import inspect
import math
import os
import time
from pathlib import Path

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.doc_fragments.scheduler import ModuleDocFragment
from ansible_collections.mala.hpc_db.plugins.module_utils import _scheduler
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SCHEDULERS, SchedulerError, make_run
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import Job, Scheduler
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.slurm import parse_time

slurm, local = SCHEDULERS["slurm"], SCHEDULERS["local"]


def test_submission_passes_every_option_as_one_argument():
    options = {
        "partition": "defq", "time": "72:00:00", "nodes": 1,
        "exclusive": True, "requeue": False, "account": None,
        "comment": "it's $(date); {x} --wrap=:",
    }

    assert slurm.submit_command("hpc-db", "/a b/job.sh", options, "/a b/100%j.log") == [
        "sbatch", "--parsable", "--job-name=hpc-db", "--output=/a b/100%%j.log", "--open-mode=append",
        "--comment=it's $(date); {x} --wrap=:", "--exclusive", "--nodes=1", "--partition=defq",
        "--time=72:00:00", "/a b/job.sh",
    ]


def test_check_neither_needs_a_script_nor_submits():
    command = slurm.check_command("hpc-db", {"partition": "defq"})

    assert command == ["sbatch", "--test-only", "--job-name=hpc-db", "--partition=defq", "--wrap=:"]


@pytest.mark.parametrize("text, job_id", [
    ("12\n", "12"),
    ("12;hemera\n", "12"),
    ("Welcome!\nYou have 3 hours left.\n12\n", "12"),
    ("Welcome!\n12\n--> 12 % of the allocation are left\n", "12"),
    ("Submitted batch job 12\n", "12"),
    ("Submitted batch job 12 on cluster hemera\n", "12"),
    ("", None),
    ("12 13", None),
    ("--> 12 % of the allocation are left\n", None),
])
def test_id_of_a_submission(text, job_id):
    assert slurm.parse_submit(text) == job_id


HEAD = "JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON\n"


def job(job_id, state, node="", left=None, reason="", limit=None):
    return {
        "id": job_id, "name": "hpc-db", "state": state, "node": node, "reason": reason, "time_left": left,
        "time_limit": limit,
    }


@pytest.mark.parametrize("line, expected", [
    ("3|RUNNING|c1|59:58/1:00:00|hpc-db|None", job("3", "RUNNING", "c1", 3598, limit=3600)),
    ("4|PENDING||3-00:00:00/3-00:00:00|hpc-db|Resources",
     job("4", "PENDING", "", 259200, reason="Resources", limit=259200)),
    ("5|COMPLETING|c1|UNLIMITED/UNLIMITED|hpc-db|None", job("5", "COMPLETING", "c1")),
    ("9|RUNNING|c1|UNLIMITED|hpc-db|None", job("9", "RUNNING", "c1")),  # the format that the supervisor queries
    ("6|CONFIGURING|c2|INVALID|hpc-db|None", job("6", "CONFIGURING", "c2")),
    ("7|Teleporting|c2|NOT_SET|hpc-db|None", job("7", "TELEPORTING", "c2")),
    ("8|PENDING||1:00|hpc-db|ReqNodeNotAvail, UnavailableNodes:c[1|2]",
     job("8", "PENDING", "", 60, reason="ReqNodeNotAvail, UnavailableNodes:c[1|2]")),
])
def test_queue_line(line, expected):
    assert slurm.parse_queue(f"Welcome!\n{HEAD}{line}\n--> 3 % are left\n") == [expected]
    assert local.parse_queue(line + "\n") == [expected]  # whichever version the supervisor has


@pytest.mark.parametrize("text", [
    "", "\n", "3|CANCELLED||1:00/1:00|hpc-db|None\n", "Maintenance on Monday | be prepared\n",
])
def test_queue_without_jobs(text):
    assert slurm.parse_queue(HEAD + text) == local.parse_queue(text) == []


@pytest.mark.parametrize("text", ["", "\n", "Welcome!\n", "3|RUNNING|c1|1:00/1:00|hpc-db|None\n"])
@pytest.mark.parametrize("parse", [slurm.parse_queue, slurm.parse_jobs])
def test_answer_without_a_head_is_no_list_of_jobs(parse, text):
    with pytest.raises(ValueError, match="^squeue: the output is not a list of jobs"):
        parse(text)


@pytest.mark.parametrize("line, expected", [
    ("12|0|RUNNING|1795392835|c1|train|", Job("12", "0", "RUNNING", 1795392835.0, "c1", "train")),
    ("12|1|PENDING|N/A||a|b|", Job("12", "1", "PENDING", None, "", "a|b")),
    ("12|0|SUSPENDED|1795392835|c[1-2]|train|", Job("12", "0", "SUSPENDED", 1795392835.0, "c[1-2]", "train")),
    ("12|0|Teleporting|1795392835|c1|train|", Job("12", "0", "TELEPORTING", 1795392835.0, "c1", "train")),
    ("4711|99887766|RUNNING||this-host|process|", Job("4711", "99887766", "RUNNING", None, "this-host", "process")),
    ("12|0|NODE_FAIL|1795392835|c1|train|", None),
    ("12|0|CANCELLED|1795392835|c1|train|", None),
    ("12|0|REVOKED|1795392835||train|", Job("12", "0", "REVOKED", 1795392835.0, "", "train")),
    ("Maintenance on Monday | be prepared", None),
    ("", None),
])
def test_jobs_that_have_not_ended(line, expected):
    assert slurm.parse_jobs(f"JOBID|RESTARTS|\n{line}\n") == ([expected] if expected else [])
    assert local.parse_jobs(line + "\n") == ([expected] if expected else [])


@pytest.mark.parametrize("text, seconds", [
    ("90", 5400), ("1:30", 90), ("72:00:00", 259200),
    ("3-0", 259200), ("1-2:30", 95400), ("1-02:03:04", 93784),
    ("UNLIMITED", math.inf), ("infinite", math.inf),
    ("", None), ("1h", None), ("-5", None), ("1:2:3:4", None), ("3-", None), ("²", None), ("n/a", None),
])
def test_times_as_slurm_writes_them(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("options", [
    {}, {"mem": "16G"}, {"mem": 16000}, {"mem": "0"}, {"mem": "16gb"}, {"mem-per-cpu": "512M"},
    {"time": "72:00:00"}, {"time": "90"}, {"time": "UNLIMITED"}, {"time": None},
    {"gres": "gpu:a100:1"}, {"wait-all-nodes": 1}, {"mail-user": "alice@example.org"}, {"exclusive": True},
])
def test_options_that_sbatch_understands(options):
    slurm.check_options(options)


@pytest.mark.parametrize("options, words", [
    ({"mem": "16 G"}, "mem: '16 G' is not an amount of memory"),
    ({"mem": "1.5G"}, "is not an amount of memory"),
    ({"mem-per-cpu": "lots"}, "mem-per-cpu: 'lots' is not an amount of memory"),
    ({"mem": True}, "is not an amount of memory"),
    ({"time": 259200}, 'time: 259200 is how YAML reads an unquoted time; quote it: "72:00:00"'),
    ({"time": "three days"}, "time: 'three days' is not a time"),
    ({"time": 1.5}, "is not a time"),
    ({"--mem": "1G"}, "'--mem' is not a long option"),
    ({"p": "defq"}, "'p' is not a long option"),
    ({"mem_per_cpu": "1G"}, "is not a long option"),
    ({"partition=defq --wrap": "x"}, "is not a long option"),
    ({1: "x"}, "is not a long option"),
    ({"job-name": "x"}, "job-name: hosting_job sets this itself"),
    ({"job-na": "x"}, "job-na: hosting_job sets this itself"),
    ({"wra": "x"}, "wra: hosting_job"),
    ({"test-only": True}, "hosting_job"),
    ({"parsable": True}, "hosting_job"),
    ({"array": "1-2"}, "hosting_job"),
    ({"wait": True}, "hosting_job"),
    ({"output": "x"}, "hosting_job"),
    ({"clusters": "other"}, "hosting_job"),
    ({"clusters": True}, "hosting_job"),
    ({"comment": "a\nb"}, "more than one line"),
    ({"comment": "a\0b"}, "more than one line"),
    ({"constraint": ["a", "b"]}, "not a single value"),
])
def test_options_that_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as refused:
        slurm.check_options(options)

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options, asked", [
    ({"partition": "defq", "time": "72:00:00"}, True),
    ({"partition": "defq"}, False),
    ({"time": "72:00:00"}, False),
    ({"partition": "defq", "time": "72:00:00", "qos": "long"}, False),
])
def test_limit_is_asked_for_only_where_it_decides(options, asked):
    assert bool(slurm.limit_command(options)) is asked


@pytest.mark.parametrize("limits, time, refused", [
    ("defq|1-00:00:00\n", "24:00:00", False),
    ("defq|1-00:00:00\n", "24:00:01", True),
    ("defq|infinite\n", "30-0", False),
    ("defq|infinite\n", "UNLIMITED", False),
    ("defq|n/a\n", "30-0", False),
    ("defq|1-00:00:00\n", "UNLIMITED", True),
    ("short|30:00\nlong|7-00:00:00\n", "72:00:00", False),
    ("short|30:00\nlong|2-00:00:00\n", "72:00:00", True),
    ("", "72:00:00", False),
    ("Welcome to | mini\ndefq|1-00:00:00\n--> 12 % are left\n", "72:00:00", True),
])
def test_time_above_the_limit_of_every_partition(limits, time, refused):
    options = {"partition": "defq", "time": time}
    if not refused:
        return slurm.check_limit(limits, options)
    with pytest.raises(ValueError, match=r"above the limit .(defq 1-|long 2-)"):
        slurm.check_limit(limits, options)


def methods(kind):
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_is_called_alike(name):
    base, own = methods(Scheduler), methods(type(SCHEDULERS[name]))
    required = {method for method, value in base.items() if "NotImplementedError" in value.__code__.co_names}

    assert required <= set(own) <= set(base)
    for method, value in own.items():
        assert inspect.signature(value) == inspect.signature(base[method])


def test_scheduler_is_entered_in_one_place():
    """Documentation and code list the same schedulers."""
    root = Path(__file__).parents[4]
    role = yaml.safe_load((root / "roles/server/meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    module = yaml.safe_load(ModuleDocFragment.DOCUMENTATION)
    names = list(SCHEDULERS)

    assert role["options"]["server_scheduler"]["choices"] == names
    assert module["options"]["scheduler"]["choices"] == names


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
def test_server_job_gets_what_its_options_do_not_set(scheduler, options, made):
    assert SCHEDULERS[scheduler].server_options(options, "hpc_db", "4G", 120, True) == made


def test_short_options():
    made = slurm.short_options({"partition": "defq", "time": "72:00:00", "nodelist": "c1", "mem": "16G"})

    assert {key: value for key, value in made.items() if value is not False} == {
        "partition": "defq", "time": "00:05:00", "mem": "512M",
    }
    assert local.short_options({"mem": "1G"}) == {"mem": "1G"}


def test_local_commands():
    call = ["python3", "-m", "hpc_db_host.local_job"]

    assert local.queue_command("hpc-db") == [*call, "queue"]
    assert local.ask_command("12") == local.cancel_command("12") == [*call, "cancel", "12"]
    assert local.submit_command("hpc-db", "/a b/job.sh", {"mem": "1G"}, "/a b/job.log") == [
        *call, "submit", "--name=hpc-db", "--script=/a b/job.sh", "--output=/a b/job.log",
    ]
    assert local.check_command("hpc-db", {}) is None


class Module:
    """The part of AnsibleModule that running a command needs."""

    def __init__(self, bin_dir=None):
        self.params = {"scheduler": "slurm", "root": "/nowhere", "bin_dir": bin_dir}


def test_run_returns_what_was_printed():
    assert make_run(Module("/bin"))(["echo", "$HOME"]) == "$HOME\n"


def test_run_gives_a_few_variables_that_are_known(monkeypatch):
    for name in ("SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SBATCH_ACCOUNT", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setenv("SLURM_CONF", "/s")

    said = make_run(Module())(["env"])

    assert "foreign" not in said
    assert "SLURM_CONF=/s\n" in said and f"PATH={os.environ['PATH']}\n" in said


@pytest.mark.parametrize("printed", [
    r"\033[1;32m12\033[0m;mini\r\n\033]0;title\007",
    r"\033(B\033[m\033[32m12\033(B\033[m\n", r"\033712\0338\a\n", r"12\033[m\017\033",  # as printed by tput
])
def test_colours_are_no_answer(printed):
    said = make_run(Module())(["printf", printed])

    assert said.strip() in ("12", "12;mini")


def test_run_is_where_later_jobs_are_submitted_from(tmp_path):
    module = Module()
    module.params["root"] = str(tmp_path / "hpc_db")
    assert make_run(module)(["pwd"]).strip() == str(tmp_path)

    (tmp_path / "hpc_db/host").mkdir(parents=True)
    assert make_run(module)(["pwd"]).strip() == str(tmp_path / "hpc_db/host")


def test_run_that_waits_for_an_answer_has_none():
    assert make_run(Module())(["cat"]) == ""


def test_run_gives_up_a_command_that_does_not_answer(monkeypatch):
    """Nor does it wait for children, which hold the pipes: a site's sbatch may be a script."""
    monkeypatch.setattr(_scheduler, "TIMEOUT", 0.2)
    began = time.monotonic()

    with pytest.raises(SchedulerError, match=r"^sh has not answered within 0.2 s$"):
        make_run(Module())(["sh", "-c", "sleep 30; :"])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("variables, options, words", [
    ({"SBATCH_ACCOUNT": "hpc"}, {}, "account: not set, but your login shell sets SBATCH_ACCOUNT='hpc', which is not "),
    ({"SBATCH_PARTITION": "debug"}, {"account": "hpc"}, "partition: not set, but "),
    ({"SBATCH_TIMELIMIT": "10"}, {}, "time: not set, but "),
    ({"SBATCH_CPU_FREQ_REQ": "high"}, {}, "cpu-freq: not set, but "),
    ({"SBATCH_MEM_PER_CPU": "1G"}, {}, "mem-per-cpu: not set, but "),
    ({"SBATCH_EXCLUSIVE": ""}, {}, "exclusive: not set, but "),
    ({"SBATCH_ACCOUNT": "a\nb"}, {}, r"SBATCH_ACCOUNT='a\nb'"),
    ({"SBATCH_CLUSTERS": "b"}, {}, "clusters: your login shell sets SBATCH_CLUSTERS='b', but "),
    ({"SLURM_CLUSTERS": "b"}, {}, "clusters: your login shell sets SLURM_CLUSTERS='b', but "),
    ({"SBATCH_CLUSTERS": "b", "SLURM_CLUSTERS": "b"}, {"clusters": False}, ""),
    ({"SBATCH_ACCOUNT": "hpc"}, {"account": "other"}, ""),
    ({"SBATCH_ACCOUNT": "hpc"}, {"account": False}, ""),
    ({"SBATCH_MEM_PER_CPU": "1G"}, {"mem": "1G"}, ""),
    ({"SBATCH_EXPORT": "NONE", "SBATCH_OUTPUT": "x", "SBATCH_DEBUG": "1", "SBATCH_MEM_BIND_LIST": "x"}, {}, ""),
    ({"SQUEUE_PARTITION": "debug", "SLURM_PARTITION": "debug"}, {}, ""),
])
def test_option_of_the_login_alone_is_refused_with_its_setting(variables, options, words):
    if not words:
        return slurm.check_environment(variables, options, "server_job_options")
    with pytest.raises(ValueError, match="^server_job_options: [a-z-]+: ") as refused:
        slurm.check_environment(variables, options, "server_job_options")
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("variables, options, flag", [
    ({"SBATCH_PARTITION": "debug"}, {"partition": "work"}, "partition"),
    ({"SBATCH_TIMELIMIT": "10"}, {"time": "04:00:00"}, "time"),
    ({"SBATCH_ARRAY_INX": "1-3"}, {}, "array"),
    ({"SBATCH_PARTITION": "work", "SBATCH_ACCOUNT": "hpc"}, {"partition": "work", "account": False}, None),
    ({"SBATCH_EXCLUSIVE": "", "SBATCH_CPUS_PER_TASK": "4"}, {"exclusive": True, "cpus-per-task": 4}, None),
    ({"SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "1", "SQUEUE_PARTITION": "debug"}, {}, None),
])
def test_what_sbatch_obeys_before_a_job_script_is_said(variables, options, flag):
    """The user submits the script, from an environment that the collection does not control."""
    said = slurm.overridden(variables, options, "workers_job_options")

    (name,) = variables if flag else [None]
    assert [each.partition(" in the job script has no effect")[0] for each in said] == (
        [f"workers_job_options: {flag}"] if flag else [])
    assert not flag or f"unset {name} before you submit it" in said[0]


@pytest.mark.parametrize("bin_dir, command, words", [
    ("/nowhere", ["sbatch"], "/nowhere/sbatch: No such file or directory; set server_bin_dir to the folder"),
    (None, ["sbatch-is-not-here"], "sbatch-is-not-here: No such file or directory; set server_bin_dir"),
    (None, ["sh", "-c", "echo one >&2; echo two >&2; exit 1"], "one; two"),
    (None, ["sh", "-c", "echo out; exit 1"], "out"),
    (None, ["false"], "false ended with 1"),
])
def test_run_fails_in_one_line(bin_dir, command, words):
    with pytest.raises(SchedulerError) as failed:
        make_run(Module(bin_dir))(command)

    assert str(failed.value).startswith(words)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("returncode, text, run, ended", [
    (0, "100|0|RUNNING|\n", "0", False),
    (0, "100|0|NODE_FAIL|\n", "0", True),
    (0, "100|1|PENDING|\n", "0", True),  # queued again after its node has failed
    (0, "100|1|PENDING|\n", "1", False),  # a job inherits the count of the job that has submitted it
    (0, "100|1|COMPLETING|\n", "0", False),
    (0, "100|1|RUNNING|\n", "0", True),
    (0, "100|1|RUNNING|\n", "1", False),
    (0, "100|0|FAILED|\n101|0|RUNNING|\n", "0", True),  # the last task of an array has the array's id
    (0, "100|0|RUNNING|\n101|0|FAILED|\n", "0", False),
    (0, "101|0|FAILED|\n", "0", False),
    (0, "100|0|FAIL", "0", False),
    (0, "", "0", False),
    (1, "slurm_load_jobs error: Invalid job id specified", "0", True),
    (1, "slurm_load_jobs error: Unable to contact slurm controller", "0", False),
])
def test_run_of_a_job_has_ended(returncode, text, run, ended):
    assert slurm.run_has_ended("100", run, returncode, text, "") is ended


def test_run_of_a_job_is_judged_like_the_job_where_runs_are_not_counted():
    engine = SCHEDULERS["gridengine"]

    assert engine.run_command("7") is None
    assert engine.run_has_ended("7", "0", 1, "", "Following jobs do not exist: 7\njobs do not exist") is True
