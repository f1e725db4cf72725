# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""hpc_db.up called from a study's script, a terminal and a notebook, with real PostgreSQL and Ansible."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hpc_db
import pytest
import yaml
from hpc_db.__main__ import main as hpc_db_command
from jupyter_client.manager import start_new_kernel
from target import ROOT, Target

NAME = f"it{os.getpid()}"  # the fixture ``here`` stops the instance with this name
# Continues the code printed in docs/notebooks.md.
STUDY = """
study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=3)
print(len(study.trials))
"""
CELL = """
import hpc_db
print("found", hpc_db.up(*{inventories!r}).url)
"""
# Replaces ssh: records its pid, and keeps running.
STAYS = "#!/bin/sh\necho $$ > {folder}/pid.new && mv {folder}/pid.new {folder}/pid && exec sleep 1000\n"


@pytest.fixture(scope="module")
def inventories(here: Target, quick_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of an instance's inventories."""
    folder = tmp_path_factory.mktemp("mine")
    given = {**here.variables, **quick_settings, "instance_name": NAME}
    (folder / "hosts.yml").write_text(json.dumps({"hpc_db": {"hosts": {"localhost": given}}}))
    return ["local", str(folder)]


@pytest.fixture(scope="module")
def server(here: Target, inventories: list[str]) -> hpc_db.Server:
    return hpc_db.up(*inventories)


def test_a_study_connects_to_what_is_returned(here: Target, server: hpc_db.Server) -> None:
    assert (server.cluster, server.name, server.state) == ("localhost", NAME, "serving")
    assert server.url == f"postgresql+psycopg2:///?service={NAME}"
    assert server.urls == {"studies": server.url}
    assert server.host and server.port and server.job

    (printed,) = re.findall("^```python\n(.*?)^```", (ROOT / "docs" / "notebooks.md").read_text(), re.M | re.S)
    brought_up, found = "import hpc_db\n", 'hpc_db.up("hemera5")'
    assert brought_up in printed and found in printed
    # the cluster's user gets the URL that the workstation has found
    script = printed.replace(brought_up, "from types import SimpleNamespace\n")
    script = script.replace(found, f"SimpleNamespace(url={server.url!r})") + STUDY
    assert here.run(f"~/hpc_db/{NAME}/python/bin/python - 2>/dev/null <<'EOF'\n{script}\nEOF") == "3"


def test_second_call_takes_one_look(
    server: hpc_db.Server, inventories: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpc_db.up(*inventories, server_wait=False) == server

    said = capsys.readouterr().err
    assert "localhost: quick check\n" in said and "PostgreSQL" not in said, said


def test_status_prints_the_page(
    server: hpc_db.Server, inventories: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hpc_db", "status", *inventories])

    assert hpc_db_command() == 0

    page = capsys.readouterr().out
    assert page.startswith(f"{NAME} on localhost\n"), page
    assert re.search(rf"^  job +{server.job} RUNNING$", page, re.MULTILINE), page
    assert re.search(r"^ +(database +)?studies +\d", page, re.MULTILINE), page
    assert page.endswith(f" {server.url}\n"), page


@pytest.mark.parametrize("settings, says", [
    ({"postgres_major": "ten"}, r"localhost: .*postgres_major.*ten.*"),
    ({"databases_workers": 0}, r"localhost: databases_workers: 0 is not allowed; a number of processes, 1 or more"),
])
def test_bad_setting_raises_the_one_line(
    server: hpc_db.Server, inventories: list[str], settings: dict, says: str
) -> None:
    with pytest.raises(hpc_db.Failed) as failed:
        hpc_db.up(*inventories, **settings)

    assert re.fullmatch(says, str(failed.value)), failed.value


def test_terminal_has_one_line_that_is_rewritten(server: hpc_db.Server, inventories: list[str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hpc_db", "up", *inventories]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)

    assert running.communicate(timeout=100) == (f"{server.url}\n", None) and running.returncode == 0
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    assert re.search(r"\r\x1b\[Klocalhost: quick check: Check whether ", lines[0])
    assert [line for line in lines if "nothing changed since the last full run" in line] and len(lines) == 2, shown
    assert shown.endswith(b"\r\x1b[K")
    assert list(tmp_path.iterdir()) == []  # ansible-runner left no files


def test_notebook_has_its_progress_in_the_cell(server: hpc_db.Server, inventories: list[str]) -> None:
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=100)
    shown, streams = [], []

    def take(message: dict) -> None:
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append(message["content"]["data"]["text/plain"])
        elif message["msg_type"] == "stream":
            streams.append(message["content"]["text"])

    try:
        reply = client.execute_interactive(CELL.format(inventories=inventories), output_hook=take, timeout=200)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

    assert reply["content"]["status"] == "ok", streams
    assert "".join(streams).endswith(f"found {server.url}\n")
    assert any(line.startswith("localhost: quick check: Check whether ") for line in shown), shown
    assert (shown[0], shown[-1]) == ("", "")


def ssh_inventory(folder: Path, **variables: object) -> str:
    """Return an inventory with a host that is reached over ssh."""
    host = {"ansible_connection": "ssh", "ansible_python_interpreter": "/usr/bin/python3", **variables}
    (folder / "hosts.json").write_text(json.dumps({"hpc_db": {"hosts": {"far": host}}}))
    return str(folder / "hosts.json")


def test_interrupt_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    program = tmp_path / "ssh"
    program.write_text(STAYS.format(folder=tmp_path))
    program.chmod(0o755)
    inventory = ssh_inventory(tmp_path, ansible_ssh_executable=str(program))
    running = subprocess.Popen(
        [sys.executable, "-m", "hpc_db", "up", inventory], env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    )
    wait_for((tmp_path / "pid").exists)
    connection = int((tmp_path / "pid").read_text())
    parent = int(Path(f"/proc/{connection}/stat").read_text().rpartition(")")[2].split()[1])

    running.send_signal(signal.SIGINT)

    assert running.wait(100) == 130
    wait_for(lambda: not runs(connection) and not runs(parent))
    assert list((tmp_path / "tmp").iterdir()) == []


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Return whether a process with this pid exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give the user a password")
def test_what_ssh_asks_is_told_and_can_be_answered_before(
    here: Target, quick_settings: dict, server: hpc_db.Server, tmp_path: Path
) -> None:
    """A real ssh and a real sshd, which requires a password; then the connection that docs/notebooks.md opens."""
    user = here.variables["ansible_become_user"]
    subprocess.run(["chpasswd"], input=f"{user}:for a minute\n", text=True, check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{tmp_path}/key"], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = f"/usr/sbin/sshd -i -f /dev/null -o HostKey={tmp_path}/key -o PasswordAuthentication=yes -o UsePAM=no"
    with tempfile.TemporaryDirectory(prefix="up-") as shared:  # the path is short enough for a socket
        options = [
            "-F", "/dev/null", "-o", f"ProxyCommand={sshd}", "-o", f"UserKnownHostsFile={tmp_path}/known",
            "-o", "PubkeyAuthentication=no", "-o", f"ControlPath={shared}/%C",
        ]
        local = yaml.safe_load((ROOT / "inventories" / "local" / "group_vars" / "all.yml").read_text())
        inventory = ssh_inventory(
            tmp_path, **{**local, **quick_settings, "instance_name": NAME}, ansible_user=user,
            ansible_ssh_args="-o ControlMaster=auto -o ControlPersist=60s", ansible_ssh_common_args=shlex.join(options),
        )
        unanswered = r"far: .*{}.*; ssh cannot ask for input here: .*"
        with pytest.raises(hpc_db.Failed, match=unanswered.format("Host key verification failed")):
            hpc_db.status(inventory)
        (tmp_path / "known").write_text("far " + (tmp_path / "key.pub").read_text())
        with pytest.raises(hpc_db.Failed, match=unanswered.format(r"Permission denied \(.*password")):
            hpc_db.status(inventory)

        answer = tmp_path / "answer"
        answer.write_text("#!/bin/sh\necho for a minute\n")
        answer.chmod(0o755)
        environment = {**os.environ, "SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force"}
        keep = ["-o", "ControlMaster=auto", "-o", "ControlPersist=8h"]
        subprocess.run(["ssh", *keep, *options, f"{user}@far", "true"], env=environment, check=True, timeout=100)
        found = hpc_db.status(inventory)
        subprocess.run(["ssh", "-O", "exit", *options, f"{user}@far"], check=True, timeout=100)

    assert found == dataclasses.replace(server, cluster="far")
