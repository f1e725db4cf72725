# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a compute node is, and who reaches it. Run in a job, on the first of its nodes.

    compute.py FOLDER...         prints one JSON object
    compute.py --connect HOST PORT      on the second node: whether it reaches the first

It listens, and writes where into the file ``door``, so that the login node can connect as well.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from typing import List, Optional

# Within these seconds the login node has seen the file and connected, if it can. NFS may show a file 60 s late.
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
    """Tell whether the job's second node reaches this one; None without a second one."""
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return None
    command = ["srun", "--nodes=1", "--ntasks=1", "--relative=1", sys.executable, os.path.abspath(__file__)]
    try:
        return subprocess.call(command + ["--connect", name, str(port)], timeout=60) == 0
    except (OSError, subprocess.TimeoutExpired):
        return None


def publish(text: str) -> None:
    """Write the file at once, so that nobody reads half of it."""
    with open("door.new", "w") as stream:
        stream.write(text)
    os.rename("door.new", "door")


def reached_by_login(listener: socket.socket) -> bool:
    """Wait for the login node."""
    listener.settimeout(PATIENCE)
    try:
        listener.accept()[0].close()
    except OSError:
        return False
    return True


def writable(folder: str) -> bool:
    """Tell whether something can be made there, such as a socket."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
