# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process is which: a PID alone says nothing, since PIDs are used again."""

import os
import socket
import subprocess
from typing import Optional


def start_time(pid: int) -> Optional[str]:
    """Return when ``pid`` started, as a word to compare; None if it does not run."""
    if not os.path.exists("/proc/self/stat"):  # macOS
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], stdout=subprocess.PIPE, check=False)
        return found.stdout.decode().strip() or None
    try:
        with open("/proc/%d/stat" % pid, "rb") as stream:  # a process may call itself anything
            fields = stream.read().rpartition(b")")[2].decode().split()
    except OSError:
        return None
    # A zombie has ended: it only waits for its parent to look.
    return None if fields[0] in "ZX" else fields[19]


def this_host() -> str:
    """Return a name for the place in which a PID of ours means something: boot and PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            boot = stream.read().strip()
        return "%s %s" % (boot, os.readlink("/proc/self/ns/pid"))
    except OSError:
        return socket.gethostname()


def runs_in(pid: int, program: str, folder: str) -> bool:
    """Tell whether ``pid`` is the program of that name with ``folder`` as its working directory."""
    try:
        executable = os.path.basename(os.readlink("/proc/%d/exe" % pid)).split(" ")[0]
        return executable == program and os.path.samefile("/proc/%d/cwd" % pid, folder)
    except OSError:
        return False
