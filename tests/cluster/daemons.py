# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemons that every host runs with any scheduler, and rendering of configuration templates."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Callable, NamedTuple

TEMPLATES = Path(__file__).resolve().parent / "templates"


class Daemon(NamedTuple):
    command: list[str]
    ready: Callable[[], bool]
    user: str = "root"
    variables: dict[str, str] = {}

    @property
    def name(self) -> str:
        return Path(self.command[0]).name


def listens(port: int) -> bool:
    """Check without connecting: a daemon may log an error for each connection that sends nothing."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in sockets)


def render(template: str, **values: str) -> str:
    return Template((TEMPLATES / template).read_text()).substitute(values)


SSHD = Daemon(["/usr/sbin/sshd", "-D", "-e"], lambda: listens(22))
