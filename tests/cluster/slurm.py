# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm: its daemons on each host, its configuration, and the states of its nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from daemons import SSHD, Daemon, listens, render

PACKAGES = ("packages.txt", "packages-accounting.txt")
SPOOL = "/var/spool/slurmctld"
STATES = ["sinfo", "-h", "-N", "-o", "%N %T"]
IDLE = "idle"
USED = ("allocated", "completing")
BACKLOG = Path(__file__).resolve().parent / "backlog.py"
# Accounts, users and QOS of a cluster with accounting. In the QOS single, a user may run one job.
ACCOUNTS = [
    ["add", "account", "k80", "physics"],
    ["add", "user", "alice,bob,mallory", "account=k80", "defaultaccount=k80"],
    ["add", "qos", "single", "set", "MaxJobsPerUser=1"], ["add", "qos", "few", "set", "MaxSubmitJobsPerUser=1"],
    ["modify", "user", "alice,bob,mallory", "set", "qos=normal,single,few", "defaultqos=normal"],
]
ACCOUNTING = {
    "AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": "ctl",
    "AccountingStorageEnforce": "associations,limits,qos",
}
# MariaDB stores the accounting; root logs in over the socket.
DATABASE_SOCKET = Path("/run/mysqld/mysqld.sock")
DATABASE_FOLDER = "/var/lib/accounting"
DATABASE = [
    "/usr/sbin/mariadbd", "--no-defaults", "--user=root", f"--datadir={DATABASE_FOLDER}",
    f"--socket={DATABASE_SOCKET}", "--skip-networking", "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M",
]
# Priority by age, which counts for the first minute; of jobs with the same priority, the one submitted first begins.
BUSY = {
    "PriorityType": "priority/multifactor", "PriorityWeightAge": "1000", "PriorityMaxAge": "00:01:00",
    "PriorityCalcPeriod": "1",
}


def daemons(host: str, settings: dict) -> list[Daemon]:
    """Return the daemons in the order in which they start; the last one fills the queue of a busy cluster."""
    munged = Daemon(["munged", "--foreground"], Path("/run/munge/munge.socket.2").exists, user="munge")
    if host == "ctl":
        found = [munged]
        if settings["accounting"]:
            found += [Daemon(DATABASE, DATABASE_SOCKET.exists),
                      Daemon(["slurmdbd", "-D"], lambda: listens(6819))]
        found.append(Daemon(["slurmctld", "-D"], lambda: listens(6817)))
        if settings["busy"]:
            found.append(Daemon([str(BACKLOG), str(settings["busy"])], lambda: True, user="bob"))
        return found
    if host == "login":
        return [munged, SSHD]
    return [munged, Daemon(["slurmd", "-D"], lambda: listens(6818))]


def write_files(layer: Path, nodes: list[str], overrides: dict[str, str], settings: dict) -> None:
    """``overrides`` are lines of slurm.conf."""
    etc = layer / "etc"
    for folder in (layer / "var/spool/slurmd", layer / SPOOL.lstrip("/"), etc / "slurm"):
        folder.mkdir(parents=True)
    (etc / "slurm/slurm.conf").write_text(slurm_conf(len(nodes), overrides, settings))
    if settings["accounting"]:
        (etc / "slurm/slurmdbd.conf").write_text(render("slurmdbd.conf"))
        (etc / "slurm/slurmdbd.conf").chmod(0o600)
    (etc / "slurm/cgroup.conf").write_text(render("cgroup.conf"))
    (etc / "munge").mkdir(0o700)
    (etc / "munge/munge.key").write_bytes(os.urandom(128))
    (etc / "munge/munge.key").chmod(0o400)
    for path in (etc / "munge", etc / "munge/munge.key"):
        shutil.chown(path, "munge", "munge")


def slurm_conf(nodes: int, overrides: dict[str, str], settings: dict) -> str:
    text = render("slurm.conf", nodes=f"c[1-{nodes}]")
    if settings["accounting"]:
        overrides = {**ACCOUNTING, **overrides}
    if settings["busy"]:
        overrides = {**BUSY, **overrides}
        text = text.replace("PartitionName=work", "PartitionName=work OverSubscribe=EXCLUSIVE")
    replaced = {key.lower() for key in overrides}
    kept = [line for line in text.splitlines() if line.partition("=")[0].lower() not in replaced]
    return "\n".join(kept + [f"{key}={value}" for key, value in overrides.items()]) + "\n"


def settle(settings: dict) -> list[list[str]]:
    """Return the commands that complete the configuration, on ctl, once the daemons run."""
    return [["sacctmgr", "--immediate", "--quiet", *command] for command in ACCOUNTS if settings["accounting"]]


def prepare(host: str, settings: dict) -> None:
    """Create on the host itself the files and folders that its daemons expect."""
    if host == "ctl" and settings["accounting"]:
        DATABASE_SOCKET.parent.mkdir()
        subprocess.run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={DATABASE_FOLDER}",
                        "--skip-test-db", "--auth-root-authentication-method=socket"],
                       stdout=subprocess.DEVNULL, check=True)
    Path("/run/munge").mkdir()
    shutil.chown("/run/munge", "munge", "munge")


def node_states(said: str) -> dict[str, str]:
    """Return the state of each node in Slurm's wording."""
    return dict(line.split() for line in said.splitlines())
