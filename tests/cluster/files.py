# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Contents of the state directory before anything runs: the hosts' files in /etc, keys and home directories."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import network
from daemons import render
from schedulers import scheduler_of
from state import USERS, State


def write_files(state: State, overrides: dict[str, str], program: Path) -> None:
    """``overrides`` are scheduler settings; ``program`` is the command that ssh calls to reach the login node."""
    etc = state.layer / "etc"
    for directory in (etc, state.home, state.workstation / "etc", state.log, state.spool, state.root / "hosts"):
        directory.mkdir(parents=True)
    state.log.chmod(0o700)
    (state.workstation / "tmp").mkdir()
    (state.workstation / "tmp").chmod(0o1777)
    nodes = network.node_names(state.settings["nodes"])
    scheduler_of(state).write_files(state.layer, nodes, overrides, state.settings)
    for folder, homes in ((etc, Path("/home")), (state.workstation / "etc", state.workstation)):
        write_users(folder, homes)
        (folder / "hosts").write_text(network.hosts_file(state.hosts, campus=folder != etc))
        (folder / "resolv.conf").write_text("")
    write_ssh(state, etc / "ssh", program)


def write_users(etc: Path, homes: Path) -> None:
    """Add the test cluster's users to this machine's."""
    added = {
        "passwd": [f"{user}:x:{uid}:{uid}::{homes / user}:/bin/bash" for user, uid in USERS.items()],
        "shadow": [f"{user}:*:19000:0:99999:7:::" for user in USERS],
        "group": [f"{user}:x:{uid}:" for user, uid in USERS.items()],
    }
    for name, lines in added.items():
        there = Path("/etc", name).read_text().splitlines()
        others = [line for line in there if line.partition(":")[0] not in USERS]
        (etc / name).touch(0o600 if name == "shadow" else 0o644)
        (etc / name).write_text("\n".join(others + lines) + "\n")


def write_ssh(state: State, etc_ssh: Path, program: Path) -> None:
    """Each user gets a home on the cluster and one on the workstation; alice also gets an ssh key for the cluster."""
    etc_ssh.mkdir()
    (etc_ssh / "sshd_config").write_text(render("sshd_config"))
    user_key, host_key = state.root / "id_ed25519", etc_ssh / "ssh_host_ed25519_key"
    for key in (user_key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    known_hosts = state.root / "known_hosts"
    known_hosts.write_text(f"login {host_key.with_suffix('.pub').read_text()}")
    ssh_config = render("ssh_config", state=str(state.root), cluster=shlex.quote(str(program)))
    (state.root / "ssh_config").write_text(ssh_config)

    folders = (state.home, state.workstation)
    homes = [(folder / user, uid) for folder in folders for user, uid in USERS.items()]
    for home, _ in homes:
        (home / ".ssh").mkdir(parents=True)
    shutil.copy(user_key.with_suffix(".pub"), state.home / "alice/.ssh/authorized_keys")
    for file in (user_key, known_hosts):
        shutil.copy(file, state.workstation / "alice/.ssh")
    for home, uid in homes:
        for path in (home, home / ".ssh", *(home / ".ssh").iterdir()):
            os.chown(path, uid, uid)
            path.chmod(0o700 if path.is_dir() else 0o600)
