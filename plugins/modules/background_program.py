#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: background_program
short_description: Run a program in the background that listens on a local port
author: mala.hpc_db contributors (@mala-project)
description:
  - Starts a program that continues after the playbook has ended, and waits until it answers on its port of 127.0.0.1.
  - The program is identified by its PID and start time, never by its name. It is restarted if its command, its
    environment or its port has changed, or if it no longer answers.
  - For a user's own programs on the workstation, on Linux or macOS. After a reboot the program is not running until
    the next run of the playbook.
  - Fails with the last lines of the program's log if the program ends at its start or does not answer in time.
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    description: Shows the command and the port, but not the environment.
extends_documentation_fragment:
  - mala.hpc_db.attributes
options:
  name:
    description: Base name of its files. A letter or digit, followed by letters, digits, C(.), C(_) and C(-).
    type: str
    required: true
  root:
    description:
      - Absolute path of the folder for I(name)C(.json), the record of the process, and I(name)C(.log), its output since
        its start. It is created if needed, and only this user can enter it.
      - It is also the working directory of the program.
    type: path
    required: true
  command:
    description:
      - Absolute path of the program, and its arguments. They are not passed through a shell. All users of this machine
        can see them, so they must not contain passwords.
      - The program must stay in the foreground. Required for O(state=started).
    type: list
    elements: str
  environment:
    description:
      - Environment variables in addition to those of the playbook's run.
      - Pass the path of a password file instead of a password, because Ansible shows these values with C(-vvv).
    type: dict
    default: {}
  port:
    description:
      - Port of 127.0.0.1 that the program listens on.
      - V(0) uses the port of the last run if that is free, so that bookmarks stay valid, else any free port.
    type: int
    default: 0
  port_option:
    description:
      - Command line option for the port. V(--port) appends C(--port=N) to O(command). An empty option appends only the
        number.
    type: str
    default: --port
  state:
    description:
      - V(started) ensures that it runs and answers.
      - V(stopped) ends the program and its process group. They are killed if they do not end within 10 seconds.
    type: str
    choices: [started, stopped]
    default: started
  timeout:
    description: Maximum time in seconds until the program answers.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Ensure a web server for the logs is running
  mala.hpc_db.background_program:
    name: logs
    root: ~/.local/share/logs
    command: [/usr/bin/python3, -m, http.server, --bind=127.0.0.1, --directory=/home/alice/logs]
    port_option: ""
  register: logs

- name: Stop it
  mala.hpc_db.background_program:
    name: logs
    root: ~/.local/share/logs
    state: stopped
"""

RETURN = r"""
running:
  description: Whether the program is running at the end. In check mode, whether it is running now.
  returned: success
  type: bool
pid:
  description: PID of the program. V(0) if it is not running.
  returned: success
  type: int
port:
  description: Port of the program, or its last port. V(0) if none was chosen yet.
  returned: success
  type: int
address:
  description: URL for a browser. Empty if no port was chosen yet.
  returned: success
  type: str
  sample: http://127.0.0.1:6006/
log:
  description: File with its output.
  returned: success
  type: str
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._marker import alone_at
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json, write_json
from ansible_collections.mala.hpc_db.plugins.module_utils.host.processes import start_time, this_host

HERE = "127.0.0.1"
POLL_SECONDS = 0.05
# Seconds to wait for the program to end after SIGTERM, and after SIGKILL.
GRACE = 10
DEATH = 10
RECORDED = {"pid", "started", "boot", "port", "command", "environment"}

# Starts a program that outlives the caller, in its own session and with its output in a file; prints its PID. A failure
# to start is reported through a pipe, which a successful start closes.
DETACH = """
import os, signal, sys
log, folder, *command = sys.argv[1:]
told, telling = os.pipe()
child = os.fork()
if not child:
    try:
        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
        os.execv(command[0], command)
    except BaseException as error:
        os.write(telling, f"{command[0]}: {getattr(error, 'strerror', None) or error}".encode())
        os._exit(1)
os.close(telling)
trouble = os.read(told, 1000)
if trouble:
    raise SystemExit(trouble.decode())
print(child)
"""

Run = Callable[..., str]


class Failed(Exception):
    """The program cannot be started or ended; the message is for the user."""


def check_params(params: dict) -> None:
    """Refuse invalid parameters."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", params["name"]):
        raise Failed(
            f"name: {params['name']!r} is not allowed; letters, digits, '.', '_' and '-', a letter or digit first"
        )
    if not os.path.isabs(params["root"]):
        raise Failed(f"root: {params['root']!r} is not absolute; give a path that begins with / or ~")
    if not 0 <= params["port"] <= 65535:
        raise Failed(f"port: {params['port']} is not a port; allowed are 1 to 65535, and 0 for any free one")
    if not re.fullmatch(r"(--?[A-Za-z][A-Za-z0-9_-]*)?", params["port_option"]):
        raise Failed(f"port_option: {params['port_option']!r} is not an option such as --port")
    for name in params["environment"]:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Failed(f"environment: {name!r} is not the name of a variable; allowed are letters, digits and _")
    command = params["command"] or []
    if params["state"] == "started" and not (command and os.path.isabs(command[0])):
        raise Failed(f"command: {' '.join(command)!r} does not begin with a program's absolute path")


def paths(params: dict) -> tuple[Path, Path]:
    """Return the paths of the record and of the log."""
    root = Path(params["root"])
    return root / f"{params['name']}.json", root / f"{params['name']}.log"


def read_record(path: Path) -> dict:
    """Return the record of the last run; empty if there is none or it cannot be read."""
    record = read_json(str(path)) or {}
    return record if RECORDED <= set(record) else {}


def runs(record: dict) -> bool:
    """Return whether the recorded process is still the one that was started."""
    here = record.get("boot") == this_host()
    return here and bool(record["started"]) and start_time(record["pid"]) == record["started"]


def answers(port: int) -> bool:
    """Return whether a program listens on the port."""
    try:
        socket.create_connection((HERE, port), timeout=1).close()
    except OSError:
        return False
    return True


def why_not_free(port: int) -> str:
    """Return why a program cannot use the port; empty if it can. Port 0 stands for any free port."""
    if port and answers(port):
        return "another program uses it"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, to reuse a recent port
        try:
            probe.bind((HERE, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def choose_port(wanted: int, last: int) -> int:
    """Return the wanted port. For 0, return the last port if it is free, otherwise any free port."""
    trouble = why_not_free(wanted)
    if trouble:
        raise Failed(f"port: {wanted} cannot be used: {trouble}; give a free one, or 0 for any")
    if wanted or (last and not why_not_free(last)):
        return wanted or last
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        return probe.getsockname()[1]


def whole_command(params: dict, port: int) -> list[str]:
    """Return the command with its port option."""
    return [*params["command"], f"{params['port_option']}={port}".lstrip("=")]


def digest_of(environment: dict) -> str:
    """Return a hash of the environment, which hides its values."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()


def is_wanted(params: dict, record: dict) -> bool:
    """Return whether the recorded process was started with the command and environment wanted now."""
    port = params["port"] or record["port"]
    wanted = whole_command(params, port), digest_of(params["environment"])
    return wanted == (record["command"], record["environment"])


def has_come_up(record: dict, timeout: int) -> bool:
    """Wait until the process answers; return whether it did so in time and before it ended."""
    deadline = time.monotonic() + timeout
    while runs(record):
        if answers(record["port"]):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return False


def detach_command(python: str, log: str, folder: str, command: list[str]) -> list[str]:
    """Return the call that starts ``command`` in ``folder`` in the background and prints its PID."""
    return [python, "-I", "-S", "-c", DETACH, log, folder, *command]


def start(params: dict, last_port: int, run: Run) -> dict:
    """Start the program, wait until it answers, and return its record."""
    path, log = paths(params)
    port = choose_port(params["port"], last_port)
    command = whole_command(params, port)
    pid = int(run(detach_command(sys.executable, str(log), params["root"], command), params["environment"]))
    record = {
        "pid": pid, "started": start_time(pid) or "", "boot": this_host(), "port": port, "command": command,
        "environment": digest_of(params["environment"]),
    }
    # Before the wait: if the wait is interrupted, the next run continues with this process.
    write_json(str(path), record)
    if not has_come_up(record, params["timeout"]):
        alive = runs(record)
        end(record)
        reason = f"did not answer on port {port} within {params['timeout']} s" if alive else "ended immediately"
        raise Failed(f"{params['name']} {reason}: {last_words(log)}")
    return record


def end(record: dict) -> None:
    """End the process and the rest of its process group."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, DEATH)):
        # Child processes may outlive the process. As long as one does, the kernel does not reuse the group's number.
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for zombies
            os.killpg(record["pid"], sign)
        deadline = time.monotonic() + patience
        while runs(record) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    if runs(record):
        raise Failed(f"PID {record['pid']} does not end, even after SIGKILL; it may be waiting for a disk or a mount")


def last_words(log: Path) -> str:
    """Return the end of the log in one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return "; ".join([line for line in lines if line][-5:]) or f"{log} is empty"


def act(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the program to the wanted state."""
    path, log = paths(params)
    record = read_record(path)
    running = bool(record) and runs(record)
    wanted = params["state"] == "started"
    good = running and wanted and is_wanted(params, record)
    if good and not check_mode:
        good = has_come_up(record, params["timeout"])
    changed = not good if wanted else running
    before = shown(record) if running else {}
    after: dict = {}
    if wanted:
        port = params["port"] or record.get("port", 0)
        after = {"command": whole_command(params, port)[:-1], "port": port}
    if changed and not check_mode:
        if running:
            end(record)
        record = start(params, record.get("port", 0), run) if wanted else record
        running = wanted
        after = shown(record) if wanted else {}
    port = record.get("port", 0)
    return {
        "changed": changed, "running": running, "pid": record["pid"] if running else 0, "port": port,
        "address": f"http://{HERE}:{port}/" if port else "", "log": str(log),
        "diff": {"before": before, "after": after},
    }


def shown(record: dict) -> dict:
    """Return the part of a record that the diff shows."""
    return {"command": record["command"][:-1], "port": record["port"]}


def ensure_program(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the program to the wanted state; only one run at a time does so.

    ``run`` takes an argument list and additional environment variables, and returns stdout.
    """
    check_params(params)
    path = paths(params)[0]
    if check_mode or (params["state"] == "stopped" and not path.exists()):
        return act(params, run, check_mode)
    os.makedirs(params["root"], 0o700, exist_ok=True)
    os.chmod(params["root"], 0o700)
    with alone_at(path.with_suffix(".lock"), params["timeout"] + 2 * (GRACE + DEATH), "root", params):
        return act(params, run, check_mode)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "command": {"type": "list", "elements": "str"},
            "environment": {"type": "dict", "default": {}},
            "port": {"type": "int", "default": 0},
            "port_option": {"type": "str", "default": "--port"},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "timeout": {"type": "int", "default": 60},
        },
        required_if=[("state", "started", ["command"])],
        supports_check_mode=True,
    )
    os.umask(0o077)

    def run(command: list[str], environment: dict | None = None) -> str:
        variables = {name: str(value) for name, value in (environment or {}).items()}
        rc, stdout, stderr = module.run_command(
            command, environ_update=variables, expand_user_and_vars=False, handle_exceptions=False
        )
        if rc and stderr.strip():
            raise Failed(f"{module.params['name']} cannot be started: {stderr.strip()}")
        return stdout

    try:
        result = ensure_program(module.params, run, module.check_mode)
    except (Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
