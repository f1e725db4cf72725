# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first processes (PID 1) of the workstation and of each host, each in its own namespaces."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import network
from daemons import Daemon
from schedulers import scheduler_of
from state import ENVIRONMENT, ClusterError, State, wait_until, write_pid_file

DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
           "fuse": (10, 229)}
# The home directories behind a file system that caches names, absent names and attributes for a minute, as NFS may, and
# asks for the content at each open.
SHARED = "/run/shared"
CACHE = "allow_other,nonempty,cache.files=off,cache.entry=60,cache.negative_entry=60,cache.attr=60"
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}


def be_workstation(state: State) -> NoReturn:
    """Own the switches and hold every host: when this process ends, the kernel ends the whole cluster."""
    os.umask(0o022)
    write_pid_file(state.pid_file)
    socket.sethostname(network.WORKSTATION)
    mount("proc", Path("/proc"))
    mount_devices(Path("/dev"))
    mount("overlay", Path("/etc"), f"lowerdir={state.workstation}/etc:/etc")
    mount_folders(state)
    network.set_up_switches()
    reap_for_ever()


def be_host(state: State, name: str) -> NoReturn:
    os.umask(0o022)
    # /proc is still the workstation's, so this pid is valid there, and process 1 is the one that holds the switches.
    write_pid_file(state.host_pid_file(name))
    socket.sethostname(name)
    network.plug_in(name, Path("/proc/1/ns/net"))
    scheduler = scheduler_of(state)
    daemons = scheduler.daemons(name, state.settings)
    logs = [(state.log / f"{name}-{daemon.name}.log").open("ab") for daemon in daemons]
    share = (state.hosts.index(name) + 1) / (len(state.hosts) + 1)

    settings = state.settings
    enter_root(mount_root(state, name, scheduler.SPOOL))
    spread_pids(share)
    if settings["cached"]:
        subprocess.run(["mergerfs", "-o", CACHE, SHARED, "/home"], check=True)
    scheduler.prepare(name, settings)
    for daemon, log in zip(daemons, logs):
        process = subprocess.Popen(
            daemon.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**ENVIRONMENT, **daemon.variables}, cwd="/", user=daemon.user, group=daemon.user, extra_groups=[],
        )
        wait_for(daemon, process)
    reap_for_ever()


def wait_for(daemon: Daemon, process: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: daemon.ready() or process.poll() is not None, 20, f"{daemon.name} does not answer")
    if process.returncode is not None:
        raise ClusterError(f"{daemon.name} ended with exit code {process.returncode}")


def mount(kind: str, target: Path, options: str = "") -> None:
    command = ["mount", "-t", kind, *(["-o", options] if options else []), kind, str(target)]
    subprocess.run(command, check=True)


def bind(source: Path, target: Path, options: str = "bind") -> None:
    subprocess.run(["mount", "-o", options, str(source), str(target)], check=True)


def mount_devices(dev: Path) -> None:
    mount("tmpfs", dev, "mode=755")
    for name, number in DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR, os.makedev(*number))
        (dev / name).chmod(0o666)
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "newinstance,ptmxmode=0666,mode=0620,gid=5")
    (dev / "shm").mkdir()
    mount("tmpfs", dev / "shm", "mode=1777")


def mount_folders(state: State) -> None:
    """Mount the ``--mount`` folders on the workstation, too; the mount points are in overlays, not on this machine."""
    points = state.workstation / "mounts"
    for _source, target in state.settings["mounts"]:
        (points / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for top in points.iterdir() if points.exists() else ():
        mount("overlay", Path("/", top.name), f"lowerdir={top}:/{top.name}")
    for source, target in state.settings["mounts"]:
        bind(Path(source), Path(target), "bind,ro")


def mount_root(state: State, name: str, spool: str) -> Path:
    """Overlay the cluster's layer on this machine's files; all that the host writes is lost when it dies."""
    base = state.root / "hosts" / name
    base.mkdir(exist_ok=True)
    mount("tmpfs", base, "mode=755")
    subprocess.run(["cp", "-a", state.layer, base / "upper"], check=True)
    (base / "upper/etc/hostname").write_text(f"{name}\n")
    (base / "work").mkdir()
    root = base / "root"
    root.mkdir()
    mount("overlay", root, f"lowerdir=/,upperdir={base}/upper,workdir={base}/work")

    mount("proc", root / "proc")
    mount("sysfs", root / "sys", "ro")
    mount_devices(root / "dev")
    for directory, mode in {"run": "755", "tmp": "1777", "root": "700"}.items():
        mount("tmpfs", root / directory, f"mode={mode}")
    (root / "run/sshd").mkdir()
    home = root / (SHARED.lstrip("/") if state.settings["cached"] else "home")
    home.mkdir(exist_ok=True)
    bind(state.home, home)
    if name == "ctl":
        bind(state.spool, root / spool.lstrip("/"))
    for source, target in state.settings["mounts"]:
        mountpoint = root / target.lstrip("/")
        mountpoint.mkdir(parents=True, exist_ok=True)
        bind(Path(source), mountpoint, "bind,ro")
    return root


def enter_root(root: Path) -> None:
    old = root / "run/old"
    old.mkdir()
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "run/old"], check=True)
    subprocess.run(["umount", "--lazy", "/run/old"], check=True)
    Path("/run/old").rmdir()


def spread_pids(share: float) -> None:
    """Start each host's pids at a different number: as on real machines, two hosts rarely share a pid."""
    last = int(Path("/proc/sys/kernel/pid_max").read_text()) * share
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(int(last)))


def reap_for_ever() -> NoReturn:
    """Tell the caller that this host is up, then reap zombies, as a first process must."""
    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})
