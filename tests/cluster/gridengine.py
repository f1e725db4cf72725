# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Grid Engine: its daemons on each host, its configuration, and the states of its nodes."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from daemons import SSHD, Daemon, listens, render
from state import wait_until

PACKAGES = ("packages.txt", "packages-gridengine.txt")
SPOOL = "/var/spool/gridengine"
STATES = ["qhost"]
IDLE = "up"

ROOT = "/var/lib/gridengine"
PROGRAMS = "/usr/lib/gridengine"
DEFAULTS = "/usr/share/gridengine/util/resources"
PREPARED = "/etc/gridengine"
# SGE_ND keeps the daemons in the foreground.
VARIABLES = {"SGE_ROOT": ROOT, "SGE_CELL": "default", "SGE_ND": "1"}


def daemons(host: str, _settings: dict) -> list[Daemon]:
    """Return the daemons in the order in which they start."""
    if host == "ctl":
        return [Daemon([f"{PROGRAMS}/sge_qmaster"], lambda: listens(6444), variables=VARIABLES)]
    if host == "login":
        return [SSHD]
    return [Daemon([f"{PROGRAMS}/sge_execd"], lambda: listens(6445), variables=VARIABLES)]


def write_files(layer: Path, nodes: list[str], _overrides: dict[str, str], _settings: dict) -> None:
    """qmaster's database is built from these files: one folder for each kind of object."""
    common = layer / ROOT.lstrip("/") / "default/common"
    common.mkdir(parents=True)
    (common / "bootstrap").write_text(render("gridengine/bootstrap", spool=SPOOL))
    (common / "act_qmaster").write_text("ctl\n")
    (layer / SPOOL.lstrip("/")).mkdir(parents=True)
    prepared = layer / PREPARED.lstrip("/")
    for kind, names in {"adminhosts": ["ctl", *nodes], "submithosts": ["login", *nodes]}.items():
        (prepared / kind).mkdir(parents=True)
        for name in names:
            (prepared / kind / name).write_text(f"hostname {name}\n")
    (prepared / "queue").write_text(render("gridengine/queue", nodes=" ".join(nodes)))
    (prepared / "scheduler").write_text(render("gridengine/scheduler"))
    (prepared / "configuration").write_text(render("gridengine/configuration", spool=SPOOL))


def settle(_settings: dict) -> list[list[str]]:
    """Return the commands for settings that qmaster accepts only while it runs."""
    return [["qconf", "-Msconf", "/etc/gridengine/scheduler"], ["qconf", "-Aq", "/etc/gridengine/queue"]]


def prepare(host: str, _settings: dict) -> None:
    """Create on the host itself the files and folders that its daemons expect."""
    Path(SPOOL, "execd").mkdir(exist_ok=True)
    if host not in ("ctl", "login"):
        # An execd that starts before qmaster retries only after half a minute.
        wait_until(answers, 20, "qmaster does not answer")
    if host != "ctl" or Path(SPOOL, "spooldb").exists():
        return
    for folder in ("spooldb", "qmaster"):
        Path(SPOOL, folder).mkdir()
    steps = [
        ["spoolinit", "berkeleydb", "libspoolb", f"{SPOOL}/spooldb", "init"],
        ["spooldefaults", "configuration", f"{PREPARED}/configuration"],
        ["spooldefaults", "complexes", f"{DEFAULTS}/centry"],
        ["spooldefaults", "usersets", f"{DEFAULTS}/usersets"],
        ["spooldefaults", "pes", f"{DEFAULTS}/pe"],
        *(["spooldefaults", kind, f"{PREPARED}/{kind}"] for kind in ("adminhosts", "submithosts")),
        ["spooldefaults", "managers", "root"],
    ]
    for program, *arguments in steps:
        subprocess.run([f"{PROGRAMS}/{program}", *arguments], check=True, env={**os.environ, **VARIABLES})


def answers() -> bool:
    """Return whether qmaster accepts connections."""
    try:
        socket.create_connection(("ctl", 6444), timeout=2).close()
    except OSError:
        return False
    return True


def node_states(said: str) -> dict[str, str]:
    """Return whether each node reports its load."""
    rows = [line.split() for line in said.splitlines()[3:]]
    return {name: "down" if load == "-" else "up" for name, _arch, _cpus, _sockets, _cores, _threads, load, *_ in rows}
