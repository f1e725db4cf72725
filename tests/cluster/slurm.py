# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm: its daemons on each host, its configuration, and the states of its nodes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from daemons import SSHD, Daemon, listens, render

PACKAGES = ("packages.txt",)
SPOOL = "/var/spool/slurmctld"
STATES = ["sinfo", "-h", "-N", "-o", "%N %T"]
IDLE = "idle"
SETTLE: list[list[str]] = []


def daemons(host: str) -> list[Daemon]:
    """Return the daemons in the order in which they start."""
    munged = Daemon(["munged", "--foreground"], Path("/run/munge/munge.socket.2").exists, user="munge")
    if host == "ctl":
        return [munged, Daemon(["slurmctld", "-D"], lambda: listens(6817))]
    if host == "login":
        return [munged, SSHD]
    return [munged, Daemon(["slurmd", "-D"], lambda: listens(6818))]


def write_files(layer: Path, nodes: list[str], overrides: dict[str, str]) -> None:
    """``overrides`` are lines of slurm.conf."""
    etc = layer / "etc"
    for folder in (layer / "var/spool/slurmd", layer / SPOOL.lstrip("/"), etc / "slurm"):
        folder.mkdir(parents=True)
    (etc / "slurm/slurm.conf").write_text(slurm_conf(len(nodes), overrides))
    (etc / "slurm/cgroup.conf").write_text(render("cgroup.conf"))
    (etc / "munge").mkdir(0o700)
    (etc / "munge/munge.key").write_bytes(os.urandom(128))
    (etc / "munge/munge.key").chmod(0o400)
    for path in (etc / "munge", etc / "munge/munge.key"):
        shutil.chown(path, "munge", "munge")


def slurm_conf(nodes: int, overrides: dict[str, str]) -> str:
    text = render("slurm.conf", nodes=f"c[1-{nodes}]")
    replaced = {key.lower() for key in overrides}
    kept = [line for line in text.splitlines() if line.partition("=")[0].lower() not in replaced]
    return "\n".join(kept + [f"{key}={value}" for key, value in overrides.items()]) + "\n"


def prepare(host: str) -> None:
    """Create on the host itself the files and folders that its daemons expect."""
    Path("/run/munge").mkdir()
    shutil.chown("/run/munge", "munge", "munge")


def node_states(said: str) -> dict[str, str]:
    """Return the state of each node in Slurm's wording."""
    return dict(line.split() for line in said.splitlines())
