#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: bootstrap_server
short_description: Start a temporary PostgreSQL server unless the job's server is running
description:
  - Returns the endpoint of the server job if the scheduler reports it as running. Otherwise starts a temporary server
    on the login node, which listens only on a unix socket in a private folder and holds the instance's lease.
  - Databases can thus be created before the job is submitted, or while it waits in the queue.
author: mala.hpc_db contributors (@mala-project)
options:
  root:
    description: Path of the instance directory.
    type: path
    required: true
  state:
    description:
      - V(started) waits until a server answers.
      - V(stopped) stops the temporary server. A server job is not affected.
    type: str
    choices: [started, stopped]
    default: started
  lifetime:
    description: Seconds until the temporary server stops by itself, in case the play was interrupted.
    type: int
    default: 900
  timeout:
    description: Maximum time in seconds to wait for a server to answer or to stop.
    type: int
    default: 180
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.slices
attributes:
  check_mode:
    support: partial
    details: Starts and stops nothing in check mode. Only finds a server that is already running.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Start a temporary server unless the job's server is running
  mala.hpc_db.bootstrap_server:
    root: ~/hpc_db/hpc_db
  register: server
"""

RETURN = r"""
server:
  description: Endpoint of the server. Null if there is none, in check mode or after stopping.
  returned: success
  type: dict
  contains:
    host:
      description: Host name, or folder of a unix socket.
      type: str
    port:
      description: Port.
      type: int
    job:
      description: ID of the server job. Empty for a temporary server.
      type: str
    tls:
      description: Whether connections over the network use TLS.
      type: bool
    connect_params:
      description: Parameters of libpq that prevent a rogue server from collecting or relaying the password.
      type: dict
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import time
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _slices
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import SchedulerError, find_jobs, make_run
from ansible_collections.mala.hpc_db.plugins.module_utils.host.endpoint import read_endpoint, serving_job
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import read_settings

POLL_SECONDS = 0.1

CONNECT_SECONDS = 5

Run = Callable[[list[str]], str]
IsLive = Callable[[dict], bool]


class Failed(Exception):
    """No server is available; the message is for the user."""


def answers(server: dict) -> bool:
    """Return whether a server answers, on a socket that belongs to us: the socket file of a dead node remains."""
    try:
        if server["host"].startswith("/"):
            path = f"{server['host']}/.s.PGSQL.{server['port']}"
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(CONNECT_SECONDS)
                probe.connect(path)
            return os.stat(path).st_uid == os.geteuid()
        socket.create_connection((server["host"], server["port"]), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def find_server(root: str, is_live: IsLive) -> dict | None:
    """Return the server that answers now, or None. ``is_live`` returns whether an endpoint's job is running."""
    endpoint = read_endpoint(Layout(root))
    bootstrap = read_json(Layout(root).temporary_server)
    for said, host in ((endpoint, "host"), (bootstrap, "socket")):
        server = {"host": said[host], "port": said["port"], "job": said["job"]} if said else {}
        if said and (said is bootstrap or is_live(said)) and answers(server):
            tls = said.get("tls", True)
            return {**server, "tls": tls, "connect_params": _connection.safety(server["host"], tls)}
    return None


def ask_once(root: str, run_with: Callable[[dict], Run]) -> IsLive:
    """Return a function that asks the scheduler whether an endpoint's job is running, once per endpoint.

    ``run_with`` takes the scheduler's parameters and returns a function that runs its commands.
    """

    @functools.lru_cache
    def runs_now(job: str, _since: float) -> bool:
        settings = read_settings(root)
        where = {
            "name": settings["job_name"], "root": root, "scheduler": settings["scheduler"],
            "bin_dir": settings["bin_dir"] or None,
        }
        return serving_job({"job": job}, find_jobs(where, run_with(where))) is not None

    return lambda endpoint: runs_now(endpoint["job"], endpoint.get("since", 0))


def start_command(root: str, lifetime: int, patience: int, log: str) -> list[str]:
    """Return the call that starts a temporary server in the background; it prints its PID."""
    command = [sys.executable, "-m", "hpc_db_host", "bootstrap", f"--root={root}"]
    return [*command, f"--lifetime={lifetime}", f"--lease-patience={patience}", f"--detach={log}"]


def runs(pid: int) -> bool:
    """Return whether a process is running. A zombie does not count: it may stay for ever if nothing reaps it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not os.path.exists("/proc/self/stat") and _answers_signal(pid)


def _answers_signal(pid: int) -> bool:
    """Return whether a process exists; for macOS, which has no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ensure_started(params: dict, run: Run, is_live: IsLive) -> dict:
    """Return a server that answers; start one if needed. ``run`` takes an argument list and returns its stdout."""
    root = params["root"]
    log = Layout(root).temporary_server_log
    slice_ = _slices.Slice(params)
    limit = slice_.began + params["timeout"]
    pid = slice_.resume.get("pid", 0)
    while time.monotonic() < limit:
        server = find_server(root, is_live)
        if server:
            if pid and server["job"] and runs(pid):
                # The server job was only slow to answer: our temporary server must not wait for its lease.
                os.kill(pid, signal.SIGTERM)
            return server
        if not pid:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(log)
            pid = int(run(start_command(root, params["lifetime"], params["timeout"], log)))
        elif not runs(pid):
            raise Failed(f"the temporary server did not start: {last_words(log)}")
        slice_.check(f"the temporary server: {last_line(log)}, {params['timeout']} s are allowed", pid=pid)
        time.sleep(POLL_SECONDS)
    if pid and runs(pid):
        os.kill(pid, signal.SIGTERM)
    raise Failed(f"no server answered within {params['timeout']} s: {last_words(log)}")


def last_line(log: str) -> str:
    """Return the last complete line of the log, without its time."""
    try:
        with open(log, encoding="utf-8", errors="replace") as stream:
            lines = stream.read().split("\n")[:-1] or ["starting"]
    except FileNotFoundError:
        return "starting"
    return lines[-1].partition(" starting: ")[2] or lines[-1]


def last_words(log: str) -> str:
    """Return in one line why the program ended, with PostgreSQL's messages."""
    with open(log, encoding="utf-8", errors="replace") as stream:
        lines = [line.strip() for line in stream]
    told = [line for line in lines if "FATAL" in line or "LOG:  could not" in line or "hba" in line] + lines[-1:]
    return "; ".join(dict.fromkeys(told)) or f"see {log}"


def ensure_stopped(params: dict) -> bool:
    """Stop the temporary server; return whether there was one."""
    path = Layout(params["root"]).temporary_server
    said = read_json(path)
    if not said or said["host"] != socket.gethostname() or not answers({"host": said["socket"], "port": said["port"]}):
        return False
    slice_ = _slices.Slice(params)
    if not slice_.resume:
        os.kill(said["pid"], signal.SIGTERM)
    limit = slice_.began + params["timeout"]
    while os.path.exists(path) or answers({"host": said["socket"], "port": said["port"]}):
        if time.monotonic() > limit:
            raise Failed(f"the temporary server (PID {said['pid']}) has not stopped within {params['timeout']} s")
        slice_.check(f"the temporary server (PID {said['pid']}) stops", pid=said["pid"])
        time.sleep(POLL_SECONDS)
    return True


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "lifetime": {"type": "int", "default": 900},
            "timeout": {"type": "int", "default": 180},
            **_slices.OPTIONS,
        },
        supports_check_mode=True,
    )
    if not os.path.isabs(module.params["root"]):
        module.fail_json(msg=f"root: {module.params['root']!r} is not absolute")
    os.umask(0o077)
    server = None

    def run(command: list[str]) -> str:
        returncode, stdout, stderr = module.run_command(
            command, cwd=Layout(module.params["root"]).host, ignore_invalid_cwd=False,
            expand_user_and_vars=False,
        )
        if returncode:
            raise Failed(f"the temporary server did not start: {' '.join(stderr.split())}")
        return stdout

    is_live = ask_once(module.params["root"], lambda where: make_run(module, where))
    try:
        if module.check_mode:
            server = find_server(module.params["root"], is_live)
        elif module.params["state"] == "started":
            server = ensure_started(module.params, run, is_live)
        else:
            ensure_stopped(module.params)
    except _slices.Waiting as waiting:
        module.exit_json(server=None, **waiting.result())
    except (Failed, OSError, SchedulerError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    # A server that is started and stopped within the play is no change.
    module.exit_json(changed=False, server=server)


if __name__ == "__main__":
    main()
