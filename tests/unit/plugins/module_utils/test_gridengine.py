# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The adapter's commands to Grid Engine, and the parsing of answers from a real one (8.1.9)."""

import os
import pwd
import subprocess
import time
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import gridengine as module
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import Job

gridengine = SCHEDULERS["gridengine"]

HEAD = """<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
"""
# qstat -u alice -r -xml
QUEUE = HEAD + """\
  <queue_info>
    <job_list state="running">
      <JB_job_number>18</JB_job_number>
      <JAT_prio>0.50000</JAT_prio>
      <JB_name>hpc_db</JB_name>
      <JB_owner>alice</JB_owner>
      <state>r</state>
      <JAT_start_time>2026-11-23T07:01:14</JAT_start_time>
      <queue_name>all.q@c2</queue_name>
      <slots>1</slots>
      <full_job_name>hpc_db</full_job_name>
      <hard_request name="h_rt" resource_contribution="0.000000">100</hard_request>
      <hard_request name="s_rt" resource_contribution="0.000000">60</hard_request>
      <hard_request name="mem_free" resource_contribution="0.000000">100M</hard_request>
      <predecessor_jobs_req>hpc_db</predecessor_jobs_req>
      <binding>NONE</binding>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>19</JB_job_number>
      <JAT_prio>0.00000</JAT_prio>
      <JB_name>hpc_db</JB_name>
      <JB_owner>alice</JB_owner>
      <state>hqw</state>
      <JB_submission_time>2026-11-23T07:01:14</JB_submission_time>
      <queue_name></queue_name>
      <slots>1</slots>
      <full_job_name>hpc_db</full_job_name>
      <predecessor_jobs_req>hpc_db</predecessor_jobs_req>
      <predecessor_jobs>18</predecessor_jobs>
      <binding>NONE</binding>
    </job_list>
  </job_info>
</job_info>
"""
# A row of qstat -u alice -g t -xml
ROW = """\
    <job_list state="running">
      <JB_job_number>{}</JB_job_number>
      <JAT_prio>0.45001</JAT_prio>
      <JB_name>{}</JB_name>
      <JB_owner>alice</JB_owner>
      <state>{}</state>
      <JAT_start_time>2026-11-23T07:01:42</JAT_start_time>
      <queue_name>{}</queue_name>
      <master>{}</master>
      <slots>1</slots>
{}    </job_list>
"""
WAITING = """\
    <job_list state="pending">
      <JB_job_number>23</JB_job_number>
      <JAT_prio>0.75000</JAT_prio>
      <JB_name>parm</JB_name>
      <JB_owner>alice</JB_owner>
      <state>qw</state>
      <JB_submission_time>2026-11-23T07:01:43</JB_submission_time>
      <queue_name></queue_name>
      <master></master>
      <slots>6</slots>
    </job_list>
"""
TASK = "      <tasks>{}</tasks>\n"
EMPTY = HEAD + "  <queue_info>\n  </queue_info>\n  <job_info>\n  </job_info>\n</job_info>\n"
NODES = """<?xml version='1.0'?>
<qhost xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qhost/qhost.xsd">
 <host name='global'>
   <hostvalue name='arch_string'>-</hostvalue>
 </host>
 <host name='c1'>
   <hostvalue name='arch_string'>lx-amd64</hostvalue>
   <hostvalue name='load_avg'>15.35</hostvalue>
 </host>
 <host name='c2'>
   <hostvalue name='arch_string'>lx-amd64</hostvalue>
   <hostvalue name='load_avg'>-</hostvalue>
 </host>
</qhost>
"""


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def listed(*rows):
    return HEAD + "  <queue_info>\n" + "".join(rows) + "  </queue_info>\n</job_info>\n"


def test_submission_passes_options_as_qsub_has_them():
    options = {
        "q": "all.q", "pe": "smp 4", "p": -100, "r": True, "R": False, "P": None, "V": True, "m": False,
        "l": {"h_rt": "72:00:00", "h_vmem": "4G", "exclusive": True}, "ac": "'note=it is'", "hold_jid": "hpc_db",
    }

    assert gridengine.submit_command("hpc_db", "/a b/job.sh", options, "/a b/100%j.log") == [
        "qsub", "-terse", "-N", "hpc_db", "-o", "/a b/100%j.log", "-j", "y", "-S", "/bin/sh",
        "-R", "n", "-V", "-ac", "note=it is", "-hold_jid", "hpc_db",
        "-l", "exclusive=true,h_rt=72:00:00,h_vmem=4G", "-p", "-100", "-pe", "smp", "4", "-q", "all.q", "-r", "y",
        "/a b/job.sh",
    ]


def test_check_asks_for_nothing_that_only_hosts_report():
    options = {"q": "all.q", "l": {"h_rt": 60, "mem_free": "1G", "np_load_avg": 2, "h_vmem": "1G"}}

    assert gridengine.check_command("hpc_db", options) == [
        "qsub", "-w", "v", "-N", "hpc_db", "-l", "h_rt=60,h_vmem=1G", "-q", "all.q", "-b", "y", "/bin/true",
    ]
    assert gridengine.check_batch_command("/job.sh", {}) == ["qsub", "-w", "v", "-N", "check", "-b", "y", "/bin/true"]


@pytest.mark.parametrize("path", ["/a:b", "/a,b", "/$HOME", "/a\\b"])
def test_log_that_qsub_would_misread_is_refused(path):
    with pytest.raises(ValueError, match="output: .* which qsub interprets"):
        gridengine.submit_command("hpc_db", "/job.sh", {}, path)


@pytest.mark.parametrize("options, added", [
    ({}, {"l": {"mem_free": "4G"}}),
    ({"l": {"h_rt": "00:10:00"}}, {"l": {"h_rt": "00:10:00", "s_rt": 480, "mem_free": "4G"}}),
    ({"l": "h_rt=600,h_vmem=1G"}, {"l": {"h_rt": "600", "s_rt": 480, "h_vmem": "1G"}}),
    ({"l": {"h_rt": 60}}, {"l": {"h_rt": 60, "s_rt": 1, "mem_free": "4G"}}),
    ({"l": {"h_rt": 600, "s_rt": 100}}, {"l": {"h_rt": 600, "s_rt": 100, "mem_free": "4G"}}),
    ({"r": False, "hold_jid": "1,2"}, {"r": False, "hold_jid": "1,2", "l": {"mem_free": "4G"}}),
])
def test_hosting_job_waits_for_others_and_hears_of_its_walltime(options, added):
    assert gridengine.server_options(options, "hpc_db", "4G", 120, True) == {
        "hold_jid": "hpc_db", "r": True, **added,
    }


@pytest.mark.parametrize("options, short", [
    ({}, {"l": {"h_rt": 300}}),
    ({"q": "all.q", "l": {"h_rt": "72:00:00", "mem_free": "16G", "h_vmem": "16G", "hostname": "c1", "gpu": 1}},
     {"q": "all.q", "l": {"h_rt": 300, "mem_free": "512M", "h_vmem": "2G", "gpu": 1}}),
])
def test_short_job_goes_where_the_server_goes(options, short):
    made = gridengine.short_options({**options, "hold_jid": "other", "a": "202611230700"})

    assert made == {**short, "hold_jid": False, "a": False, "r": False}


def test_head_of_a_job_script():
    options = {"l": {"h_rt": "00:05:00"}, "ac": "'note=a b$HOME'", "r": True}

    assert gridengine.batch_lines("train", 8, "/home/alice/a b/log", options) == [
        "#$ -N train", "#$ -t 1-8", "#$ -o '/home/alice/a b/log/$JOB_ID.$TASK_ID.log'", "#$ -j y", "#$ -S /bin/sh",
        "#$ -ac 'note=a b$HOME'", "#$ -l h_rt=00:05:00", "#$ -r y",
    ]


@pytest.mark.parametrize("variables, name", [
    ({"JOB_ID": "7", "SGE_TASK_ID": "undefined", "RESTARTED": "0"}, "hpc_db 7.0 mini "),
    ({"JOB_ID": "7", "SGE_TASK_ID": "12", "RESTARTED": "1"}, "hpc_db 7.12.1 mini "),
    ({"JOB_ID": "7"}, "hpc_db 7.0 mini "),
])
def test_name_of_a_worker_is_that_of_its_job(variables, name):
    script = f'echo "{gridengine.worker_name("mini")}"'
    environment = {"PATH": os.defpath, **variables}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.startswith(name)


@pytest.mark.parametrize("text, job_id", [
    ("18\n", "18"), ("Welcome!\n18\n", "18"), ("18\nBye!\n", "18"),
    ('Your job 18 ("x") has been submitted\n', "18"), ("", None), ("21.1-3:1\n", None), ("18 jobs are queued\n", None),
])
def test_id_of_a_submission(text, job_id):
    assert gridengine.parse_submit(text) == job_id


def test_queue(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1795417274.0 + 30)  # 30 s after the job's start

    assert gridengine.parse_queue("Maintenance on Monday\n" + QUEUE + "--> 12 % of the allocation are left\n") == [
        {"id": "18", "name": "hpc_db", "state": "RUNNING", "node": "c2", "reason": "", "time_left": 70,
         "time_limit": 100},
        {"id": "19", "name": "hpc_db", "state": "PENDING", "node": "", "reason": "held", "time_left": None,
         "time_limit": None},
    ]
    assert gridengine.parse_queue(EMPTY) == []


@pytest.mark.parametrize("letters, state, reason", [
    ("r", "RUNNING", ""), ("Rr", "RUNNING", ""), ("t", "CONFIGURING", ""), ("dr", "COMPLETING", ""),
    ("dt", "COMPLETING", ""), ("qw", "PENDING", ""), ("hqw", "PENDING", "held"), ("Rq", "PENDING", ""),
    ("s", "SUSPENDED", ""), ("S", "SUSPENDED", ""), ("T", "SUSPENDED", ""),
    ("Eqw", "PENDING", "error, which qstat -j 7 explains"), ("Z", "Z", ""),
])
def test_states(letters, state, reason):
    (job,) = gridengine.parse_queue(listed(ROW.format(7, "hpc_db", letters, "", "", "")))

    assert (job["state"], job["reason"]) == (state, reason)
    assert gridengine.is_hopeless(reason) is letters.startswith("E")


@pytest.mark.parametrize("text", ["", "error: unable to contact qmaster\n", "<?xml version='1.0'?>\n<job_info>"])
def test_answer_that_is_none(text):
    with pytest.raises(ValueError, match="the output is not XML"):
        gridengine.parse_queue(text)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home directory as qstat finds it, which ignores $HOME."""
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: SimpleNamespace(pw_name="alice", pw_dir=str(tmp_path)))
    monkeypatch.setenv("SGE_ROOT", str(tmp_path / "sge"))
    monkeypatch.delenv("SGE_CELL", raising=False)
    (tmp_path / "sge/default/common").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("text", ["", "# -q nothing\n", "-s p -u root\n", "-ext\n-r -ne\n"])
def test_defaults_of_qstat_are_overridden(text, home):
    (home / ".sge_qstat").write_text(text)

    assert gridengine.queue_command("hpc_db") == ["qstat", "-s", "prs", "-u", "alice", "-r", "-xml"]
    assert gridengine.jobs_command([]) == ["qstat", "-s", "prs", "-u", "alice", "-g", "t", "-xml"]


@pytest.mark.parametrize("ask", [lambda: gridengine.queue_command("x"), lambda: gridengine.jobs_command([])])
@pytest.mark.parametrize("name", [".sge_qstat", "sge/default/common/sge_qstat"])
def test_defaults_of_qstat_that_hide_jobs_are_refused(name, ask, home):
    (home / name).write_text("-s prs\n-q nothing\n")

    with pytest.raises(ValueError, match=f"^{home}/{name}: the option -q changes what every qstat shows"):
        ask()


@pytest.mark.parametrize("name", [".sge_request", "sge/default/common/sge_request"])
@pytest.mark.parametrize("text, option", [
    ("-q all.q\n-sync y\n", "-sync"), ("-notify\n", "-notify"), ("-t 1-3", "-t"), ("-h -j y\n", "-h"),
    ("-cwd -b yes\n", "-b"),
    ("-sync n -now no -b n\n# -t 1-3\n-P project -m n\n", ""), ("", ""),
])
def test_defaults_of_qsub_with_which_no_job_is_hosted_are_refused(text, option, name, home):
    (home / name).write_text(text)

    def ask():
        gridengine.check_environment({}, {}, "server_job_options")

    if option:
        with pytest.raises(ValueError, match=f"^{home}/{name}: the option {option} changes every job that qsub"):
            ask()
    else:
        ask()


def test_jobs_with_their_nodes():
    text = listed(
        ROW.format(22, "par", "r", "all.q@c1", "MASTER", ""), ROW.format(22, "par", "r", "all.q@c1", "SLAVE", ""),
        ROW.format(22, "par", "r", "all.q@c2", "SLAVE", ""),
        ROW.format(21, "arr", "r", "all.q@c2", "MASTER", TASK.format(1)),
        ROW.format(21, "arr", "Rr", "all.q@c1", "MASTER", TASK.format(2)), WAITING,
    )

    assert gridengine.parse_jobs(text) == [
        Job("22", "0", "RUNNING", 1795417302.0, "c1,c2", "par"), Job("21.1", "0", "RUNNING", 1795417302.0, "c2", "arr"),
        Job("21.2", "1", "RUNNING", 1795417302.0, "c1", "arr"), Job("23", "0", "PENDING", None, "", "parm"),
    ]
    assert gridengine.parse_hosts("c1,c2") == ["c1", "c2"]


def test_nodes():
    assert gridengine.parse_nodes(NODES) == ["c1", "c2"]


@pytest.mark.parametrize("value, seconds", [
    ("72:00:00", 259200), (259200, 259200), ("90", 90), (":5:", 300), ("0:0:1", 1),
    (None, None), (True, None), ("1:30", None), ("1h", None), ("-5", None), ("INFINITY", None), ("²", None),
])
def test_times_as_grid_engine_writes_them(value, seconds):
    assert module.parse_time(value) == seconds


@pytest.mark.parametrize("options", [
    {}, {"l": {"h_rt": "72:00:00", "mem_free": "16G"}}, {"l": {"h_rt": 259200, "gpu": 1, "exclusive": True}},
    {"l": "h_rt=1:0:0,h_vmem=1.5G"}, {"l": None}, {"pe": "smp 4"}, {"p": -100}, {"p": "-100"}, {"q": "all.q@c1"},
    {"r": True}, {"P": "project"}, {"M": "alice@example.org"}, {"a": False},
])
def test_options_that_qsub_understands(options):
    gridengine.check_options(options)


@pytest.mark.parametrize("options, words", [
    ({"l": {"h_rt": "soon"}}, "l: h_rt: 'soon' is not a time; write for example \"72:00:00\""),
    ({"l": {"h_rt": True}}, "is not a time"),
    ({"l": {"mem_free": "lots"}}, "l: mem_free: 'lots' is not an amount of memory"),
    ({"l": {"a b": 1}}, "l: 'a b' is not a resource"),
    ({"l": {"gpu": "1,h_rt=1"}}, "l: gpu: '1,h_rt=1' is not a single value"),
    ({"l": ["h_rt=1"]}, "l: ['h_rt=1'] are not resources"),
    ({"l": "h_rt=soon"}, "is not a time"),
    ({"-l": "h_rt=1"}, "'-l' is not an option of qsub"),
    ({"l h_rt=1 -b": "y"}, "is not an option of qsub"),
    ({"q": "all.q\n-b y"}, "is more than one line"),
    ({"q": "all.q -b y"}, "q: 'all.q -b y' contains another option"),
    ({"A": "it's"}, "has an unbalanced quote"),
    ({"pe": ["smp", 4]}, "pe: ['smp', 4] is not a single value"),
    *(({flag: "x"}, f"{flag}: hosting_job sets this itself, or cannot work with it")
      for flag in ("N", "o", "t", "b", "notify", "sync", "S", "soft", "terse", "w")),
])
def test_options_that_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as refused:
        gridengine.check_options(options)

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bin_dir, known, root", [
    ("/opt/sge/bin/lx-amd64", None, "/opt/sge"), ("/opt/sge/bin/lx-amd64/", None, "/opt/sge"),
    ("/opt/sge/bin/lx-amd64", "/other", "/other"), ("/usr/bin", None, None), ("", None, None),
])
def test_root_follows_from_the_folder_of_the_commands(bin_dir, known, root):
    variables = {"SGE_ROOT": known} if known else {}

    assert gridengine.environment(variables, bin_dir).get("SGE_ROOT") == root
