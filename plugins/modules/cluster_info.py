#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_info
short_description: Read the configuration of a cluster
author: mala.hpc_db contributors (@mala-project)
description:
  - Queries Slurm for partitions, limits and accounts, and the login node for file systems and conda clients. Checks
    whether package sources can be reached, and proposes options for a job.
  - Unknown values are empty or V(null). No job is submitted. Each command, and each source, may take 15 seconds.
options:
  bin_dir:
    description: Folder of Slurm's commands. Needed if it is neither on the PATH nor on that of a login shell.
    type: path
  channels:
    description:
      - Conda channels, as for M(mala.hpc_db.conda_env). RV(sources) reports whether the login node reaches those that
        are URLs or absolute paths. A bare name is skipped, because only the package manager knows its URL.
      - By default no channel is checked.
    type: list
    elements: str
  index_url:
    description:
      - URL of the package index. RV(sources) reports whether the login node reaches it. If empty, none is checked.
    type: str
    default: ""
  wheelhouse:
    description: Folder of Python packages on the login node. If given, it is checked instead of O(index_url).
    type: str
    default: ""
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
    description: Nothing is ever changed.
  diff_mode:
    support: none
    description: Nothing is ever changed.
"""

EXAMPLES = r"""
- name: Read the cluster's configuration
  mala.hpc_db.cluster_info:
    channels: [https://mirror.example.org/conda-forge]
  register: cluster

- name: Print its partitions
  ansible.builtin.debug:
    msg: "{{ cluster.partitions | map(attribute='name') }}"
"""

RETURN = r"""
host:
  description: The login node's own host name.
  returned: success
  type: str
user:
  description: The user's name on the login node.
  returned: success
  type: str
scheduler:
  description: V(slurm). Empty if there is no C(sbatch).
  returned: success
  type: str
others:
  description: Commands of other schedulers that were found.
  returned: success
  type: list
  elements: str
bin_dir:
  description: Folder of Slurm's commands. Empty if they are on the PATH of a command over ssh.
  returned: success
  type: str
config:
  description: Selected values of C(scontrol show config).
  returned: success
  type: dict
  sample: {ClusterName: mini, SLURM_VERSION: "22.05.8"}
partitions:
  description: Partitions in Slurm's order.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the partition.
      type: str
    default:
      description: Whether it is the default partition.
      type: bool
    usable:
      description: Whether it is up and, as far as known, open to the user's accounts.
      type: bool
    limit:
      description: Maximum walltime in seconds. V(null) if unlimited.
      type: int
    walltime:
      description: Maximum walltime in Slurm's notation, or V(no limit).
      type: str
    nodes:
      description: Number of nodes.
      type: int
    cpus:
      description: Number of processors of its smallest node.
      type: int
    memory:
      description: Memory in megabytes that a job can have on its smallest node.
      type: int
    gpus:
      description: Whether its nodes have GPUs.
      type: bool
    exclusive:
      description: Whether its nodes are exclusive to a job.
      type: bool
    preempted:
      description: Whether its jobs can be preempted.
      type: bool
accounts:
  description: The user's accounts, the default first. Empty if there is no accounting.
  returned: success
  type: list
  elements: str
qos:
  description: QOS that the user may request.
  returned: success
  type: list
  elements: str
file_systems:
  description: The home directory, then the folders named by variables of a login shell.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Environment variable with its path, such as C(HOME).
      type: str
    path:
      description: Path of the folder.
      type: str
    type:
      description: Type of its file system.
      type: str
    shared:
      description: Whether it is a network file system.
      type: bool
    free:
      description: Free space in bytes.
      type: int
    quota:
      description: Quota of the user in bytes. V(null) if unknown.
      type: int
    used:
      description: Space used by the user in bytes. V(null) if no quota is known.
      type: int
mounted:
  description: Mount points of other network file systems. They are not accessed.
  returned: success
  type: list
  elements: str
clients:
  description: Paths of conda, mamba and micromamba in a login shell.
  returned: success
  type: list
  elements: str
sources:
  description: The error for each package source, by its URL or path. Empty if the login node reaches it.
  returned: success
  type: dict
proposed:
  description:
    - Proposed C(options) and C(memory) of a server job, and C(short_options) of a job of seconds in the same partition,
      on two nodes if there are two. V(false) omits an option.
    - V(null) without a usable partition.
  returned: success
  type: dict
  sample:
    options: {partition: defq, time: "2-00:00:00", mem: 16G, cpus-per-task: 4}
    memory: 16G
    short_options: {partition: defq, time: "00:03:00", mem: 512M, cpus-per-task: 1, nodes: 2, ntasks-per-node: 1}
"""

import http.client
import math
import os
import pwd
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import ConnectionError as UrlError
from ansible.module_utils.urls import open_url
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import parse_search, search_command
from ansible_collections.mala.hpc_db.plugins.module_utils._mounts import parse_mountinfo
from ansible_collections.mala.hpc_db.plugins.module_utils.host.scheduler import call
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.slurm import parse_time

# Takes an argument list; returns stdout, or an empty string if the command is missing, fails or times out.
Run = Callable[[list], str]

CLIENTS = ["micromamba", "mamba", "conda"]
OTHERS = ["qsub", "bsub", "condor_submit", "flux"]
FOLDERS = ["HOME", "PROJECT", "WORK", "WORKDIR", "SCRATCH", "PSCRATCH", "CFS", "DATA"]
SHARED = {
    "afs", "beegfs", "ceph", "dvs", "fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs",
    "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "wekafs",
}
CONFIG = ["AccountingStorageEnforce", "ClusterName", "EnforcePartLimits", "KillWait", "PreemptMode", "SLURM_VERSION"]

# Upper limits of the proposed resources, as far as the partition has them: enough for 100 workers, yet small enough for
# a short wait in the queue.
MEMORY_MB = 16384
ALONE_MB = 65536
CPUS = 4
SECONDS = 7 * 24 * 3600
# The short job checks a node, and the network to a second one.
SHORT_JOB = {"time": "00:03:00", "ntasks-per-node": 1}
SHORT_JOB_NODES = 2
SHORT_JOB_SHARE = {"mem": "512M", "cpus-per-task": 1}
# A default partition with a shorter time limit than this is meant for tests.
SHORT_SECONDS = 3600
# Timeout in seconds for each command and each source.
TIMEOUT = 15


def look(params: dict, run: Run, run_slurm: Run, fetch: Callable[[str], str]) -> dict:
    """Return the cluster's data. ``fetch`` returns why this host cannot reach a URL."""
    user = pwd.getpwuid(os.geteuid())
    folders, programs = parse_login(run(login_command()))
    sbatch = shutil.which("sbatch") or programs.get("sbatch", "")
    folder = params["bin_dir"] or ("" if shutil.which("sbatch") else os.path.dirname(sbatch))
    slurm = bool(sbatch or (folder and os.path.exists(os.path.join(folder, "sbatch"))))

    def ask(program: str, *arguments: str) -> str:
        return run_slurm([os.path.join(folder, program), *arguments]) if slurm else ""

    accounts, qos = parse_associations(
        ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user.pw_name}",
            "format=account,qos"),
        ask("sacctmgr", "--noheader", "--parsable2", "show", "user", user.pw_name, "format=defaultaccount"),
    )
    partitions = parse_partitions(
        ask("scontrol", "--oneliner", "show", "partition"),
        ask("sinfo", "--noheader", "--exact", "--format=%R|%m|%c|%G"),
        accounts,
    )
    file_systems = read_file_systems({"HOME": user.pw_dir, **folders}, user.pw_name, run)
    return {
        "changed": False,
        "host": socket.gethostname(),
        "user": user.pw_name,
        "scheduler": "slurm" if slurm else "",
        "others": [name for name in OTHERS if programs.get(name)],
        "bin_dir": folder,
        "config": parse_config(ask("scontrol", "show", "config")),
        "partitions": partitions,
        "accounts": accounts,
        "qos": qos,
        "file_systems": file_systems,
        "mounted": other_mounts(Path("/proc/self/mountinfo"), [each["path"] for each in file_systems]),
        "clients": sorted(set(parse_search(run(search_command(None, CLIENTS)), CLIENTS))),
        "sources": {
            url: fetch(url)
            for url in source_urls(params["channels"] or [], params["index_url"], params["wheelhouse"])
        },
        "proposed": propose(partitions, accounts),
    }


def login_command() -> list[str]:
    """Return the call of a login shell that prints the folders and schedulers known to it."""
    script = (
        'for name in $1; do printf "hpc_db folder %s %s\\n" "$name" "${!name}"; done; '
        'for name in $2; do printf "hpc_db program %s %s\\n" "$name" "$(type -P "$name")"; done'
    )
    return ["bash", "-lc", script, "bash", " ".join(FOLDERS), " ".join(["sbatch", *OTHERS])]


def parse_login(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return folders and programs by name; other output of the login shell is ignored."""
    found = re.findall(r"^hpc_db (folder|program) (\w+) (/.*)$", text, re.MULTILINE)
    folders, programs = ({name: path for kind, name, path in found if kind == wanted} for wanted in
                         ("folder", "program"))
    return folders, programs


def parse_config(text: str) -> dict[str, str]:
    """Return the relevant settings in the output of ``scontrol show config``."""
    found = dict(re.findall(r"^(\w+) *= (.*?) *$", text, re.MULTILINE))
    return {name: found[name] for name in CONFIG if name in found}


def parse_associations(associations: str, user: str) -> tuple[list[str], list[str]]:
    """Return the accounts, the default one first, and the QOS."""
    rows = [line.split("|") for line in associations.splitlines() if line.count("|") == 1]
    default = [line.strip() for line in user.splitlines() if line.strip()][-1:]
    accounts = sorted({account for account, _qos in rows if account})
    qos = sorted({each for _account, some in rows for each in some.split(",") if each})
    return sorted(accounts, key=lambda account: account not in default), qos


def parse_partitions(partitions: str, nodes: str, accounts: list[str]) -> list[dict]:
    """Return the partitions, each with the hardware of its smallest node."""
    hardware: dict[str, list[tuple[int, int, str]]] = {}
    for line in nodes.splitlines():
        name, *about = line.strip().split("|")
        if len(about) == 3 and about[0].rstrip("+").isdigit() and about[1].rstrip("+").isdigit():
            hardware.setdefault(name, []).append((int(about[0].rstrip("+")), int(about[1].rstrip("+")), about[2]))
    result = []
    for line in partitions.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" not in fields:  # a message printed by the site
            continue
        kinds = hardware.get(fields["PartitionName"], [])
        seconds = parse_time(fields.get("MaxTime", "")) or math.inf
        most = fields.get("MaxMemPerNode", "")
        memory = min((kind[0] for kind in kinds), default=0)
        open_to = fields.get("AllowAccounts", "ALL").split(",")
        result.append({
            "name": fields["PartitionName"],
            "default": fields.get("Default") == "YES",
            "usable": fields.get("State", "UP") == "UP" and fields.get("RootOnly") != "YES" and (
                "ALL" in open_to or not accounts or bool(set(open_to) & set(accounts))),
            "limit": None if math.isinf(seconds) else int(seconds),
            "walltime": "no limit" if math.isinf(seconds) else format_time(int(seconds)),
            "nodes": int(fields["TotalNodes"]) if fields.get("TotalNodes", "").isdigit() else 0,
            "cpus": min((kind[1] for kind in kinds), default=0),
            "memory": min(memory, int(most)) if most.isdigit() and int(most) else memory,
            "gpus": any("gpu" in kind[2] for kind in kinds),
            "exclusive": fields.get("OverSubscribe", "").startswith("EXCLUSIVE"),
            "preempted": fields.get("PreemptMode", "OFF") not in ("OFF", "DISABLED"),
        })
    return result


def source_urls(channels: list[str], index_url: str, wheelhouse: str) -> list[str]:
    """Return what has to be reached of the package sources: a file of each channel, and the wheelhouse or the index."""
    files = [f"{channel}/noarch/repodata.json" for channel in channels if re.match("[a-z]+://|/", channel)]
    # The page of a project, because an index may have no front page.
    packages = wheelhouse or (f"{index_url}/optuna/" if index_url else "")
    return [*files, packages] if packages else files


def propose(partitions: list[dict], accounts: list[str]) -> dict | None:
    """Return job options that a partition accepts. The default partition is preferred unless it is meant for tests."""
    usable = [each for each in partitions if each["usable"] and each["nodes"]]
    if not usable:
        return None

    def worth(each: dict) -> tuple:
        limit = each["limit"] or math.inf
        return not each["gpus"], each["default"] and limit > SHORT_SECONDS, not each["preempted"], min(limit, SECONDS)

    best = max(usable, key=worth)
    most = ALONE_MB if best["exclusive"] else min(MEMORY_MB, best["memory"] // 2)
    most = min(most, best["memory"])
    memory = f"{most // 1024}G" if most >= 2048 else f"{most or 1024}M"
    options: dict = {"partition": best["name"], "time": format_time(min(best["limit"] or SECONDS, SECONDS))}
    if accounts:
        options["account"] = accounts[0]
    if best["exclusive"]:
        options.update({"nodes": 1, "mem": False})
    else:
        options.update({"mem": memory, "cpus-per-task": min(CPUS, best["cpus"] or 1)})
    short = {**options, **SHORT_JOB, "nodes": min(best["nodes"], SHORT_JOB_NODES)}
    if not best["exclusive"]:
        short.update(SHORT_JOB_SHARE)
    return {"options": options, "memory": memory, "short_options": short}


def format_time(seconds: int) -> str:
    """Return a time in Slurm's format."""
    days, rest = divmod(seconds, 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def read_file_systems(folders: dict[str, str], user: str, run: Run) -> list[dict]:
    """Return the data of each folder's file system; every path appears once."""
    result: list[dict] = []
    quotas = run(["quota", "-w", "-u", user])
    for name, path in folders.items():
        if path in [each["path"] for each in result]:
            continue
        found = parse_df(run(["df", "-PTk", "--", path]))
        if found is None:
            continue
        source, kind, free, mount = found
        text = run(["lfs", "quota", "-q", "-u", user, path]) if kind == "lustre" else quotas
        used, limit = parse_quota(text, [source, mount, path])
        result.append({
            "name": name, "path": path, "type": kind, "shared": kind in SHARED, "free": free, "used": used,
            "quota": limit,
        })
    return result


def parse_df(text: str) -> tuple[str, str, int, str] | None:
    """Return source, type, free bytes and mount point of one file system."""
    found = re.search(r"^(.+?) +(\S+) +\d+ +\d+ +(-?\d+) +[\d-]+%? +(/.*)$", text, re.MULTILINE)
    return (found[1], found[2], int(found[3]) * 1024, found[4]) if found else None


def parse_quota(text: str, names: list[str]) -> tuple[int | None, int | None]:
    """Return used and allowed bytes; ``quota`` and ``lfs quota`` print them in kilobytes."""
    for line in text.splitlines():
        fields = line.split()
        numbers = [field.rstrip("*") for field in fields[1:4]]
        if fields and fields[0] in names and len(numbers) == 3 and all(number.isdigit() for number in numbers):
            used, soft, hard = (int(number) * 1024 for number in numbers)
            return (used, soft or hard) if soft or hard else (None, None)
    return None, None


def other_mounts(table: Path, known: list[str]) -> list[str]:
    """Return the mount points of network file systems that contain none of the known folders.

    With FUSE any user can mount a file system under any name, so only mounts of root and of this user count.
    """
    text = table.read_bytes().decode("utf-8", "replace") if table.exists() else ""
    found = {
        mount.path: mount.kind for mount in parse_mountinfo(text)
        if mount.kind in SHARED and ("fuse" not in mount.kind or mount.owner in ("0", str(os.geteuid())))
    }
    return [f"{path} ({kind})" for path, kind in sorted(found.items()) if not any(
        folder == path or folder.startswith(f"{path}/") for folder in known)]


def fetch_url(url: str) -> str:
    """Return why this host cannot reach a URL; empty if it can."""
    if url.startswith(("file:", "/")):
        path = re.sub("^file:/*", "/", url)
        return "" if os.path.exists(path) else f"there is no {path}"
    try:
        open_url(url, method="HEAD", timeout=TIMEOUT).close()
    except (OSError, ValueError, http.client.HTTPException, UrlError) as error:
        return " ".join(str(getattr(error, "reason", error)).split()) or error.__class__.__name__
    return ""


def main() -> None:
    """Wire the module."""
    module = AnsibleModule(
        argument_spec={
            "bin_dir": {"type": "path"},
            "channels": {"type": "list", "elements": "str"},
            "index_url": {"type": "str", "default": ""},
            "wheelhouse": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )

    def run(command: list) -> str:
        limited = ["timeout", "--kill-after=5", str(TIMEOUT), *command]
        code, stdout, _stderr = module.run_command(limited, expand_user_and_vars=False)
        return stdout if code == 0 else ""

    def run_slurm(command: list) -> str:
        try:
            done = call(command, SCHEDULERS["slurm"].environment(os.environ, ""), TIMEOUT)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    module.exit_json(**look(module.params, run, run_slurm, fetch_url))


if __name__ == "__main__":
    main()
