# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""background_program with real processes that listen on real ports."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils.host.processes import start_time
from ansible_collections.mala.hpc_db.plugins.modules import background_program
from ansible_collections.mala.hpc_db.plugins.modules.background_program import Failed, answers, ensure_program

# Accepts connections for ever; a word before the port selects one further action.
SERVE = """
import os, signal, socket, subprocess, sys
what, port = sys.argv[1], int(sys.argv[2].partition("=")[2])
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE) if what == "child" else None
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(child.pid if child else os.environ.get("WHAT"), os.getcwd(), sys.stdin.read() == "", flush=True)
listener = socket.create_server(("127.0.0.1", port))
def serve():
    while True:
        listener.accept()[0].close()
if what == "headless":
    import ctypes, threading
    threading.Thread(target=serve).start()
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit, of this thread alone
serve()
"""


def run(command, environment=None):
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode and done.stderr:
        raise Failed(done.stderr.strip())
    return done.stdout


def serve(what):
    return [sys.executable, "-I", "-S", "-c", SERVE, what]


@pytest.fixture
def params(tmp_path):
    """Arguments of the module; all programs that were started with them end with the test."""
    params = {
        "name": "logs", "root": str(tmp_path / "tensor board"), "command": serve("plain"), "environment": {},
        "port": 0, "port_option": "--port", "state": "started", "timeout": 60,
    }
    yield params
    ensure_program({**params, "state": "stopped"}, run, check_mode=False)


def lives(pid):
    return bool(start_time(pid))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_starts_once_and_is_found_again_and_stopped(params, tmp_path):
    (tmp_path / "page.txt").write_text("here")
    params["command"] = [sys.executable, "-m", "http.server", "--bind=127.0.0.1", f"--directory={tmp_path}"]
    params["port_option"] = ""

    first = ensure_program(params, run, check_mode=False)

    assert (first["changed"], first["running"]) == (True, True)
    assert first["address"] == f"http://127.0.0.1:{first['port']}/"
    with urllib.request.urlopen(first["address"] + "page.txt", timeout=60) as page:
        assert page.read() == b"here"
    assert os.getsid(first["pid"]) == first["pid"]  # it survives the end of the terminal

    again = ensure_program(params, run, check_mode=False)
    assert {**again, "diff": None} == {**first, "changed": False, "diff": None}
    assert again["diff"]["before"] == again["diff"]["after"] == first["diff"]["after"]

    stopped = ensure_program({**params, "state": "stopped"}, run, check_mode=False)
    assert (stopped["changed"], stopped["running"], stopped["pid"]) == (True, False, 0)
    assert not lives(first["pid"]) and not answers(first["port"])
    assert ensure_program({**params, "state": "stopped"}, run, check_mode=False)["changed"] is False

    restarted = ensure_program(params, run, check_mode=False)
    assert (restarted["changed"], restarted["port"]) == (True, first["port"])


def test_nobody_else_reads_what_it_keeps(params):
    log = Path(ensure_program({**params, "environment": {"WHAT": "secret"}}, run, check_mode=False)["log"])

    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in log.parent.iterdir()} == {
        "logs.json": 0o600, "logs.log": 0o600,
    }
    assert log.read_text() == f"secret {params['root']} True\n"
    assert "secret" not in log.with_suffix(".json").read_text()


@pytest.mark.parametrize("change", [
    {"command": serve("other")}, {"environment": {"WHAT": "new"}}, {"port_option": "--other"}, {"port": True},
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_other_command_environment_or_port_restarts_it(change, check_mode, params):
    first = ensure_program(params, run, check_mode=False)
    if "port" in change:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            change = {"port": listener.getsockname()[1]}

    second = ensure_program({**params, **change}, run, check_mode)

    assert second["changed"] is True
    assert second["diff"]["before"]["port"] == first["port"]
    assert second["diff"]["after"]["port"] == change.get("port", first["port"])
    assert lives(first["pid"]) is check_mode
    assert (second["pid"] == first["pid"]) is check_mode
    if not check_mode:
        assert answers(second["port"]) and second["port"] == change.get("port", first["port"])


@pytest.mark.parametrize("state, running, changed", [
    ("started", False, True), ("started", True, False), ("stopped", True, True), ("stopped", False, False),
])
def test_check_mode_only_tells(state, running, changed, params):
    found = ensure_program(params, run, check_mode=False) if running else {"pid": 0}

    told = ensure_program({**params, "state": state}, run, check_mode=True)

    assert (told["changed"], told["running"], told["pid"]) == (changed, running, found["pid"])
    assert os.path.exists(params["root"]) is running
    assert lives(found["pid"]) is running


@pytest.mark.parametrize("command, message", [
    ([sys.executable, "-S", "-c", "print('one\\n\\ntwo', flush=True); raise SystemExit('three')"],
     "^logs ended immediately: one; two; three$"),
    ([sys.executable, "-S", "-c", "pass"], "^logs ended immediately: .*logs.log is empty$"),
    (["/nowhere/program"], "^/nowhere/program: No such file or directory$"),
])
def test_program_that_does_not_start(command, message, params):
    with pytest.raises(Failed, match=message):
        ensure_program({**params, "command": command}, run, check_mode=False)


def test_program_that_never_answers_is_ended(params):
    silent = [sys.executable, "-S", "-c", "import time; print('hm', flush=True); time.sleep(600)"]

    with pytest.raises(Failed, match="did not answer on port [0-9]+ within 1 s: "):
        ensure_program({**params, "command": silent, "timeout": 1}, run, check_mode=False)

    assert not lives(json.loads(Path(params["root"], "logs.json").read_text())["pid"])


def test_program_that_has_ceased_to_answer_is_started_anew(params, monkeypatch):
    first = ensure_program(params, run, check_mode=False)
    real, looks = background_program.has_come_up, []

    def hung_at_first(*arguments):
        looks.append(arguments)
        return len(looks) > 1 and real(*arguments)

    monkeypatch.setattr(background_program, "has_come_up", hung_at_first)
    second = ensure_program(params, run, check_mode=False)

    assert second["changed"] is True and answers(second["port"])
    assert not lives(first["pid"]) and second["pid"] != first["pid"]


def test_program_that_was_killed_is_started_anew(params):
    first = ensure_program(params, run, check_mode=False)
    os.kill(first["pid"], signal.SIGKILL)
    wait_for(lambda: not lives(first["pid"]))

    second = ensure_program(params, run, check_mode=False)

    assert second["changed"] is True and second["port"] == first["port"]


@pytest.mark.parametrize("state", ["started", "stopped"])
@pytest.mark.parametrize("forged", [{"started": "1"}, {"boot": "another"}])
def test_process_that_only_has_the_pid_is_left_alone(state, forged, params):
    first = ensure_program(params, run, check_mode=False)
    record = Path(params["root"], "logs.json")
    genuine = record.read_text()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as innocent:
        innocent_time = start_time(innocent.pid)
        told = {"pid": innocent.pid, "started": innocent_time, **forged, "port": 0}
        record.write_text(json.dumps({**json.loads(genuine), **told}))

        found = ensure_program({**params, "state": state}, run, check_mode=False)

        assert found["changed"] is (state == "started")
        assert start_time(innocent.pid) == innocent_time
        ensure_program({**params, "state": "stopped"}, run, check_mode=False)
        innocent.stdin.close()
        assert innocent.wait(60) == 0
    record.write_text(genuine)
    assert lives(first["pid"])


def test_damaged_record_counts_as_none(params):
    os.mkdir(params["root"])
    for text in ("", "[]", "{}", "{"):
        Path(params["root"], "logs.json").write_text(text)
        assert ensure_program(params, run, check_mode=True)["running"] is False


def test_port_of_another_program(params):
    first = ensure_program(params, run, check_mode=False)
    ensure_program({**params, "state": "stopped"}, run, check_mode=False)
    with socket.create_server(("127.0.0.1", first["port"])):
        with pytest.raises(Failed, match=f"^port: {first['port']} cannot be used: another program uses it; give a"):
            ensure_program({**params, "port": first["port"]}, run, check_mode=False)
        other = ensure_program(params, run, check_mode=False)

    assert other["port"] not in (0, first["port"])


def test_stop_ends_what_it_has_started(params):
    first = ensure_program({**params, "command": serve("child")}, run, check_mode=False)
    child = int(Path(first["log"]).read_text().split()[0])
    assert lives(child)

    ensure_program({**params, "state": "stopped"}, run, check_mode=False)

    wait_for(lambda: not lives(child))


def test_stop_ends_one_that_does_not_want_to(params, monkeypatch):
    first = ensure_program({**params, "command": serve("stubborn")}, run, check_mode=False)
    monkeypatch.setattr(background_program, "GRACE", 0.2)

    assert ensure_program({**params, "state": "stopped"}, run, check_mode=False)["changed"] is True
    assert not lives(first["pid"])


def test_process_runs_as_long_as_a_thread_of_it_does(params):
    first = ensure_program({**params, "command": serve("headless")}, run, check_mode=False)
    wait_for(lambda: ") Z " in Path(f"/proc/{first['pid']}/stat").read_text())

    assert lives(first["pid"]) and answers(first["port"])
    assert ensure_program({**params, "state": "stopped"}, run, check_mode=False)["changed"] is True
    assert not lives(first["pid"]) and not answers(first["port"])


def test_two_runs_at_once_start_one(params):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(ensure_program(params, run, check_mode=False)))
        for _each in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(result["changed"] for result in results) == [False, True]
    assert results[0]["pid"] == results[1]["pid"]


@pytest.mark.parametrize("change, message", [
    ({"name": "../x"}, "name: '../x' is not allowed; letters, digits"), ({"name": ""}, "name: ''"),
    ({"root": "x"}, "root: 'x' is not absolute"),
    ({"port": 65536}, "port: 65536 is not a port; allowed"), ({"port": -1}, "port: -1 is not"),
    ({"port_option": "--port=1 --x"}, "port_option: '--port=1 --x' is not an option"),
    ({"command": []}, "command: '' does not begin with a program's absolute path"),
    ({"command": ["tensorboard", "--port"]}, "command: 'tensorboard --port' does not begin"),
    ({"environment": {"A=B": "c"}}, "environment: 'A=B' is not the name of a variable"),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_bad_input_is_refused(change, message, check_mode, params):
    with pytest.raises(Failed, match=f"^{message}"):
        ensure_program({**params, **change}, run, check_mode)
    assert not os.path.exists(params["root"])
