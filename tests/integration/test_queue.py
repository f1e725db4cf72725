# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""On a busy cluster, the server moves without an outage, however long its successors wait in the queue.

Each hand-over takes minutes, in which this machine has little to do.
"""

from __future__ import annotations

import json
import re
import time

from mini_cluster import MiniCluster, Watch, Workers, eventually, hosting

# The first job does not wait; its successors do, in the partition of all others.
JOB = {"partition": "urgent", "mem": "1000M", "cpus-per-task": 1}
SETTINGS = {
    "server_successor_options": {"partition": "work"}, "server_handover_after": "00:01:00", "server_lease_ttl": 15,
    "server_dump_minutes": 0,
}


def seconds_in_queue(cluster: MiniCluster) -> float:
    """Return how long a new job of a whole node would wait, as Slurm expects."""
    said = cluster.run("sbatch --test-only --partition=work --nodes=1 --time=10 --wrap=: 2>&1; date +%s")
    begins = re.findall(r"to start at (\S+) ", said)[0]
    return float(cluster.run("date -d $1 +%s", begins)) - float(said.split()[-1])


def overlap(cluster: MiniCluster) -> float:
    """Return the share of the jobs' time in which two of them ran."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    for line in (cluster.root / "log/events.jsonl").read_text().splitlines():
        event = json.loads(line)
        begun.setdefault(event["job"], event["time"])
        ended[event["job"]] = event["time"]
    jobs = sorted(begun, key=lambda job: begun[job])
    both = sum(max(ended[one] - begun[other], 0) for one, other in zip(jobs, jobs[1:]))
    return both / sum(ended[job] - begun[job] for job in jobs)


def test_hand_overs_on_a_busy_cluster(soak: bool) -> None:
    """The successor has aged while its predecessor served, so nobody waits for the queue."""
    turns, minutes = (10, 30) if soak else (3, 12)
    settings = {**SETTINGS, "server_job_options": {**JOB, "time": "01:00:00" if soak else "00:25:00"}}
    gaps = []
    with hosting(settings, f"--busy={minutes}") as cluster:
        with Watch(cluster) as watch, Workers(cluster, "login", Workers.CALM) as workers:
            watch.wait_for_acknowledgement(60)
            for _turn in range(turns):
                before, began = cluster.said("endpoint"), time.monotonic()
                assert seconds_in_queue(cluster) >= 600
                cluster.wait_for_another(before, 120 * minutes)
                watch.wait_for_acknowledgement(60)

                gaps.append(watch.gap(began))
                assert time.monotonic() - began > 30 * minutes  # the queue was real
                eventually(lambda: before["job"] not in cluster.jobs(), 30)  # noqa: B023
            assert watch.most() == 1
            workers.check()
        share = overlap(cluster)
    print(f"L12: {turns} hand-overs, {max(gaps):.1f} s without a result, two jobs for {share:.1%} of the time")
    assert max(gaps) <= 10
    assert share <= (0.02 if soak else 0.05)
