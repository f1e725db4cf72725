# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two switches: one for the compute nodes and one for the campus. Only the login node is plugged into both."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

WORKSTATION = "workstation"
WORKSTATION_ADDRESS = "198.51.100.129"


class Cable(NamedTuple):
    plug: str  # the switch's end of the cable, an interface in the workstation's namespace
    switch: str
    address: str

    @property
    def mac(self) -> str:
        """The address is constant; otherwise a rebooted host is unreachable until its neighbours forget the old one."""
        return f"02:00:c6:33:64:{int(self.address.rpartition('.')[2]):02x}"


def host_names(nodes: int) -> list[str]:
    return ["ctl", "login", *node_names(nodes)]


def node_names(nodes: int) -> list[str]:
    return [f"c{number}" for number in range(1, nodes + 1)]


def cables(host: str) -> list[Cable]:
    number = {"ctl": 1, "login": 2}.get(host) or 10 + int(host[1:])
    found = [Cable(host, "cluster", f"198.51.100.{number}")]
    if host == "login":
        found.append(Cable("login-campus", "campus", "198.51.100.130"))
    return found


def hosts_file(hosts: list[str], *, campus: bool) -> str:
    """Return the text of /etc/hosts, as seen from the campus or from the cluster."""
    addresses = {host: cables(host)[-1 if campus else 0].address for host in hosts}
    lines = {"localhost": "127.0.0.1", WORKSTATION: WORKSTATION_ADDRESS, **addresses}
    return "".join(f"{address}\t{name}\n" for name, address in lines.items())


def ip(*arguments: str, netns: Path | None = None) -> str:
    enter = ["nsenter", f"--net={netns}"] if netns else []
    return subprocess.run([*enter, "ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def isolate() -> None:
    """Prepare the namespace of this process: loopback, no IPv6 on these interfaces, no routing."""
    ip("link", "set", "lo", "up")
    for sysctl, value in {"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1",
                          "ipv4/ip_forward": "0"}.items():
        path = Path("/proc/sys/net", sysctl)
        if path.exists():
            path.write_text(value)


def set_up_switches() -> None:
    isolate()
    for switch in ("cluster", "campus"):
        ip("link", "add", switch, "type", "bridge")
        ip("link", "set", switch, "up")
    ip("address", "add", f"{WORKSTATION_ADDRESS}/25", "dev", "campus")


def plug_in(host: str, switches: Path) -> None:
    """Wire the namespace of this process to the ``switches``, which are in another namespace."""
    isolate()
    for number, cable in enumerate(cables(host)):
        port = f"eth{number}"
        ip("link", "add", port, "address", cable.mac, "type", "veth",
           "peer", "name", cable.plug, "netns", str(switches))
        ip("link", "set", cable.plug, "master", cable.switch, "up", netns=switches)
        ip("address", "add", f"{cable.address}/25", "dev", port)
        ip("link", "set", port, "up")


def plugged(switches: Path) -> dict[str, bool]:
    """Map each existing plug to whether it is up."""
    links = json.loads(ip("-json", "link", "show", "type", "veth", netns=switches))
    return {link["ifname"]: "UP" in link["flags"] for link in links}


def set_cables(host: str, state: str, switches: Path) -> None:
    """``state`` is up or down."""
    present = plugged(switches)
    for cable in cables(host):
        if cable.plug in present:  # a dead host has none
            ip("link", "set", cable.plug, state, netns=switches)


def neighbours(host: str, hosts: list[str], switches: Path) -> list[str]:
    """Return the addresses that a host can reach: the workstation's and those of the ``hosts`` that are plugged in."""
    present = plugged(switches)
    reached = {cable.switch for cable in cables(host)}
    there = [cable for other in hosts if other != host for cable in cables(other) if present.get(cable.plug)]
    addresses = [cable.address for cable in there if cable.switch in reached]
    return [*addresses, WORKSTATION_ADDRESS] if "campus" in reached else addresses


def answers(address: str) -> bool:
    """Return whether an address answers on any port, as seen from the namespace of this process."""
    try:
        socket.create_connection((address, 9), timeout=1).close()
    except ConnectionRefusedError:
        pass
    except OSError:
        return False
    return True


def unplug(host: str, switches: Path) -> None:
    """Remove the cables, so that no packet leaves the host any more, not even one that closes a connection."""
    present = plugged(switches)
    for cable in cables(host):
        if cable.plug in present:
            ip("link", "delete", cable.plug, netns=switches)
