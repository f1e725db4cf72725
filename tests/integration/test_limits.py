# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits of a site with accounting: one running job per user, accounts and QOS, judged by a real Slurm."""

from __future__ import annotations

import re
import time

from mini_cluster import Watch, Workers, eventually, hosting

ACCOUNT = {"account": "k80", "qos": "single"}
JOB = {"partition": "work", "mem": "1000M", "time": "00:08:00"}
SETTINGS = {
    "server_handover_after": "00:01:00", "server_lease_ttl": 15, "server_dump_minutes": 0, "server_stop_notice": 60,
}
LIMIT = "QOSMaxJobsPerUserLimit"


def test_where_one_job_may_run_workers_wait_for_the_queue() -> None:
    """The job ends at its walltime; its successor could not start before."""
    settings = {**SETTINGS, "server_job_options": {**JOB, **ACCOUNT}}
    with hosting(settings, "--accounting") as cluster, Watch(cluster) as watch:
        with Workers(cluster, "login", Workers.CALM) as workers:
            watch.wait_for_acknowledgement(60)
            before, began = cluster.said("endpoint"), time.monotonic()
            eventually(lambda: LIMIT in ((cluster.said("state").get("follows") or {}).get("late", "")), 240, 1)

            announced = rf"outage +from .* \(end of job {before['job']}\) until job \d+ starts, which cannot"
            for playbook in ("status", "hpc_db", "doctor"):
                played = cluster.playbooks.play(playbook, settings)
                assert re.search(rf"{announced} start earlier \({LIMIT}\)", played.stdout), played.stdout

            cluster.wait_for_another(before, 700)
            watch.wait_for_acknowledgement(60)
            assert watch.most() == 1
            workers.check()
            assert any("queued as job" in line for line in workers.said())
            print(f"L13: {watch.gap(began):.0f} s without a result, as long as Slurm takes to start the next job")


def test_account_and_qos_are_judged_by_slurm() -> None:
    settings = {**SETTINGS, "server_job_options": {**JOB, "account": "k80", "qos": "normal"}}
    with hosting(settings, "--accounting") as cluster:
        for wrong in ({"account": "nope"}, {"qos": "nope"}):
            played = cluster.playbooks.play("stop")
            assert played.returncode == 0, played.stdout
            played = cluster.playbooks.play("hpc_db", {**settings, "server_job_options": {**JOB, **wrong}})
            assert played.returncode != 0
            said = " ".join(played.stdout.split())
            assert re.search(r"server_job_options: sbatch says: .*[Ii]nvalid (account|qos)", said), played.stdout
            assert cluster.jobs() == {}
