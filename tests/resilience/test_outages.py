# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Workers with plain Optuna survive when the server goes away for a while, or has too few connections."""

from __future__ import annotations

import time
from collections.abc import Callable

from mini_cluster import PLUGIN_URL, WORKER, MiniCluster, Watch, eventually

Figure = Callable[[str, str], None]
OWNER = 'exec hpc_db/hpc_db/postgresql-17/bin/psql -XAtqc "$1" "service=hpc_db user=alice dbname=alice"'


def test_outages(cluster: MiniCluster, watch: Watch, figure: Figure, soak: bool) -> None:
    """Outages during objectives, at ask and at tell. test_node_is_cut_off also has one of two minutes."""
    logs = [cluster.home / "workers" / f"log.{number}" for number in range(8)]
    for seconds in (0.3, 15, 120) if soak else (0.3, 15):
        before = cluster.said("endpoint")
        eventually(lambda: "PENDING" in cluster.jobs().values(), 60)
        (successor,) = (job for job, state in cluster.jobs().items() if state == "PENDING")
        if seconds > 1:  # the shortest outage is as long as a plain move
            cluster.run("scontrol hold $1", successor)
        began = time.monotonic()
        cluster.run("scancel $1", before["job"])
        eventually(lambda: not cluster.service() or cluster.said("endpoint") != before, 30, 0.02)  # noqa: B023
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        if seconds > 1:
            cluster.run("scontrol release $1", successor)
        cluster.wait_for_another(before, 120)

        sizes = [log.stat().st_size for log in logs]
        eventually(lambda: all(log.stat().st_size > size for log, size in zip(logs, sizes)), 60)  # noqa: B023
        figure("L5", f"{seconds} s without a server: 8 of 8 workers go on, {watch.gap(began):.1f} s without a result")


def test_three_times_as_many_workers_as_the_server_has_room_for(
    cluster: MiniCluster, figure: Figure, soak: bool
) -> None:
    room = 8 if soak else 2
    cluster.run(OWNER, f"ALTER DATABASE mala CONNECTION LIMIT {8 + room}")
    try:
        began = time.monotonic()
        herd = [
            cluster.start("c3", WORKER, PLUGIN_URL, "2", f"herd{number}", "--seconds=0.2") for number in range(3 * room)
        ]
        used = int(cluster.run(OWNER, "SELECT count(*) FROM pg_stat_activity WHERE datname = 'mala'"))
        said = [worker.communicate(timeout=180)[0] for worker in herd]
    finally:
        cluster.run(OWNER, "ALTER DATABASE mala CONNECTION LIMIT -1")

    assert [worker.returncode for worker in herd] == [0] * len(herd), said
    assert used <= 8 + room
    waited = sum("too many connections" in each for each in said)
    figure("L9", f"{len(herd)} of {len(herd)} finish after {time.monotonic() - began:.0f} s; {waited} had to wait")
    assert waited
