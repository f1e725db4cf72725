# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""With Slurm's own timeouts and this collection's, a hand-over and the failure of a node; run by make soak.

The other tests have shorter timeouts. Slurm needs minutes to notice that a node has failed.
"""

from __future__ import annotations

import time

from mini_cluster import Watch, Workers, eventually, hosting

# Slurm's defaults, which the test cluster shortens.
SLURM = {"MessageTimeout": 10, "SlurmdTimeout": 300, "KillWait": 30}
SETTINGS = {
    "server_job_options": {"partition": "work", "time": "01:00:00", "mem": "1000M", "cpus-per-task": 1},
    "server_handover_after": "00:02:00", "server_lease_ttl": 90,
}


def test_with_the_defaults_of_slurm_and_of_the_collection() -> None:
    with hosting(SETTINGS, *(f"--slurm={name}={value}" for name, value in SLURM.items())) as cluster:
        assert {name: cluster.slurm(name) for name in SLURM} == SLURM
        with Watch(cluster) as watch, Workers(cluster, "login", Workers.CALM) as workers:
            watch.wait_for_acknowledgement(60)
            before, began = cluster.said("endpoint"), time.monotonic()
            cluster.wait_for_another(before, 300)
            watch.wait_for_acknowledgement(60)
            print(f"L12: hand-over with the shipped defaults: {watch.gap(began):.1f} s without a result")
            assert watch.gap(began) <= 10

            before, killed = cluster.said("endpoint"), time.monotonic()
            cluster.verb("kill", before["host"])
            eventually(lambda: before["job"] not in cluster.jobs(), 600, 1)
            noticed = time.monotonic() - killed
            back = noticed + cluster.wait_for_another(before, 300)
            watch.wait_for_acknowledgement(60)
            print(f"D7: node killed, with the shipped defaults: back after {back:.0f} s, {noticed:.0f} of them Slurm's")
            assert back - noticed <= SETTINGS["server_lease_ttl"] + 15
            assert watch.most() == 1
            workers.check()
