# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mounts, and the processes that serve them: read from tables, because accessing a mount may hang."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.processes import stat_fields


class Mount(NamedTuple):
    """One mount; several may be stacked at one path, the last one on top."""

    path: str
    kind: str  # for example fuse.sshfs; on macOS macfuse, for any program behind it
    source: str
    owner: str  # the user who mounted it: a number on Linux, a name on macOS; empty if unknown

    @property
    def is_sshfs(self) -> bool:
        """Return whether it is a mount of sshfs; on macOS, whether its source has the form host:folder."""
        return self.kind == "fuse.sshfs" or (self.kind in ("macfuse", "osxfuse") and ":" in self.source)


class Process(NamedTuple):
    """A running process; zombies are excluded."""

    pid: int
    uid: int
    started: str  # distinguishes it from a later one with the same PID
    stopped: bool
    arguments: list[str]  # on macOS split at all spaces, even within an argument


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse ``/proc/self/mountinfo``; see proc_pid_mountinfo(5)."""
    mounts = []
    for line in text.split("\n"):  # only there: a path may contain a carriage return
        first, separator, last = line.partition(" - ")
        fields, about = first.split(" "), last.split(" ")
        if not separator or len(fields) < 6 or len(about) < 3:
            continue
        owner = re.search(r"(?:^|,)user_id=(\d+)", about[-1])
        path, source = unescape(fields[4]), unescape(about[1])
        mounts.append(Mount(path, about[0], source, owner.group(1) if owner else ""))
    return mounts


def unescape(text: str) -> str:
    r"""Return a field of mountinfo without escapes: there a space is written ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code.group(1), 8)), text)


def parse_mount(text: str) -> list[Mount]:
    """Parse the output of macOS's program ``mount``."""
    found = (re.fullmatch(r"(.+?) on (/.*) \(([^,()]+)((?:, [^,()]+)*)\)", line) for line in text.splitlines())
    mounts = []
    for each in found:
        if each:
            owner = re.search(r", mounted by ([^,]+)", each.group(4))
            mounts.append(Mount(each.group(2), each.group(3), each.group(1), owner.group(1) if owner else ""))
    return mounts


def real_path(path: str, mounts: list[Mount]) -> str:
    """Return ``path`` without symbolic links, as in tables of mounts, without accessing mounts that may hang.

    These are all mounts of FUSE and everything below them. Raise OSError for symbolic links that form a loop.
    """
    may_hang = {mount.path for mount in mounts if "fuse" in mount.kind}
    done, rest, links = "/", os.path.normpath(path).split("/")[::-1], 0
    while rest:
        name = rest.pop()
        here = os.path.join(done, name)
        if here in may_hang:
            return os.path.normpath(os.path.join(here, *rest[::-1]))
        if name == "..":
            done = os.path.dirname(done)
        elif name not in ("", ".") and os.path.islink(here):
            links += 1
            if links > 40:
                raise OSError(f"{path}: its symbolic links lead nowhere")
            target = os.readlink(here)
            done = "/" if target.startswith("/") else done
            rest += target.split("/")[::-1]
        else:
            done = os.path.normpath(here)
    return done


def read_processes(proc: Path) -> list[Process]:
    """Return the running processes from Linux's ``/proc``; a zombie has ended and only waits for its parent."""
    processes = []
    for folder in proc.glob("[0-9]*"):
        try:
            fields = stat_fields((folder / "stat").read_bytes())
            arguments = (folder / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
            uid = folder.stat().st_uid
        except OSError:  # the process has ended
            continue
        if arguments and fields[0] not in "ZX":
            processes.append(Process(int(folder.name), uid, fields[19], fields[0] in "Tt", arguments))
    return processes


def processes_command() -> list[str]:
    """Return the call that lists processes on systems without ``/proc``."""
    return ["ps", "-axww", "-o", "pid=,uid=,stat=,lstart=,command="]


def parse_processes(text: str) -> list[Process]:
    """Parse the output of ``processes_command``."""
    processes = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 9 and "Z" not in fields[2]:
            pid, uid, state = int(fields[0]), int(fields[1]), fields[2]
            processes.append(Process(pid, uid, " ".join(fields[3:8]), "T" in state, fields[8:]))
    return processes


def users(path: str, proc: Path) -> list[str]:
    """Return the user's processes that are in ``path`` or have open files there, such as ``python3 (PID 7)``."""
    found = []
    for folder in proc.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            held = [leads_to(link) for link in [folder / "cwd", *(folder / "fd").iterdir()]]
            if any(each == path or each.startswith(f"{path}/") for each in held):
                found.append(f"{(folder / 'comm').read_text(errors='replace').strip()} (PID {folder.name})")
    return sorted(found)


def leads_to(link: Path) -> str:
    """Return the target of a link in ``/proc`` without accessing it; empty if the link is gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""
