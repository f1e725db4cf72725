# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""bootstrap_server with real processes and sockets, and a supervisor that only listens."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Waiting
from ansible_collections.mala.hpc_db.plugins.modules.bootstrap_server import (
    Failed,
    ask_once,
    ensure_started,
    ensure_stopped,
    find_server,
    runs,
)

# The supervisor's actions with --detach.
DETACH = """
import os, sys
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)
os.setsid()
log = os.open(sys.argv[-1].partition("--detach=")[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
"""
PROGRAM = """
import json, os, signal, socket, sys
assert sys.argv[1] == "bootstrap" and sys.argv[3] == "--lifetime=60", sys.argv
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
root = sys.argv[2].partition("=")[2]
open(root + "/pid", "w").write(str(os.getpid()))
where = {"host": socket.gethostname(), "socket": root, "port": 5432, "job": "", "pid": os.getpid()}
listener = socket.socket(socket.AF_UNIX)
listener.bind(root + "/.s.PGSQL.5432")
listener.listen()
with open(root + "/run/.new", "w") as stream:
    json.dump(where, stream)
os.rename(root + "/run/.new", root + "/run/bootstrap.json")
signal.sigwait([signal.SIGTERM])
listener.close()
os.unlink(root + "/.s.PGSQL.5432")
os.unlink(root + "/run/bootstrap.json")
"""


@pytest.fixture
def root():
    root = Path(tempfile.mkdtemp(prefix="hpc_db-"))  # a short path, for the socket
    for folder in ("run", "log", "host/hpc_db_host"):
        (root / folder).mkdir(parents=True)
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(DETACH + PROGRAM)
    yield root
    if (root / "pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((root / "pid").read_text()), signal.SIGKILL)
    shutil.rmtree(root)


@pytest.fixture
def job():
    """The server of a server job, which listens on TCP."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield {"host": "127.0.0.1", "port": listener.getsockname()[1], "job": "4711", "socket": "/gone"}


def params(root, **changes):
    return {"root": str(root), "lifetime": 60, "timeout": 10, **changes}


def run_in(root):
    def run(command):
        done = subprocess.run(command, cwd=root / "host", capture_output=True, text=True, timeout=10, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def believe(_endpoint):
    return True


def say(root, name, content):
    (root / "run" / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_server_of_the_job_is_preferred_and_nothing_started(root, job):
    say(root, "endpoint", job)

    server = ensure_started(params(root), run_in(root), believe)

    assert (server["host"], server["port"], server["job"]) == ("127.0.0.1", job["port"], "4711")
    assert {("sslmode", "require"), ("channel_binding", "require")} < set(server["connect_params"].items())
    assert not (root / "pid").exists()


@pytest.mark.parametrize("queue, is_believed", [
    ("4711|RUNNING|c1|1:00:00|hpc_db|None\n", True), ("", False), ("4711|COMPLETING|c1|1:00:00|hpc_db|None\n", False),
    ("4712|RUNNING|c1|1:00:00|hpc_db|None\n", False),
])
def test_whoever_has_the_port_of_a_job_that_has_ended_is_not_asked(queue, is_believed, root, job):
    asked = []
    settings = {"job_name": "hpc_db", "scheduler": "slurm", "bin_dir": ""}
    (root / "host" / "settings.json").write_text(json.dumps(settings))
    say(root, "endpoint", job)
    is_served = ask_once(str(root), lambda _where: lambda command: asked.append(command) or "JOBID|\n" + queue)

    assert ensure_started(params(root), run_in(root), is_served)["job"] == ("4711" if is_believed else "")
    assert len(asked) == 1  # however often it checks


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's socket")
def test_socket_of_another_user_in_our_folder_s_place_is_not_believed(root):
    ensure_started(params(root), run_in(root), believe)
    os.chown(root / ".s.PGSQL.5432", 65534, 65534)

    assert find_server(str(root), believe) is None


def test_short_lived_server_is_started_once_and_stopped(root):
    server = ensure_started(params(root), run_in(root), believe)

    assert (server["host"], server["port"], server["job"]) == (str(root), 5432, "")
    first = (root / "pid").read_text()
    assert ensure_started(params(root), run_in(root), believe) == server
    assert (root / "pid").read_text() == first
    assert os.getsid(int(first)) == int(first)  # it outlives the connection

    assert ensure_stopped(params(root)) is True
    assert find_server(str(root), believe) is None
    assert ensure_stopped(params(root)) is False


@pytest.mark.parametrize("content", ["", "{", '{"host": "127.0.0.1", "port": 9, "job": "1"}'])
def test_endpoint_of_a_node_that_died_is_not_believed(content, root):
    say(root, "endpoint", content)

    assert find_server(str(root), believe) is None
    assert ensure_started(params(root), run_in(root), believe)["job"] == ""


def test_stop_leaves_another_host_s_server_alone(root):
    ensure_started(params(root), run_in(root), believe)
    said = json.loads((root / "run" / "bootstrap.json").read_text())
    say(root, "bootstrap", {**said, "host": "another"})

    assert ensure_stopped(params(root)) is False
    assert find_server(str(root), believe)
    say(root, "bootstrap", said)


def test_stop_does_not_kill_whoever_has_the_pid_now(root):
    say(root, "bootstrap", {
        "host": socket.gethostname(), "socket": str(root), "port": 5432, "job": "", "pid": os.getpid(),
    })

    assert ensure_stopped(params(root)) is False  # otherwise this test would have been killed


def test_job_that_was_slow_to_answer_makes_the_short_lived_server_leave(root, job):
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(
        DETACH + "import json, os, sys, time\n"
        "root = sys.argv[2].partition('=')[2]\n"
        "open(root + '/pid', 'w').write(str(os.getpid()))\n"
        "os.rename(root + '/run/slow.json', root + '/run/endpoint.json')\n"
        "time.sleep(60)\n"
    )
    say(root, "slow", job)

    assert ensure_started(params(root), run_in(root), believe)["job"] == "4711"

    limit = time.monotonic() + 5
    while os.path.exists(f"/proc/{(root / 'pid').read_text()}/exe"):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("program, timeout, message", [
    ("raise SystemExit('failed: held by job 7 on c1')", 10, "did not start: failed: held by job 7 on c1"),
    ("import sys; sys.exit('x FATAL:  no pg_hba.conf entry\\nfailed: postgres ended')", 10,
     "did not start: x FATAL:  no pg_hba.conf entry; failed: postgres ended"),
    ("import time; print('waiting', flush=True); time.sleep(60)", 1, "no server answered within 1 s: waiting"),
])
def test_failure_says_why_in_one_line(program, timeout, message, root):
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(DETACH + program)

    with pytest.raises(Failed, match=message) as failed:
        ensure_started(params(root, timeout=timeout), run_in(root), believe)
    assert "\n" not in str(failed.value)


SLOW = """
import time
print("2026-11-29T10:00:00+0000 starting: requesting the lease", flush=True)
print("2026-11-29T10:00:00+0000 starting: waiting: the data directory is held by job 7 on c1; hint", flush=True)
time.sleep(60)
"""


def test_wait_goes_on_in_the_next_slice_with_the_same_server(root):
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(DETACH + SLOW.replace("60", "1") + PROGRAM)
    pids, told, resume = set(), [], {}

    while True:
        try:
            server = ensure_started(params(root, slice=0.3, resume=resume), run_in(root), believe)
            break
        except Waiting as waiting:
            told.append(str(waiting))
            pids.add(waiting.resume["pid"])
            resume = {**waiting.resume, "waited": 0.3 * len(told)}

    assert server["host"] == str(root)
    assert told[-1] == (
        "the temporary server: waiting: the data directory is held by job 7 on c1; hint, 10 s are allowed")
    assert pids == {int((root / "pid").read_text())}
    with pytest.raises(Waiting, match=r"^the temporary server \(PID \d+\) stops$"):
        ensure_stopped(params(root, slice=1e-9, resume={"waited": 1.0}))  # the first call has printed it
    assert ensure_stopped(params(root)) is True
    assert not (root / "run" / "bootstrap.json").exists()


def test_time_of_all_slices_together_is_limited(root):
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(DETACH + SLOW)
    with pytest.raises(Waiting) as waiting:
        ensure_started(params(root, slice=0.5, resume={}), run_in(root), believe)
    resume = {**waiting.value.resume, "waited": 10.0}

    with pytest.raises(Failed, match="^no server answered within 10 s: .*held by job 7 on c1"):
        ensure_started(params(root, slice=60, resume=resume), run_in(root), believe)

    limit = time.monotonic() + 10
    while runs(resume["pid"]):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_playbook_says_what_it_waits_for(root):
    """After 5 s, and again when the text changes, on the screen."""
    (root / "host" / "hpc_db_host" / "__main__.py").write_text(DETACH + SLOW.replace("60", "7") + PROGRAM)
    (root / "host" / "settings.json").write_text('{"job_name": "hpc_db", "scheduler": "local", "bindir": "/x"}')
    tasks = [{"mala.hpc_db.bootstrap_server": {"root": str(root), "lifetime": 60, "state": state}}
             for state in ("started", "stopped")]
    (root / "play.yml").write_text(json.dumps([{"hosts": "c", "gather_facts": False, "tasks": tasks}]))
    (root / "hosts").write_text(f"c ansible_connection=local ansible_python_interpreter={sys.executable}\n")
    here = sys.modules[find_server.__module__].__file__
    environment = {
        **os.environ, "ANSIBLE_COLLECTIONS_PATH": here.partition("/ansible_collections/")[0], "ANSIBLE_NOCOLOR": "1",
    }
    play = [sys.executable, "-m", "ansible", "playbook", "-i", "hosts", "play.yml"]

    done = subprocess.run(play, cwd=root, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    waited = re.search(
        r"^\[c\] the temporary server: waiting: the data directory is held by job 7 on c1; hint, 180 s are allowed "
        r"\((\d+) s\)$", done.stdout, re.MULTILINE)
    assert waited and int(waited[1]) >= 5, done.stdout
    assert not (root / "run" / "bootstrap.json").exists()
