# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state directory: the cluster's files, and the processes that are its hosts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Callable

import network

USERS = {"alice": 20001, "mallory": 20002, "bob": 20003}
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class ClusterError(Exception):
    """The text is the one-line message for the user."""


class State:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"  # shared by all hosts
        self.layer = root / "layer"  # files in which the hosts differ from this machine
        self.workstation = root / "workstation"  # the same for the workstation: its etc/ and alice's home there
        self.log = root / "log"
        self.spool = root / "spool"  # the scheduler's state: survives a reboot of ctl
        self.pid_file = root / "pid"
        self._settings = root / "settings.json"

    @property
    def settings(self) -> dict:
        return json.loads(self._settings.read_text())

    @settings.setter
    def settings(self, settings: dict) -> None:
        self._settings.write_text(json.dumps(settings))

    @property
    def hosts(self) -> list[str]:
        return network.host_names(self.settings["nodes"])

    def host_pid_file(self, host: str) -> Path:
        return self.root / "hosts" / f"{host}.pid"

    def slow_pid_file(self, host: str) -> Path:
        return self.root / "hosts" / f"{host}-slow.pid"

    def find_workstation(self) -> Path | None:
        """Return the /proc folder of the workstation's first process; the whole cluster ends with it."""
        return find_process(self.pid_file, Path("/proc"))

    def find(self, host: str) -> Path | None:
        """Return the /proc folder of the first process of ``host``."""
        workstation = self.find_workstation()
        if workstation is None or host == network.WORKSTATION:
            return workstation
        return find_process(self.host_pid_file(host), workstation / "root/proc")

    def get(self, host: str) -> Path:
        if host != network.WORKSTATION:
            self.check(host)
        process = self.find(host)
        if process is None:
            down = host if self.find_workstation() else "the cluster"
            raise ClusterError(f"{down} is not up in {self.root}")
        return process

    def check(self, host: str) -> None:
        """Raise an error unless ``host`` belongs to this cluster, dead or alive."""
        self.get(network.WORKSTATION)
        if host not in self.hosts:
            raise ClusterError(f"there is no host {host!r}, only {' '.join(self.hosts)}")

    @property
    def switches(self) -> Path:
        return self.get(network.WORKSTATION) / "ns/net"

    def log_tail(self, host: str) -> str:
        """Return the last lines of the log of ``host``."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            for log in sorted(self.log.glob(f"{host}[-.]*"))
            if log.stat().st_size
        )


def start_time(process: Path) -> str:
    """Pids are reused; a pid with its start time is unique. Empty when the process is gone or a zombie."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def write_pid_file(path: Path) -> None:
    """Record this process under its pid in the namespace of the mounted /proc."""
    process = Path("/proc/self").resolve()
    path.write_text(f"{process.name} {start_time(process)}\n")


def find_process(pid_file: Path, proc: Path) -> Path | None:
    try:
        pid, started = pid_file.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return proc / pid if start_time(proc / pid) == started else None


def wait_until(condition: Callable[[], object], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(complaint)
        time.sleep(0.02)
