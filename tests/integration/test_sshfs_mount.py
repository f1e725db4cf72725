# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Alice mounts a folder of the test cluster on its workstation over real ssh, under various faults."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from typing import Callable

import pytest
from target import CHECKOUT, CLUSTER, Target, Workstation

# Runs the module with each set of arguments that it reads, saving Ansible's second of overhead for each.
RUN = """
import contextlib, io, json, os, sys
from ansible.module_utils import basic
from ansible_collections.mala.hpc_db.plugins.modules import sshfs_mount
basic._ANSIBLE_PROFILE = "legacy"
for arguments in json.load(sys.stdin):
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        sshfs_mount.main()
    print(said.getvalue().splitlines()[-1])
"""
LOGS = {"path": "~/see/logs", "host": "login", "folder": "logs"}
# The login node's address inside the cluster, in a network that the workstation cannot reach.
INSIDE = "198.51.100.2"


def call(workstation: Workstation, *arguments: dict) -> list[dict]:
    """Run the module on the workstation, once for each set of arguments."""
    script = f"cd {CHECKOUT} && PYTHONPATH=.cache/collections .venv/bin/python -c {shlex.quote(RUN)}"
    done = subprocess.run(
        [*workstation.shell, script], env=workstation.environment, input=json.dumps(arguments), capture_output=True,
        text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ensure(workstation: Workstation, **others: object) -> dict:
    """Run the module, which must succeed."""
    (result,) = call(workstation, {**LOGS, **others})
    assert not result.get("failed"), result
    return result


def fails(workstation: Workstation, **others: object) -> str:
    """Run the module, which must fail, and return its one-line message."""
    (result,) = call(workstation, {**LOGS, **others})
    assert result.get("failed") and len(result["msg"].splitlines()) == 1, result
    return result["msg"]


def processes(workstation: Workstation) -> list[str]:
    """Return alice's sshfs and ssh processes on the workstation, as lines ``PID sshfs …``."""
    listed = workstation.run("ps -u alice -o pid=,stat=,args=").splitlines()
    found = (re.fullmatch(r"\s*(\d+) ([^Z]\S*)\s+((?:\S*/)?(?:sshfs|ssh|sftp) .*)", line) for line in listed)
    return [f"{each[1]} {each[3]}" for each in found if each]


def server(workstation: Workstation) -> str:
    """Return the PID of the only sshfs."""
    (found,) = (each.split()[0] for each in processes(workstation) if "sshfs" in each.split()[1])
    return found


def mounts(workstation: Workstation) -> str:
    return workstation.run("grep fuse.sshfs /proc/self/mountinfo || :")


def eventually(condition: Callable[[], object], seconds: float) -> float:
    """Wait for a condition; return the time it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - began


def read(workstation: Workstation, path: str = "see/logs/events") -> str:
    """Return the content of a file, or the error."""
    return workstation.run(f"cat {path} 2>&1 || :").rpartition(": ")[2]


@pytest.fixture(autouse=True)
def nothing_left(mini: Target, workstation: Workstation) -> Iterator[None]:
    """Provide logs to look at; afterwards no process, mount or folder may be left."""
    workstation.run("mkdir -p .ansible")
    mini.run("mkdir -p logs other && echo one > logs/events && echo other > other/events")
    homes = workstation.run("ls -A")
    yield
    ensure(workstation, state="unmounted")
    eventually(lambda: not processes(workstation), 30)
    assert mounts(workstation) == "" and workstation.run("ls -A") == homes


def test_as_a_user_sees_it(mini: Target, workstation: Workstation) -> None:
    def ansible(*options: str) -> str:
        arguments = json.dumps({**LOGS, "user": "alice", "port": 22})
        words = ["ansible", "localhost", "-m", "mala.hpc_db.sshfs_mount", "-a", arguments, "--diff", *options]
        return workstation.run(workstation.ansible(words))

    planned = ansible("--check")
    assert "+alice@login:logs/ on " in planned and "+  ro\n" in planned and "CHANGED" in planned
    assert "see" not in workstation.run("ls -A").split() and not mounts(workstation)

    assert "CHANGED" in ansible()
    assert read(workstation) == "one"
    assert workstation.run("stat -c %U see/logs/events") == "alice"
    assert "Read-only file system" in workstation.run("touch see/logs/x 2>&1 || :")
    mini.run("echo two > logs/new")
    assert read(workstation, "see/logs/new") == "two"
    pid = server(workstation)

    again = ansible()
    assert "SUCCESS" in again and 'answers: true' in again and server(workstation) == pid


def test_what_is_wanted_otherwise(mini: Target, workstation: Workstation) -> None:
    workstation.run("mkdir -p see/logs && sshfs login:other see/logs")  # the command of the manual
    assert ensure(workstation)["found"] == "other"
    assert read(workstation) == "one" and len(mounts(workstation).splitlines()) == 1

    assert ensure(workstation, folder="other", read_only=False)["found"] == "other"
    workstation.run("echo mine > see/logs/mine")
    assert mini.run("cat other/mine") == "mine"

    pid = server(workstation)
    with subprocess.Popen([*workstation.shell, "cd see/logs && echo in && read line"], env=workstation.environment,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout and shell.stdout.readline() == "in\n"
        used = fails(workstation, state="unmounted")
        assert re.fullmatch(r"path: sh \(PID \d+\) still use \S+/see/logs; end that first, or unmount with force", used)
        assert server(workstation) == pid
        assert ensure(workstation, state="remounted", force=True)["changed"]
        shell.communicate("\n")
    assert read(workstation) == "one"
    ensure(workstation, state="unmounted")

    workstation.run("touch see/logs/draft")
    assert "see/logs is not empty, and a mount would hide what is in it (draft)" in fails(workstation)
    workstation.run("rm -r see")
    assert re.match("folder: the folder login:nowhere/ does not exist ", fails(workstation, folder="nowhere"))


def test_link_is_cut(workstation: Workstation) -> None:
    """M1 of docs/reliability.md; a hanging mount that was made without this module is unmounted, too."""
    ensure(workstation)
    workstation.run("mkdir by-hand && sshfs login:logs by-hand")
    by_hand = {"path": "~/by-hand", "state": "unmounted", "alive_interval": 1, "connect_timeout": 1}
    assert [read(workstation), read(workstation, "by-hand/events")] == ["one", "one"]
    state = workstation.environment["HPC_DB_CLUSTER"]

    began = time.monotonic()
    subprocess.run([str(CLUSTER), "cut", "login", "--state", state], check=True)
    hanging = subprocess.Popen([*workstation.shell, "ls by-hand/x"], env=workstation.environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert read(workstation, "see/logs/x") == "Input/output error"
        assert time.monotonic() - began <= 15
        result = ensure(workstation)
        assert (result["changed"], result["answers"]) == (False, False) and "does not answer" in str(result)

        assert ensure(workstation, **by_hand)["changed"]
        assert "by-hand" not in mounts(workstation)
        assert "login cannot be reached" in fails(workstation, path="~/new", connect_timeout=1)
        eventually(lambda: time.monotonic() - began >= 30, 31)
    finally:
        subprocess.run([str(CLUSTER), "heal", "login", "--state", state], check=True)
    assert eventually(lambda: read(workstation) == "one", 60) <= 10
    assert hanging.wait(60) != 0, "what hung has been told"
    assert not ensure(workstation)["changed"]
    workstation.run("rmdir by-hand")


def test_sshfs_is_killed(workstation: Workstation) -> None:
    """M2 of docs/reliability.md."""
    ensure(workstation)
    workstation.run(f"kill -KILL {server(workstation)}")
    eventually(lambda: read(workstation) == "Transport endpoint is not connected", 30)

    planned, = call(workstation, {**LOGS, "_ansible_check_mode": True})
    assert (planned["changed"], planned["found"]) == (True, "dead") and not processes(workstation)
    assert ensure(workstation)["found"] == "dead"
    assert read(workstation) == "one"

    workstation.run(f"kill -KILL {server(workstation)}")
    assert ensure(workstation, state="unmounted")["changed"]


def test_sshfs_hangs(workstation: Workstation) -> None:
    ensure(workstation)
    workstation.run(f"kill -STOP {server(workstation)}")
    with subprocess.Popen([*workstation.shell, "exec ls see/logs/x"], env=workstation.environment,
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as hanging:
        hangs = "ps -u alice -o args= | grep -c '^ls see/logs/x$' || :"
        eventually(lambda: workstation.run(hangs) == "1", 30)
        time.sleep(1)  # an answer would have come by now
        assert workstation.run(hangs) == "1"
        assert ensure(workstation)["found"] == "hung"
        assert read(workstation) == "one"
        assert "No such file" not in hanging.communicate(timeout=60)[1]


def test_unknown_and_changed_host_keys(workstation: Workstation) -> None:
    """M3 of docs/reliability.md; even the user's own configuration cannot disable the check."""
    workstation.run("cd .ssh; mv known_hosts kept; printf 'Host *\\nStrictHostKeyChecking no\\n' > config")
    try:
        assert re.match(r"host: the host key of login, .* log in once with ssh", fails(workstation))
        assert "see" not in workstation.run("ls -A").split() and "known_hosts" not in workstation.run("ls .ssh").split()

        workstation.run("cd .ssh; ssh-keygen -q -t ed25519 -N '' -f other; echo login $(cat other.pub) > known_hosts")
        assert re.match(r"host: login has another host key .* ssh-keygen -R login", fails(workstation))
    finally:
        workstation.run("cd .ssh; mv kept known_hosts; rm -f config other other.pub")
    assert mounts(workstation) == ""


def test_by_way_of_other_hosts(workstation: Workstation) -> None:
    """The workstation cannot reach the last host directly."""
    assert "cannot be reached" in fails(workstation, host=INSIDE, connect_timeout=1)
    gate = "Host gate\\nHostName login\\nHostKeyAlias login\\n"
    inside = f"Host inside\\nHostName {INSIDE}\\nHostKeyAlias login\\n"
    workstation.run(f"printf '{gate}{inside}' > .ssh/config; printf '{gate}{inside}ProxyJump gate\\n' > a,config")
    ways = (
        {"host": INSIDE, "proxy_jump": ["alice@login:22"], "ssh_arguments": "-o HostKeyAlias=login"},
        {"host": "inside", "ssh_arguments": "-J gate,inside -o ServerAliveInterval=30"},
        {"host": "inside", "ssh_config": "~/a,config", "identity_file": "~/.ssh/id_ed25519"},
    )
    try:
        for way in ways:
            assert ensure(workstation, **way)["changed"]
            assert read(workstation) == "one"
            assert not ensure(workstation, **way)["changed"]
    finally:
        workstation.run("rm .ssh/config a,config")


HOSTILE = [
    "a b", "it's", 'say "hi"', "$(touch CANARY)", "`touch CANARY`", "; touch CANARY #", "x\ntouch CANARY", "a,b",
    "x,ssh_command=touch CANARY", "-x", "--help", "-oProxyCommand=touch CANARY", "x,ProxyCommand=touch CANARY",
    "x -o ProxyCommand='touch CANARY'", "{x}", "{{ 7 * 7 }}", "a\\", "\u03a9", "x=y", "", "..", "|touch CANARY",
]


def test_no_value_is_run(mini: Target, workstation: Workstation) -> None:
    """I1 of docs/reliability.md: each value is used literally, or refused in one line."""
    canary = f"/tmp/hpc-db-canary-{os.getpid()}"
    strange = f"-o a,b 'it\"s' $(touch {canary}) `touch {canary}` ;{{x}}\\ \u03a9 %h"
    mini.run(f"mkdir -p -- {shlex.quote(f'./{strange}')} && echo odd > {shlex.quote(f'./{strange}/events')}")
    odd = {**LOGS, "path": f"~/see/{strange}", "folder": strange}
    first, second, third = call(workstation, odd, odd, {**odd, "state": "unmounted"})
    assert [each.get("changed") for each in (first, second, third)] == [True, False, True], (first, second, third)

    texts = [text.replace("CANARY", canary) for text in HOSTILE]
    unreachable = {"port": 1, "timeout": 20}
    cases = [
        {**LOGS, **unreachable, **given}
        for text in texts
        for given in (
            {"host": text}, {"user": text}, {"folder": text}, {"identity_file": f"/{text}"}, {"ssh_config": text},
            {"proxy_jump": [text]}, {"ssh_arguments": text}, {"ssh_arguments": f"-o {text}"}, {"options": {text: text}},
            {"options": {"dcache_timeout": text}}, {"path": f"~/see/{text}"},
        )
    ]
    for case, result in zip(cases, call(workstation, *cases)):
        assert result.get("failed") and len(result["msg"].splitlines()) == 1, (case, result)
    for host in (mini, workstation):
        assert host.run(f"ls -d {canary}* 2>/dev/null || :") == ""
