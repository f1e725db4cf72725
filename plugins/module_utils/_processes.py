# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process is which, on Linux and macOS: a PID alone says nothing, since PIDs are used again."""

from __future__ import annotations

import os
import socket
from typing import Callable

# Starts a program that outlives the caller, in a session of its own, with its output in a file; prints its PID.
# Whether the program could be started at all is told by a pipe that a successful start closes.
DETACH = """
import os, signal, sys
log, folder, *command = sys.argv[1:]
told, telling = os.pipe()
child = os.fork()
if not child:
    try:
        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
        os.execv(command[0], command)
    except BaseException as error:
        os.write(telling, f"{command[0]}: {getattr(error, 'strerror', None) or error}".encode())
        os._exit(1)
os.close(telling)
trouble = os.read(told, 1000)
print(child) if not trouble else sys.exit(trouble.decode())
"""


def detach_command(python: str, log: str, folder: str, command: list[str]) -> list[str]:
    """Return the call that starts ``command`` in ``folder`` in the background and prints its PID."""
    return [python, "-I", "-S", "-c", DETACH, log, folder, *command]


def this_boot() -> str:
    """Return a name for the place in which a PID means something: boot and PID namespace, or the host."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as stream:
            return f"{stream.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def stat_fields(stat: bytes) -> list[str]:
    """Return what ``/proc/PID/stat`` has after the name: a process may call itself anything, parentheses included."""
    return stat.rpartition(b")")[2].decode().split()


def start_time(pid: int, run: Callable[[list[str]], str]) -> str:
    """Return when ``pid`` started, as a word to compare; nothing if it does not run.

    ``run`` takes an argument list and returns its stdout, whatever its exit code.
    """
    if not os.path.exists("/proc/self/stat"):  # macOS
        return run(["ps", "-o", "lstart=", "-p", str(pid)]).strip()
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stat_fields(stream.read())
    except OSError:
        return ""
    # A zombie has ended, as soon as its last thread has: it only waits for its parent to look.
    return "" if fields[0] in "ZX" and int(fields[17]) < 2 else fields[19]
