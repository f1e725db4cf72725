# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Emulate the latency of a long cable, like tc's netem, which not every kernel has.

A process delays each frame by the same time; frames are not lost or reordered.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import network
from state import State, find_process, start_time, wait_until, write_pid_file

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
TUNSETOFFLOAD, TUN_F_CSUM, TUN_F_TSO4 = 0x400454D0, 0x01, 0x02
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 15, 23, 0x0003
SO_RCVBUFFORCE = 33
# The kernel passes several packets as one frame, with a header that contains their sizes, and accepts such frames back.
LONGEST = 1 << 17


def straighten(host: str, state: State) -> None:
    """End the process that delays the frames of a host's cable, if there is one, and restore its plug."""
    process = find_process(state.slow_pid_file(host), Path("/proc"))
    if process:
        os.kill(int(process.name), signal.SIGKILL)
        wait_until(lambda: not start_time(process), 10, f"process {process.name} does not end")
    cable = network.cables(host)[-1]
    network.ip("link", "set", cable.plug, "arp", "on", "master", cable.switch)


def lengthen(host: str, seconds: float, state: State) -> None:
    """Delay all frames of a host's cable by ``seconds`` in each direction, in a background process."""
    cable = network.cables(host)[-1]
    tap = os.open("/dev/net/tun", os.O_RDWR)
    name = f"{host}-slow"
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    plug = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    plug.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    plug.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    plug.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    plug.bind((cable.plug, ETH_P_ALL))
    # Otherwise the workstation itself would answer there, bypassing the cable.
    network.ip("link", "set", cable.plug, "nomaster", "arp", "off")
    network.ip("link", "set", name, "master", cable.switch, "up")
    end = os.pidfd_open(int(state.get(network.WORKSTATION).name))
    if os.fork():
        wait_until(lambda: find_process(state.slow_pid_file(host), Path("/proc")), 10, f"{name} does not begin")
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    write_pid_file(state.slow_pid_file(host))
    with suppress(OSError):  # the host has been killed, and its cable with it
        carry(tap, plug.fileno(), end, seconds)
    os._exit(0)


def carry(tap: int, plug: int, end: int, seconds: float) -> None:
    """Carry frames until the cluster's first process ends; ``end`` is its pidfd."""
    other = {tap: plug, plug: tap}
    held: deque[tuple[float, int, bytes]] = deque()  # the delay is constant, so frames leave in order of arrival
    while True:
        pause = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready = select.select([tap, plug, end], [], [], pause)[0]
        if end in ready:
            return
        held.extend((time.monotonic() + seconds, other[source], os.read(source, LONGEST)) for source in ready)
        while held and held[0][0] <= time.monotonic():
            _due, target, frame = held.popleft()
            os.write(target, frame)
