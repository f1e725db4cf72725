# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A compute node's facts about itself, on this machine; tests/integration has real nodes."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "roles/discover/files/compute.py"
# The first "srun" is the neighbour, which connects or not.
SRUN = {
    None: None,
    True: '#!/bin/sh\nwhile [ "$1" != --relative=1 ]; do shift; done; shift; exec "$@"\n',
    False: "#!/bin/sh\nexit 1\n",
}


@pytest.mark.parametrize("neighbour", [None, True, False])
def test_tells_what_it_is_and_who_reaches_it(neighbour, tmp_path):
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("SLURM_JOB_NUM_NODES", None)
    if neighbour is not None:
        (tmp_path / "srun").write_text(SRUN[neighbour])
        (tmp_path / "srun").chmod(0o755)
        environment["SLURM_JOB_NUM_NODES"] = "2"
    job = subprocess.Popen(
        [sys.executable, PROGRAM, str(tmp_path), "/no/such"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "door").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    host, port = (tmp_path / "door").read_text().split()
    socket.create_connection(("127.0.0.1", int(port)), 10).close()
    said = json.loads(job.communicate(timeout=60)[0])

    assert host == said["host"] == socket.gethostname()
    assert said == {
        "host": host, "machine": platform.machine(), "python": platform.python_version(),
        "folders": [str(tmp_path)], "temporary": True, "neighbour": neighbour, "login": True,
    }
