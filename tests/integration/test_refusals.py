# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad input is refused with one line that names the setting, before anything has changed."""

from __future__ import annotations

import os
import re

import pytest
from target import Target

JOB = {"partition": "work", "time": "01:00:00", "mem": "1000M"}


def refusal(output: str) -> str:
    """Return the one message of the one task that failed."""
    assert len(re.findall(r"^(?:fatal|failed): \[", output, re.MULTILINE)) == 1, output
    said = re.findall(r"^ +msg: (.*(?:\n {8,}.*)*)", output, re.MULTILINE)
    return " ".join(said[-1].replace("''", "'").split())


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"postgres_provider": "apt"}, r"postgres_provider must be one of: rattler, conda, embedded, got: apt"),
        ({"server_job_options": {**JOB, "partition": "nope"}}, r"server_job_options: .*: invalid partition .*: nope"),
        ({"server_job_options": {**JOB, "mem": "999G"}}, r"server_job_options: .*node configuration is not available"),
        ({"server_job_options": {**JOB, "mem": "12Q"}}, r"instance_memory: 12Q is not allowed; .* such as 16G"),
        ({"instance_memory": "a lot"}, r"instance_memory: a lot is not allowed; .* such as 16G"),
        ({"server_job_options": {**JOB, "time": "tomorrow"}}, r"time: .*tomorrow"),
        ({"server_job_options": {**JOB, "time": 259200}}, r"time: .*259200.*quote"),
        ({"server_job_options": {**JOB, "time": "99:00:00"}}, r"time.*99:00:00.*work.*4:00:00"),
        ({"server_job_options": {**JOB, "no such": 1}}, r"no such"),
        ({"databases_studies": [{"name": "My-Study"}]}, r"databases_studies: My-Study is not allowed as a database's"),
        ({"databases_studies": [{"name": "alice"}]}, r"databases_studies: alice is not allowed as a database's name"),
        ({"databases_studies": [{"name": "a"}, {"name": "a"}]}, r"databases_studies: .*each name once"),
        ({"databases_studies": []}, r"databases_studies: an empty list is not allowed"),
        ({"server_bin_dir": "/opt/nothing"}, r"server_bin_dir"),
        ({"server_scheduler": "pbs"}, r"server_scheduler must be one of: slurm, local, got: pbs"),
        ({"instance_root": "~/env/envs/db"}, r"instance_root: .*lies inside the conda environment /home/alice/env,"),
        ({"instance_root": "~/full"}, r"instance_root: /home/alice/full holds other things"),
        ({"instance_root": "~/a'b"}, r"instance_root: .* contains .*; allowed are letters"),
        ({"instance_root": "~/half"}, r"/home/alice/half/postgresql-17 exists and is no conda environment"),
        ({"instance_name": "Ω 1"}, r"instance_name: Ω 1 is not allowed; lower case letters"),
        ({"postgres_port": 80}, r"postgres_port: 80 is not allowed; a port from 1024 to 65535"),
        ({"postgres_networks": ["10.0.0.0"]}, r"postgres_networks: 10.0.0.0 is not allowed; .*10.1.0.0/16"),
        ({"ansible_python_interpreter": "/home/alice/old"}, r"is Python 3.6 there, .*set ansible_python_interpreter"),
        ({"ansible_python_interpreter": "/no/python"}, r"is no Python there, .*set ansible_python_interpreter"),
    ],
)
def test_refused_on_a_cluster(mini: Target, settings: dict, says: str) -> None:
    mini.run(
        "cd; mkdir -p env/conda-meta full half/run half/postgresql-17; touch full/thesis half/postgresql-17/thesis;"
        "chmod 700 half half/run; printf '#!/bin/sh\\necho 3.6 /usr/bin/python3.6\\n' > old; chmod 755 old"
    )
    before = mini.files()

    played = mini.play("hpc_db", settings)

    assert played.returncode != 0
    assert re.search(says, refusal(played.stdout))
    assert mini.files() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be refused as root")
def test_refused_for_root(here: Target) -> None:
    # The inventory's own user is left out, so that root itself is the owner.
    played = here.play("hpc_db", {"ansible_become": False, "instance_root": "/tmp/hpc-db-refused"})

    assert "the owner is root, but PostgreSQL does not run as root: set ansible_user" in refusal(played.stdout)
    assert not os.path.exists("/tmp/hpc-db-refused")


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"postgres_listen_addresses": "*"}, r"postgres_listen_addresses: \* .*has no TLS and may listen on 127.0.0.1"),
        ({"postgres_major": 17}, r"postgres_major: 17 .*the provider embedded holds PostgreSQL 18"),
        ({"instance_workers": 0}, r"instance_workers: 0 is not allowed"),
    ],
)
def test_refused_on_this_machine(here: Target, settings: dict, says: str) -> None:
    before = here.files()

    played = here.play("hpc_db", settings)

    assert re.search(says, refusal(played.stdout))
    assert here.files() == before
