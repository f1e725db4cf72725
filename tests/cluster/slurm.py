# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on which host, and how it is configured."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Callable, NamedTuple

TEMPLATES = Path(__file__).resolve().parent / "templates"


class Daemon(NamedTuple):
    command: list[str]
    ready: Callable[[], bool]
    user: str = "root"

    @property
    def name(self) -> str:
        return Path(self.command[0]).name


def listens(port: int) -> bool:
    """Look without connecting: Slurm logs an error for each caller that says nothing."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in sockets)


def daemons(host: str) -> list[Daemon]:
    """In the order in which they start."""
    munged = Daemon(["munged", "--foreground"], Path("/run/munge/munge.socket.2").exists, user="munge")
    if host == "ctl":
        return [munged, Daemon(["slurmctld", "-D"], lambda: listens(6817))]
    if host == "login":
        return [munged, Daemon(["/usr/sbin/sshd", "-D", "-e"], lambda: listens(22))]
    return [munged, Daemon(["slurmd", "-D"], lambda: listens(6818))]


def slurm_conf(nodes: int, overrides: dict[str, str]) -> str:
    text = render("slurm.conf", nodes=f"c[1-{nodes}]")
    replaced = {key.lower() for key in overrides}
    kept = [line for line in text.splitlines() if line.partition("=")[0].lower() not in replaced]
    return "\n".join(kept + [f"{key}={value}" for key, value in overrides.items()]) + "\n"


def render(template: str, **values: str) -> str:
    return Template((TEMPLATES / template).read_text()).substitute(values)
