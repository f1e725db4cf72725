# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Report properties of a compute node, and which nodes can connect to it. Run in a job, on the first of its nodes.

    compute.py FOLDER...         prints one JSON object
    compute.py --connect HOST PORT      run on the second node: fails unless it can connect to the first

The script listens on a port, and writes its address to the file ``door``, so that the login node can connect as well.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from typing import List, Optional

# Seconds for the login node to see the file and connect. NFS may show a file up to 60 s late.
PATIENCE = 75
CONNECT_SECONDS = 5


def main(arguments: List[str]) -> None:
    if arguments[:1] == ["--connect"]:
        socket.create_connection((arguments[1], int(arguments[2])), CONNECT_SECONDS).close()
        return
    name = socket.gethostname()
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(5)
        port = listener.getsockname()[1]
        neighbour = reached_by_neighbour(name, port)
        if neighbour:
            listener.accept()[0].close()
        publish(f"{name} {port}\n")
        login = reached_by_login(listener)
    print(json.dumps({
        "host": name,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "folders": [folder for folder in arguments if os.path.isdir(folder)],
        "temporary": writable("/tmp"),
        "neighbour": neighbour,
        "login": login,
    }))


def reached_by_neighbour(name: str, port: int) -> Optional[bool]:
    """Return whether the job's second node can connect to this one; None if there is no second node."""
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return None
    command = ["srun", "--nodes=1", "--ntasks=1", "--relative=1", sys.executable, os.path.abspath(__file__)]
    try:
        return subprocess.call(command + ["--connect", name, str(port)], timeout=60) == 0
    except (OSError, subprocess.TimeoutExpired):
        return None


def publish(text: str) -> None:
    """Write the file atomically, so that the login node never reads a part of it."""
    with open("door.new", "w") as stream:
        stream.write(text)
    os.rename("door.new", "door")


def reached_by_login(listener: socket.socket) -> bool:
    """Wait for a connection from the login node; return whether there was one."""
    listener.settimeout(PATIENCE)
    try:
        listener.accept()[0].close()
    except OSError:
        return False
    return True


def writable(folder: str) -> bool:
    """Return whether files can be created in ``folder``, such as a socket."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
