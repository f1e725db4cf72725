# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Identify processes, since a PID alone does not: PIDs are reused."""

import contextlib
import glob
import hashlib
import os
import re
import signal
import socket
import subprocess
import time
from typing import Dict, List, Optional, Tuple

MACHINE_ID = "/etc/machine-id"
# Network cards, and the file with the address. A wireless card often uses a random address in the network.
NETWORK_CARDS = (("/sys/class/net/*", "address"), ("/sys/class/ieee80211/*", "macaddress"))
# Values of addr_assign_type for the card's permanent address, as opposed to one that was set.
PERMANENT = ("0", "")


def start_time(pid: int) -> Optional[str]:
    """Return the start time of ``pid`` in a form that can only be compared; None if it does not run."""
    if not os.path.exists("/proc/self/stat"):  # macOS
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], stdout=subprocess.PIPE, check=False)
        return found.stdout.decode().strip() or None
    fields = _stat(pid)
    # A zombie has ended once its last thread has; then it only waits for its parent.
    return None if not fields or (fields[0] in "ZX" and int(fields[17]) < 2) else fields[19]


def _stat(pid: int) -> List[str]:
    """Return the fields of /proc/PID/stat from the state on; an empty list if the process does not run."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as stream:
            return stat_fields(stream.read())
    except OSError:
        return []


def stat_fields(stat: bytes) -> List[str]:
    """Return the fields of ``/proc/PID/stat`` after the name, which may contain any character, also parentheses."""
    return stat.rpartition(b")")[2].decode().split()


def this_host() -> str:
    """Return an identifier for the scope of our PIDs: boot and PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            boot = stream.read().strip()
        return "%s %s" % (boot, os.readlink("/proc/self/ns/pid"))
    except OSError:
        return socket.gethostname()


def this_machine() -> List[str]:
    """Return identifiers of this machine that survive renames and reboots; one in common means the same machine.

    A host name may change by DHCP, and a laptop that was rebooted under another name would wait for itself for ever.
    The machine id alone is not enough: nodes that boot from one image share it, and so do copies of a virtual machine.
    If a holder on one login node were taken for an earlier boot of another one, a file system that hangs for the TTL
    would suffice for two servers on one data directory. So each identifier combines the machine id *and* the permanent
    address of a network card, which differs between nodes of one image. Cards on a USB port are ignored, since they
    move between machines. If either is missing, as in a container, there are no identifiers. Then the host name
    decides, and for a holder with another host name the user does (break_lease.yml).
    """
    if not os.path.exists("/proc/self/stat"):  # macOS, whose id belongs to the hardware
        with contextlib.suppress(OSError):
            asked = ["/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice"]
            said = subprocess.run(asked, stdout=subprocess.PIPE, check=False).stdout.decode("utf-8", "replace")
            return re.findall('"IOPlatformUUID" = "([^"]+)"', said)
        return []
    system = _read(MACHINE_ID)
    if not re.match(r"[0-9a-f]{32}\Z", system):
        return []
    # The machine id should stay secret, so it is hashed.
    return sorted(hashlib.sha256((system + address).encode()).hexdigest() for address in _card_addresses())


def _card_addresses() -> List[str]:
    addresses = []
    for cards, address in NETWORK_CARDS:
        for card in glob.glob(cards):
            built_in = os.path.exists(os.path.join(card, "device")) and "/usb" not in os.path.realpath(card)
            if built_in and _read(os.path.join(card, "addr_assign_type")) in PERMANENT:
                addresses.append(_read(os.path.join(card, address)))
    return [address for address in addresses if re.search("[1-9a-f]", address)]


def _read(path: str) -> str:
    try:
        with open(path) as stream:
            return stream.read().strip()
    except (OSError, ValueError):
        return ""


def runs_in(pid: int, program: str, folder: str) -> bool:
    """Return whether ``pid`` is the program of that name with ``folder`` as its working directory."""
    try:
        executable = os.path.basename(os.readlink("/proc/%d/exe" % pid)).split(" ")[0]
        return executable == program and os.path.samefile("/proc/%d/cwd" % pid, folder)
    except OSError:
        return False


def all_in(program: str, folder: str) -> List[int]:
    """Return the PIDs of all processes of that program with ``folder`` as their working directory."""
    names = os.listdir("/proc") if os.path.exists("/proc/self/stat") else []
    return [int(name) for name in names if name.isdigit() and runs_in(int(name), program, folder)]


def kill(pid: int, number: int) -> None:
    """Send a signal to a process; ignore that it has ended or belongs to another user."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def kill_below(pid: int) -> None:
    """Kill all descendants of ``pid`` at once. PostgreSQL's have their own sessions, so no process group has them all.

    All are stopped before the first is killed. Otherwise they would react to each other's end, start new processes, or
    leave children to a parent that is not below ``pid``.
    """
    limit = time.monotonic() + 1.0
    stopped = {}  # type: Dict[int, str]
    while time.monotonic() < limit:
        found = below(pid)
        if all(each in stopped and state in "TtD" for each, state in found.items()):
            break
        for each in found:
            kill(each, signal.SIGSTOP)
        stopped.update(found)
    for each in stopped:
        kill(each, signal.SIGKILL)


def below(pid: int) -> Dict[int, str]:
    """Return the running descendants of ``pid``, each with the kernel's letter for its state."""
    everything = _everything()
    found = {}  # type: Dict[int, str]
    parents = {pid}
    while parents:
        parents = {each for each, (parent, _state) in everything.items() if parent in parents and each not in found}
        found.update({each: everything[each][1] for each in parents})
    return {each: state for each, state in found.items() if state not in "ZX"}


def _everything() -> Dict[int, Tuple[int, str]]:
    """Return the parent and state of every process."""
    if os.path.exists("/proc/self/stat"):
        read = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        return {pid: (int(fields[1]), fields[0]) for pid, fields in read.items() if fields}
    with subprocess.Popen(["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "state="], stdout=subprocess.PIPE) as ps:
        lines = [line.split() for line in ps.communicate()[0].decode().splitlines()]
    return {int(pid): (int(parent), state[0]) for pid, parent, state in lines if int(pid) != ps.pid}
