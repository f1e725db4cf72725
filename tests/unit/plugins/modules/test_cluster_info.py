# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""cluster_info with the output of real commands; tests/integration has a real cluster."""

import functools
import http.server
import os
import subprocess
import threading

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.cluster_info import (
    fetch_url,
    format_time,
    login_command,
    look,
    other_mounts,
    parse_associations,
    parse_config,
    parse_df,
    parse_login,
    parse_partitions,
    parse_quota,
    propose,
    source_urls,
)

# Slurm 22.05, lines shortened.
PARTITIONS = """\
A message of the day
PartitionName=work AllowGroups=ALL AllowAccounts=ALL Default=YES MaxTime=04:00:00 OverSubscribe=NO RootOnly=NO \
PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=2 DefMemPerCPU=256 MaxMemPerNode=UNLIMITED
PartitionName=gpu AllowAccounts=casus Default=NO MaxTime=UNLIMITED OverSubscribe=EXCLUSIVE State=UP TotalNodes=4 \
MaxMemPerNode=378000
PartitionName=old Default=NO MaxTime=2-00:00:00 State=DOWN TotalNodes=1
"""
NODES = "work|4000|4|(null)\nwork|8000+|2|(null)\ngpu|384000|48|gpu:a100:4(S:0-1)\nall nodes are busy\n"
WORK = {
    "name": "work", "default": True, "usable": True, "limit": 14400, "walltime": "04:00:00", "nodes": 2, "cpus": 2,
    "memory": 4000, "gpus": False, "exclusive": False, "preempted": True,
}
LARGE = {**WORK, "memory": 512000, "cpus": 104, "preempted": False}
SHORT = {
    "partition": "work", "time": "00:03:00", "nodes": 2, "ntasks-per-node": 1, "mem": "512M", "cpus-per-task": 1,
}


def test_partitions():
    work, gpu, old = parse_partitions(PARTITIONS, NODES, ["fwkt"])

    assert work == WORK
    assert (gpu["usable"], gpu["limit"], gpu["memory"], gpu["gpus"], gpu["exclusive"]) == (
        False, None, 378000, True, True)
    assert (old["usable"], old["cpus"], old["limit"]) == (False, 0, 172800)
    assert parse_partitions(PARTITIONS, NODES, ["casus"])[1]["usable"]
    assert parse_partitions(PARTITIONS, NODES, [])[1]["usable"]


@pytest.mark.parametrize("partitions, accounts, options, memory, short", [
    ([WORK], [], {"partition": "work", "time": "04:00:00", "mem": "2000M", "cpus-per-task": 2}, "2000M", SHORT),
    ([LARGE], ["mine", "other"], {
        "partition": "work", "time": "04:00:00", "mem": "16G", "cpus-per-task": 4, "account": "mine"}, "16G",
     {**SHORT, "account": "mine"}),
    # partitions with a short limit or with GPUs come last
    ([{**LARGE, "limit": 1800}, {**LARGE, "name": "gpu", "gpus": True, "limit": None},
      {**LARGE, "name": "long", "default": False, "limit": None, "exclusive": True}], [],
     {"partition": "long", "time": "7-00:00:00", "nodes": 1, "mem": False}, "64G",
     {"partition": "long", "time": "00:03:00", "nodes": 2, "ntasks-per-node": 1, "mem": False}),
    ([{**LARGE, "gpus": True, "nodes": 1}, {**LARGE, "name": "closed", "usable": False}], [],
     {"partition": "work", "time": "04:00:00", "mem": "16G", "cpus-per-task": 4}, "16G", {**SHORT, "nodes": 1}),
])
def test_proposes_a_job_that_fits(partitions, accounts, options, memory, short):
    assert propose(partitions, accounts) == {"options": options, "memory": memory, "short_options": short}


@pytest.mark.parametrize("partitions", [[], [{**WORK, "usable": False}], [{**WORK, "nodes": 0}]])
def test_proposes_nothing_without_a_partition(partitions):
    assert propose(partitions, []) is None


def test_small_answers():
    assert parse_associations("casus|normal,long\nfwkt|\nfwkt|normal\n", "fwkt\n") == (
        ["fwkt", "casus"], ["long", "normal"])
    assert parse_associations("", "") == ([], [])
    assert parse_config("Configuration data as of now\nClusterName             = mini\nMaxJobCount = 10000\n") == {
        "ClusterName": "mini"}
    assert parse_login("Hi!\nhpc_db folder WORK /work/al ice\nhpc_db folder DATA \nhpc_db program qsub /x/qsub\n") == (
        {"WORK": "/work/al ice"}, {"qsub": "/x/qsub"})
    assert [format_time(seconds) for seconds in (7200, 90061)] == ["02:00:00", "1-01:01:01"]


def test_file_systems():
    df = "Filesystem Type 1024-blocks Used Available Capacity Mounted on\nfs:/home/a b nfs4 100 40 60 40% /home\n"
    quota = (
        "Disk quotas for user alice (uid 20001): \n     Filesystem  blocks   quota   limit   grace   files\n"
        "fs:/home  2048* 0  20480       -     10       0       0\n/free 1 0 0 - 1 0 0\n"
    )
    assert parse_df(df) == ("fs:/home/a b", "nfs4", 60 * 1024, "/home")
    assert parse_df("df: /x: No such file or directory\n") is None
    assert parse_quota(quota, ["fs:/home", "/home"]) == (2048 * 1024, 20480 * 1024)
    assert parse_quota(quota, ["/free"]) == parse_quota("", ["/x"]) == (None, None)


def test_mounts_are_named_and_not_touched(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text("".join(
        f"{number} 1 0:{number} / {path} rw - {kind} fs:/x rw\n"
        for number, (path, kind) in enumerate([("/home", "nfs4"), ("/bigdata", "lustre"), ("/", "ext4")])
    ))

    assert other_mounts(table, ["/home/alice"]) == ["/bigdata (lustre)"]
    assert other_mounts(tmp_path / "none", []) == []


def test_what_others_have_mounted_is_not_named(tmp_path):
    """Any user may create a FUSE mount, at a folder of any name."""
    mounts = [
        ("/tmp/evil\\012#", "fuse.sshfs", os.geteuid() + 1), ("/tmp/a\rb", "fuse.sshfs", os.geteuid() + 2),
        ("/home/alice/see", "fuse.sshfs", os.geteuid()), ("/gluster", "fuse.glusterfs", 0),
    ]
    table = tmp_path / "mountinfo"
    table.write_text("".join(
        f"5 1 0:5 / {path} rw,nosuid - {kind} x:/ rw,user_id={user},group_id=1\n" for path, kind, user in mounts
    ), newline="")

    assert other_mounts(table, []) == ["/gluster (fuse.glusterfs)", "/home/alice/see (fuse.sshfs)"]


NO_SOURCES = {"channels": None, "index_url": "", "wheelhouse": ""}


def test_without_any_command(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    found = look({"bin_dir": None, **NO_SOURCES}, lambda _command: "", lambda _command: "", lambda _url: "")

    assert (found["scheduler"], found["bin_dir"], found["proposed"], found["partitions"]) == ("", "", None, [])
    assert found["file_systems"] == found["clients"] == found["accounts"] == found["others"] == []
    assert found["sources"] == {}


def test_slurm_that_only_a_login_shell_knows(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    answers = {
        "bash": "hpc_db program sbatch /opt/slurm/bin/sbatch\nhpc_db program qsub /usr/bin/qsub\n",
        "/opt/slurm/bin/scontrol": PARTITIONS, "/opt/slurm/bin/sinfo": NODES,
    }

    def run(command):
        return answers.get(command[0], "")

    found = look({"bin_dir": None, **NO_SOURCES, "channels": ["/c"]}, run, run, lambda url: f"not {url}")

    assert found["sources"] == {"/c/noarch/repodata.json": "not /c/noarch/repodata.json"}
    assert (found["scheduler"], found["bin_dir"], found["others"]) == ("slurm", "/opt/slurm/bin", ["qsub"])
    assert found["proposed"]["options"]["partition"] == "work"


def test_login_shell_prints_what_is_parsed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bash_profile").write_text(f"echo hello; export SCRATCH='{tmp_path}/a b'; PATH={tmp_path}:$PATH\n")
    (tmp_path / "qsub").write_text("")
    (tmp_path / "qsub").chmod(0o755)

    printed = subprocess.run(login_command(), capture_output=True, text=True, check=True).stdout

    folders, programs = parse_login(printed)
    assert (folders["SCRATCH"], folders["HOME"], programs["qsub"]) == (
        f"{tmp_path}/a b", str(tmp_path), f"{tmp_path}/qsub")


@pytest.mark.parametrize("channels, index_url, wheelhouse, expected", [
    (["conda-forge"], "", "", []),
    (["conda-forge", "https://m/forge", "file:///srv/c", "/srv/d"], "", "",
     [f"{channel}/noarch/repodata.json" for channel in ("https://m/forge", "file:///srv/c", "/srv/d")]),
    ([], "https://m/simple", "", ["https://m/simple/optuna/"]),
    (["/c"], "https://m/simple", "/srv/wheels", ["/c/noarch/repodata.json", "/srv/wheels"]),
])
def test_only_package_sources_with_a_url_are_checked(channels, index_url, wheelhouse, expected):
    assert source_urls(channels, index_url, wheelhouse) == expected


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass


def test_sources(tmp_path):
    (tmp_path / "there").write_text("")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        answers = [fetch_url(each) for each in (f"{url}/there", f"{url}/gone", f"{url}/a b")]
        server.shutdown()

    assert answers[:2] == ["", "File not found"]
    assert answers[2]
    assert fetch_url(f"file://{tmp_path}/there") == fetch_url(str(tmp_path)) == ""
    assert fetch_url("/no/such") == "there is no /no/such"
    assert "refused" in fetch_url(f"http://127.0.0.1:{server.server_port}")
