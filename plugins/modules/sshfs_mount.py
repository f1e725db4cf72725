#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: sshfs_mount
short_description: Mount a folder of a cluster on the workstation with sshfs
description:
  - Mounts a folder of another host with sshfs, only for the user who runs the module, and without root.
  - The mount recovers by itself after a network failure. During the failure, programs that use it do not hang but get
    an error after at most O(alive_interval) times (O(alive_count) + 1) + O(connect_timeout) seconds, which is 14 s by
    default.
  - A mount is replaced if its sshfs was killed, if it hangs, if it is stacked on another mount, or if its options
    differ. Its state is read from the tables of mounts and processes without accessing it. Only a mount with matching
    options is accessed, by a separate process, which may be left behind if the mount hangs.
  - A folder that is not empty, and a mount of another type or another user, is refused, because the mount would hide
    it. The module removes the mount point, and parent folders that it has created, after unmounting.
  - ssh never prompts for passwords, and refuses hosts with an unknown or changed key, regardless of its configuration.
    All other settings are taken from C(~/.ssh/config).
  - Values are used literally or refused. No part of a value can become another option or a command.
author: mala.hpc_db contributors (@mala-project)
options:
  path:
    description: Mount point. It is created with mode 0700 if needed. A leading C(~) is the user's home directory.
    type: path
    required: true
  state:
    description:
      - V(mounted) mounts the folder unless it is mounted.
      - V(unmounted) unmounts any sshfs mount at this path.
      - V(remounted) unmounts and mounts again.
    type: str
    choices: [mounted, unmounted, remounted]
    default: mounted
  host:
    description:
      - Name or address of the host, or a host alias in C(~/.ssh/config). Corresponds to C(ansible_host).
      - Required unless O(state=unmounted).
    type: str
  folder:
    description: Folder on the host. A relative path starts at the home directory.
    type: str
    default: "."
  user:
    description: User on the host. Corresponds to C(ansible_user). The default is that of ssh.
    type: str
  port:
    description: Port of sshd on the host. Corresponds to C(ansible_port). The default is that of ssh.
    type: int
  identity_file:
    description: Private key. Corresponds to C(ansible_ssh_private_key_file). The default is that of ssh.
    type: path
  ssh_config:
    description: Configuration file to use instead of C(~/.ssh/config).
    type: path
  proxy_jump:
    description: Jump hosts in order, each as C([user@]host[:port]).
    type: list
    elements: str
    default: []
  ssh_arguments:
    description:
      - Additional ssh arguments in one line, as in C(ansible_ssh_common_args). The options above take precedence.
      - Supported are C(-F), C(-J), C(-i), C(-l), C(-p), C(-4), C(-6), C(-C), and C(-o) with C(AddressFamily),
        C(CertificateFile), C(Compression), C(GlobalKnownHostsFile), C(GSSAPIAuthentication),
        C(GSSAPIDelegateCredentials), C(HostKeyAlias), C(HostName), C(IdentitiesOnly), C(IdentityAgent),
        C(IdentityFile), C(Port), C(PreferredAuthentications), C(ProxyJump), C(PubkeyAuthentication), C(User) and
        C(UserKnownHostsFile).
      - Arguments that the mount sets itself, such as C(ServerAliveInterval) and C(StrictHostKeyChecking), and arguments
        without a use here, such as C(ControlPath) and C(-A), are ignored.
      - All others, including C(ProxyCommand), are refused. C(ProxyCommand) is allowed in O(ssh_config).
    type: str
    default: ""
  share_connection:
    description:
      - Let ssh use an existing shared connection (C(ControlMaster) in its configuration), for example where each login
        needs a one-time password.
      - The mount then hangs and ends together with that connection.
    type: bool
    default: false
  read_only:
    description: Mount the folder read-only.
    type: bool
    default: true
  idmap:
    description: V(user) maps the remote user's files to the local user. V(none) keeps the numeric IDs.
    type: str
    choices: [user, none]
    default: user
  options:
    description:
      - Additional sshfs options. Supported are C(auto_cache), C(follow_symlinks), C(noexec) and C(transform_symlinks)
        (true or false), C(compression) and C(dir_cache) (yes or no), and C(dcache_timeout) in seconds.
    type: dict
    default: {}
  alive_interval:
    description: Seconds of silence after which ssh checks whether the host is alive.
    type: int
    default: 3
  alive_count:
    description: Number of unanswered checks in a row after which the connection is closed.
    type: int
    default: 2
  connect_timeout:
    description: Timeout in seconds for each connection attempt.
    type: int
    default: 5
  timeout:
    description: Timeout in seconds for mounting.
    type: int
    default: 30
  force:
    description:
      - Unmount even while programs use the mount. They lose access to their open files.
      - A mount that hangs is always unmounted.
    type: bool
    default: false
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
requirements:
  - sshfs 2.10 or newer (tested with 3.7.3), and FUSE
"""

EXAMPLES = r"""
- name: Mount the logs of the cluster
  mala.hpc_db.sshfs_mount:
    path: ~/hemera5/logs
    host: hemera5.fz-rossendorf.de
    user: alice
    folder: mala/logs
  delegate_to: localhost

- name: Mount the logs through a gateway with the inventory's settings
  mala.hpc_db.sshfs_mount:
    path: ~/hemera5/logs
    host: "{{ ansible_host | default(inventory_hostname) }}"
    folder: mala/logs
    ssh_arguments: "{{ ansible_ssh_common_args | default('') }}"  # such as -J alice@gate.example.org
  delegate_to: localhost

- name: Unmount the logs
  mala.hpc_db.sshfs_mount:
    path: ~/hemera5/logs
    state: unmounted
  delegate_to: localhost
"""

RETURN = r"""
mount_point:
  description: Mount point with symbolic links resolved, as in the table of mounts.
  returned: success
  type: str
source:
  description: Source that is, or would be, mounted. Null if nothing is.
  returned: success
  type: str
found:
  description:
    - Previous state. V(none), V(mounted) as wanted, V(other) for a mount of another source or with other options,
      V(dead) for a mount without its sshfs, V(hung), V(stacked) for several mounts, V(leftover) for an sshfs without
      its mount.
  returned: success
  type: str
answers:
  description:
    - Whether the host answers through the mount. If V(false), the mount exists and recovers by itself as soon as the
      host can be reached. Null if nothing is mounted.
  returned: success
  type: bool
"""

import errno
import fcntl
import json
import os
import platform
import pwd
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Callable, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._mounts import (
    Mount,
    Process,
    parse_mount,
    parse_mountinfo,
    parse_processes,
    processes_command,
    read_processes,
    real_path,
    users,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._sshfs import (
    Failed,
    Refused,
    Wanted,
    check_path,
    explain,
    is_served_by,
    mount_command,
    plan,
    try_command,
    unmount_command,
)

# File that lists the folders created by this module, in the mount point, where the mount hides it.
MARKER = ".made-by-mala.hpc_db"
# Asks the host behind a mount; no cache answers this call.
ASK = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    raise SystemExit(f"{error.errno} {error.strerror}")
"""
# Seconds to wait for an sshfs that is unmounted or was sent a signal.
PATIENCE = 3


class Hung(Exception):
    """A command did not end in time."""


Run = Callable[[list[str], float], tuple[int, str]]


class Machine(NamedTuple):
    """The parts of this machine that mounts depend on."""

    run: Run
    find: Callable[[str], str | None]  # returns a program's path
    kill: Callable[[int, int], None]
    proc: Path  # missing on macOS
    fuse: Path
    uid: int
    user: str

    def mounts(self) -> list[Mount]:
        """Return all mounts."""
        table = self.proc / "self" / "mountinfo"
        if table.exists():
            return parse_mountinfo(table.read_bytes().decode(errors="surrogateescape"))
        return parse_mount(self.run(["mount"], 10)[1])

    def processes(self) -> list[Process]:
        """Return the user's processes."""
        if self.proc.exists():
            found = read_processes(self.proc)
        else:
            found = parse_processes(self.run(processes_command(), 10)[1])
        return [each for each in found if each.uid == self.uid]


class Found(NamedTuple):
    """The current state of a mount point."""

    state: str
    mounts: list[Mount]
    servers: list[Process]


def look(path: str, wanted: Wanted | None, machine: Machine) -> Found:
    """Return the state of ``path``, from tables only; raise Refused if the mount is not ours."""
    mounts = machine.mounts()
    for mount in mounts:
        if mount.is_sshfs and path.startswith(f"{mount.path}/"):
            raise Refused(f"path: {path} lies inside of the mount {mount.path}; choose a folder outside of it")
    here = [mount for mount in mounts if mount.path == path]
    for mount in here:
        if not mount.is_sshfs:
            raise Refused(f"path: {mount.source} ({mount.kind}) is mounted at {path} already; choose another folder")
        if mount.owner not in ("", str(machine.uid), machine.user):
            raise Refused(f"path: another user has mounted {mount.source} at {path}; choose another folder")
    sources: list[str | None] = [mount.source for mount in here] or [None]
    servers = [
        each for each in machine.processes() if any(is_served_by(each.arguments, source, path) for source in sources)
    ]
    return Found(judge(here, servers, wanted, path), here, servers)


def judge(mounts: list[Mount], servers: list[Process], wanted: Wanted | None, path: str) -> str:
    """Return the state, in one word, of the mounts at a path and the processes that serve them."""
    if not mounts:
        return "leftover" if servers else "none"
    if len(mounts) > 1 or len(servers) > 1:
        return "stacked"
    if not servers:
        return "dead"
    if servers[0].stopped:
        return "hung"
    as_wanted = wanted is None or arguments_of(servers[0]) == " ".join(mount_command("", wanted, path)[1:])
    return "mounted" if as_wanted else "other"


def arguments_of(server: Process) -> str:
    """Return the arguments as one text: macOS does not show where each argument ends."""
    return " ".join(server.arguments[1:])


def ask(path: str, params: dict, machine: Machine) -> str:
    """Return an empty string if the host answers through the mount; otherwise ``hung``, ``dead`` or the reason."""
    patience = params["alive_interval"] * (params["alive_count"] + 1) + params["connect_timeout"] + 10
    try:
        returncode, said = machine.run([sys.executable, "-c", ASK, path], patience)
    except Hung:
        return "hung"
    code, _blank, words = said.strip().partition(" ")
    if returncode and code == str(errno.ENOTCONN):
        return "dead"
    return words if returncode else ""


# --- the folder


def check_folder(path: str) -> None:
    """Refuse a mount point that is not a folder or whose contents the mount would hide."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise Refused(f"path: {path} is not a folder")
    names = sorted(set(os.listdir(path)) - {MARKER}) if os.path.isdir(path) else []
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise Refused(
            f"path: {path} is not empty, and a mount would hide what is in it ({some}); "
            "move that away or choose another folder"
        )


def make_folder(path: str) -> None:
    """Create the mount point if it is missing, and record the created folders."""
    missing, folder = [], path
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    if missing:
        os.makedirs(path, mode=0o700)
        Path(path, MARKER).write_text(json.dumps(missing), encoding="utf-8")


def remove_folder(path: str) -> None:
    """Remove the folders created by ``make_folder`` that are still empty."""
    try:
        made = json.loads(Path(path, MARKER).read_text(encoding="utf-8"))
    except OSError:
        return
    os.unlink(os.path.join(path, MARKER))
    with suppress(OSError):
        for folder in made:
            os.rmdir(folder)


@contextmanager
def alone(path: str) -> Iterator[None]:
    """Allow one run at a time to change mount points in a folder: two at once would stack their mounts."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks for folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# --- acting


def mount(path: str, wanted: Wanted, params: dict, machine: Machine) -> None:
    """Mount, and check the result."""
    command = mount_command(find_sshfs(machine), wanted, path)
    try:
        returncode, said = machine.run(command, params["timeout"])
        if returncode:
            refused, words = machine.run(try_command(wanted), params["timeout"])
            raise Failed(explain(words if refused else said, params["host"], wanted.source))
    except Hung:
        take_away(path, params, machine, by_force=True)
        raise Failed(f"timeout: {params['host']} has not accepted the login within {params['timeout']} s") from None
    if look(path, wanted, machine).state != "mounted":
        raise Failed(f"path: sshfs succeeded, but {wanted.source} is not mounted at {path}")


def take_away(path: str, params: dict, machine: Machine, by_force: bool) -> None:
    """Unmount everything at ``path`` and end its processes: one that is left might unmount the next mount."""
    program = find_unmount(machine)
    found = look(path, None, machine)
    lazily = False
    for _layer in found.mounts:
        try:
            returncode, said = machine.run(unmount_command(program, path, lazily=False), 10)
        except Hung:
            returncode, said = 1, "busy"
        if returncode and "busy" in said.lower() and not by_force and ask(path, params, machine) != "hung":
            held = ", ".join(users(path, machine.proc)) or "programs"
            raise Failed(f"path: {held} still use {path}; end that first, or unmount with force")
        if returncode:
            lazily = True
            returncode, said = machine.run(unmount_command(program, path, lazily), 10)
        if returncode:
            raise Failed(f"path: {path} cannot be unmounted: {' '.join(said.split())}")
    end(found.servers, machine, at_once=lazily or not found.mounts)
    if look(path, None, machine).state != "none":
        raise Failed(f"path: {path} is still mounted after it was unmounted")


def end(servers: list[Process], machine: Machine, at_once: bool) -> None:
    """End these processes: wait for them unless ``at_once``, then send SIGTERM, then SIGKILL."""
    left = servers
    for number in (*([] if at_once else [0]), signal.SIGTERM, signal.SIGKILL):
        for each in still(left, machine):
            with suppress(ProcessLookupError):
                machine.kill(each.pid, number)
        deadline = time.monotonic() + PATIENCE
        while (left := still(left, machine)) and time.monotonic() < deadline:
            time.sleep(0.05)
    if left:
        raise Failed(f"path: sshfs (PID {left[0].pid}) does not end")


def still(servers: list[Process], machine: Machine) -> list[Process]:
    """Return the processes that still run."""
    known = {(each.pid, each.started) for each in servers}
    return [each for each in machine.processes() if (each.pid, each.started) in known] if known else []


def find_sshfs(machine: Machine) -> str:
    """Return the path of sshfs; raise Refused if it or its requirements are missing."""
    path = machine.find("sshfs")
    copy = "; copying instead of mounting needs neither sshfs nor FUSE"
    if not path:
        raise Refused(
            f"sshfs is not installed on {platform.node()}: install the package sshfs (on Fedora and RHEL fuse-sshfs, "
            f"on macOS macFUSE and sshfs){copy}"
        )
    if machine.proc.exists() and not machine.fuse.exists():
        raise Refused(
            f"FUSE is missing on {platform.node()}, {machine.fuse} does not exist: install the package fuse3; "
            f"a container needs access to that device{copy}"
        )
    find_unmount(machine)
    return path


def find_unmount(machine: Machine) -> str:
    """Return the path of the program with which a user unmounts."""
    names = ["fusermount3", "fusermount"] if machine.proc.exists() else ["umount"]
    found = [path for path in map(machine.find, names) if path]
    if not found:
        raise Refused(
            f"{names[0]} is not installed on {platform.node()}: install the package fuse3; copying instead of mounting "
            "needs neither sshfs nor FUSE"
        )
    return found[0]


def ensure_mount(params: dict, machine: Machine, check_mode: bool) -> dict:
    """Bring the mount to the wanted state."""
    check_path(params["path"])
    wanted = None if params["state"] == "unmounted" else plan(params)
    path = real_path(params["path"], machine.mounts())
    found = look(path, wanted, machine)
    trouble = ""
    if wanted:
        find_sshfs(machine)
        if not found.mounts:
            check_folder(path)
        if found.state == "mounted":
            trouble = ask(path, params, machine)
            found = found._replace(state=trouble if trouble in ("hung", "dead") else "mounted")
    if params["state"] == "mounted":
        changed = found.state != "mounted"
    else:
        # Remains of a mount that ended with a restart of the machine.
        made = not found.mounts and os.path.exists(os.path.join(path, MARKER))
        changed = bool(wanted) or found.state != "none" or made
    if changed:
        trouble = ""
        if not check_mode:
            bring(path, wanted, params, found, machine)
    return {
        "changed": changed,
        "mount_point": path,  # not "path", to which Ansible would add the result of stat()
        "source": wanted.source if wanted else None,
        "found": found.state,
        "answers": not trouble if wanted else None,
        "warning": f"{path} is mounted, but {params['host']} does not answer: {trouble}" if trouble else None,
        "diff": {
            "before": "".join(
                as_text(mount.source, path, arguments_of(found.servers[0]) if found.servers else "", found.state)
                for mount in found.mounts
            ),
            "after": as_text(wanted.source, path, " ".join(mount_command("", wanted, path)[1:]), "mounted")
            if wanted else "",
        },
    }


def bring(path: str, wanted: Wanted | None, params: dict, found: Found, machine: Machine) -> None:
    """Unmount the current mount and, if one is wanted, mount it."""
    if wanted and not found.mounts:
        make_folder(path)
    try:
        with alone(path):
            now = look(path, wanted, machine)
            if now.state == "mounted" and now.servers != found.servers and params["state"] == "mounted":
                return  # another run has done it since
            take_away(path, params, machine, by_force=params["force"] or found.state in ("hung", "dead"))
            if wanted:
                check_folder(path)
                make_folder(path)
                mount(path, wanted, params, machine)
    finally:
        if not look(path, wanted, machine).mounts:
            remove_folder(path)


def as_text(source: str, path: str, arguments: str, state: str) -> str:
    """Return a mount as text for a diff."""
    options = [each.strip() for each in arguments.partition(f" {path}")[2].split(" -o ")]
    return "".join(f"{line}\n" for line in [f"{source} on {path}: {state}", *(f"  {each}" for each in options if each)])


def run_command(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command; return its exit code and output. Raise Hung if it has not ended in time.

    Does not wait for a program that stays in the background, nor for one that cannot even be killed.
    """
    environment = {**os.environ, "LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"}
    environment.pop("DISPLAY", None)  # where an older ssh would show a password dialog
    with tempfile.TemporaryFile() as output:
        # run_command of AnsibleModule has no timeout
        process = Popen(  # pylint: disable=ansible-bad-function
            command, stdin=DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment, cwd="/"
        )
        try:
            returncode = process.wait(seconds)
        except TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Hung(f"{command[0]} has not ended within {seconds} s") from None
        output.seek(0)
        return returncode, output.read().decode(errors="replace")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["mounted", "unmounted", "remounted"], "default": "mounted"},
            "host": {"type": "str"},
            "folder": {"type": "str", "default": "."},
            "user": {"type": "str"},
            "port": {"type": "int"},
            "identity_file": {"type": "path"},
            "ssh_config": {"type": "path"},
            "proxy_jump": {"type": "list", "elements": "str", "default": []},
            "ssh_arguments": {"type": "str", "default": ""},
            "share_connection": {"type": "bool", "default": False},
            "read_only": {"type": "bool", "default": True},
            "idmap": {"type": "str", "choices": ["user", "none"], "default": "user"},
            "options": {"type": "dict", "default": {}},
            "alive_interval": {"type": "int", "default": 3},
            "alive_count": {"type": "int", "default": 2},
            "connect_timeout": {"type": "int", "default": 5},
            "timeout": {"type": "int", "default": 30},
            "force": {"type": "bool", "default": False},
        },
        required_if=[("state", "mounted", ["host"]), ("state", "remounted", ["host"])],
        supports_check_mode=True,
    )
    os.umask(0o077)
    user = pwd.getpwuid(os.geteuid())
    machine = Machine(
        run_command, module.get_bin_path, os.kill, Path("/proc"), Path("/dev/fuse"), user.pw_uid, user.pw_name
    )
    try:
        result = ensure_mount(module.params, machine, module.check_mode)
    except (Refused, Failed, Hung, OSError) as error:
        module.fail_json(msg=one_line(error))
    warning = result.pop("warning")
    if warning:
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
