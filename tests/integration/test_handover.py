# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two supervisors of one chain with a real PostgreSQL: the successor takes over, or the predecessor serves on.

The scheduler is a stand-in, so that a chain of twenty takes a minute; test_queue.py has the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hpc_db_host.handover import Successor
from hpc_db_host.layout import Layout
from test_hosting_program import (  # noqa: F401 - fixtures  # pylint: disable=unused-import
    Instance,
    bindir,
    data,
    eventually,
    folder,
    instance,
    owner,
    wheels,
)

# Jobs are files with their state. sbatch adds a waiting one.
SQUEUE = """#!/bin/sh
all="$*"
case "$all" in
*forecast*) exit;;
*--jobs=*) state=$(cat {folder}/jobs/${{all##*--jobs=}} 2>/dev/null); echo "job|${{state:-COMPLETED}}|"; exit;;
esac
echo 'JOBID|STATE|NODELIST|TIME_LEFT/TIME_LIMIT|NAME|REASON'
cd {folder}/jobs
for id in *; do [ ! -s $id ] || echo "$id|$(cat $id)|c1|10:00/20:00|hpc_db|None"; done
"""
SBATCH = """#!/bin/sh
id=$(($(cat {folder}/last) + 1)); echo $id > {folder}/last
echo PENDING > {folder}/jobs/$id
echo "$*" >> {folder}/submitted
echo $id
"""
ONE_PERCENT = {"handover_after": "1%"}


class Chain:
    """An instance whose jobs submit their successors; the test is the scheduler that starts them."""

    def __init__(self, made: Instance) -> None:
        self.instance, self.folder = made, made.root / "slurm"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        with owner():
            self.folder.mkdir()
            for name, script in (("squeue", SQUEUE), ("sbatch", SBATCH), ("scancel", "#!/bin/sh\n")):
                (self.folder / name).write_text(script.format(folder=self.folder))
                (self.folder / name).chmod(0o755)
            (self.folder / "jobs").mkdir()
            (self.folder / "last").write_text("7\n")
        self.configure(**ONE_PERCENT)

    def configure(self, **changes: object) -> None:
        successor = {"options": {}, "memory": "1G", "script": "/job.sh", "output": "/job.log"}
        self.instance.configure(
            bin_dir=str(self.folder), chain=True, job_name="hpc_db", successor=successor, stop_notice=60, **changes
        )

    def start(self, job: str = "7") -> subprocess.Popen[bytes]:
        self.set_state(job, "RUNNING")
        self.running[job] = self.instance.start("serve", "--lease-patience", "60", job=job)
        return self.running[job]

    def set_state(self, job: str, state: str) -> None:
        with owner():
            (self.folder / "jobs" / job).write_text(state)

    def waiting(self) -> list[str]:
        return [path.name for path in (self.folder / "jobs").iterdir() if path.read_text().strip() == "PENDING"]

    def successor(self) -> str:
        """Return the id of the job that waits, once it is submitted."""
        eventually(self.waiting)
        return self.waiting()[0]

    def wait_for(self, job: str) -> None:
        """Wait until a job serves, and no other one runs."""
        eventually(lambda: self.instance.is_published() and self.instance.said("endpoint")["job"] == job)
        for other in [each for each in self.running if each != job]:
            assert self.running.pop(other).wait(60) == 0, self.instance.log()
            self.set_state(other, "")


@pytest.fixture
def chain(instance: Instance) -> Iterator[Chain]:  # noqa: F811
    yield Chain(instance)
    print(instance.log())  # for a test that failed


def postmasters(root: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if command[0].endswith("/postgres") and f"config_file={root}/conf/postgresql.conf" in command:
            found.append(int(process.name))
    return found


def test_twenty_hand_overs_lose_nothing_and_leave_nothing(chain: Chain) -> None:
    target = chain.instance
    chain.start()
    chain.wait_for("7")
    target.psql("CREATE TABLE t (n int)")
    kept = []
    for turn in range(20):
        target.psql(f"INSERT INTO t VALUES ({turn})")
        job = chain.successor()
        began = time.monotonic()
        chain.start(job)
        chain.wait_for(job)
        assert time.monotonic() - began < 60
        assert len(postmasters(target.root)) == 1
        eventually(lambda: len(chain.waiting()) == 1)
        listed = (path.name for path in (target.root / "run").iterdir())
        kept.append(sorted(name.partition(".")[0] for name in listed if not name.startswith(".")))

    assert target.psql("SELECT count(*), sum(n) FROM t") == "20|190"
    assert kept[1:] == kept[1:2] * 19
    assert len(list((target.root / "sockets").iterdir())) == 1
    dependencies = [word for word in (chain.folder / "submitted").read_text().split() if "dependency" in word]
    assert dependencies[:2] == ["--dependency=after:7+1?afterany:7", "--dependency=after:8+1?afterany:8"]
    ended = [json.loads(line) for line in (target.root / "log/events.jsonl").read_text().splitlines()]
    assert [each["reason"] for each in ended if each["state"] == "ended"] == [
        f"job {job} on {ended[0]['host']} takes over" for job in range(8, 28)
    ]


def test_successor_that_cannot_serve_is_named_and_the_predecessor_serves_on(chain: Chain) -> None:
    target = chain.instance
    first = chain.start()
    chain.wait_for("7")
    job = chain.successor()
    chain.configure(**ONE_PERCENT, bindir="/gone")

    assert chain.start(job).wait(20) == 1

    eventually(lambda: "cannot take over" in target.said("state")["reason"])
    assert f"but job 8 on {target.said('state')['host']} cannot take over: postgres does not run on" in (
        target.said("state")["reason"])
    assert first.poll() is None and target.said("endpoint")["job"] == "7"
    assert target.psql("SELECT 1") == "1"
    assert re.search("failed: cannot take over: postgres does not run on .*; job 7 continues to serve", target.log())


def test_successor_that_vanishes_before_it_takes_the_lease(chain: Chain) -> None:
    """The test asks for the lease, and does not take it."""
    target = chain.instance
    first = chain.start()
    chain.wait_for("7")
    target.psql("CREATE TABLE t AS SELECT 1 AS n")
    chain.successor()
    since = target.said("endpoint")["since"]
    with owner():
        asking = Successor(Layout(str(target.root)), "8")

        def ask() -> bool:
            asking.ask({"job": "7"})
            return target.said("answer").get("answer") == "accepted"

        eventually(ask)
        eventually(lambda: asking.ask({"job": "7"}) or not target.is_published())  # it releases the lease

    eventually(lambda: target.is_published() and target.said("endpoint")["since"] > since, 40)
    assert first.poll() is None and target.said("endpoint")["job"] == "7"
    eventually(lambda: "did not take over" in target.said("state")["reason"])
    assert target.psql("SELECT n FROM t") == "1"
    first.terminate()
    assert first.wait(20) == 0
    assert target.said("state")["reason"] == "stopped by SIGTERM"


def test_successor_that_dies_while_it_asks_changes_nothing(chain: Chain) -> None:
    target = chain.instance
    first = chain.start()
    chain.wait_for("7")
    since = target.said("endpoint")["since"]
    second = chain.start(chain.successor())
    eventually(lambda: target.said("request").get("job") == "8")
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    chain.set_state("8", "")

    time.sleep(15)

    assert first.poll() is None and target.said("endpoint")["since"] == since


def test_of_two_successors_one_takes_over_and_the_other_ends(chain: Chain) -> None:
    target = chain.instance
    chain.start()
    chain.wait_for("7")
    chain.successor()
    chain.configure(handover_after="50%")  # the next ones do not hand over at once

    others = [chain.start(job) for job in ("8", "9")]
    eventually(lambda: [each.poll() for each in others].count(None) == 1, 40)

    ended = others[0] if others[1].poll() is None else others[1]
    winner = "8" if ended is others[1] else "9"
    assert ended.returncode == 3
    assert target.said("endpoint")["job"] == winner
    assert f"; job {winner} hands over 600 s after its start; " in target.log()
    assert len(postmasters(target.root)) == 1


def test_successor_that_comes_too_early_ends(chain: Chain) -> None:
    chain.configure(handover_after="50%")
    first = chain.start()
    chain.wait_for("7")

    assert chain.start(chain.successor()).wait(20) == 3

    assert first.poll() is None and chain.instance.said("endpoint")["job"] == "7"


def test_stop_reaches_both_while_they_hand_over(chain: Chain) -> None:
    """As stop.yml does: the last job first."""
    target = chain.instance
    first = chain.start()
    chain.wait_for("7")
    second = chain.start(chain.successor())
    eventually(lambda: target.said("request").get("job") == "8")
    second.terminate()
    first.terminate()

    assert second.wait(30) == 0 and first.wait(30) == 0
    assert not target.is_published() and postmasters(target.root) == []


def test_heartbeats_that_stopped_with_the_server_are_renewed(chain: Chain) -> None:
    target = chain.instance
    chain.configure(**ONE_PERCENT, databases=["postgres"])
    chain.start()
    chain.wait_for("7")
    target.psql(
        "CREATE TABLE trials (trial_id int, state text);"
        "CREATE TABLE trial_heartbeats (trial_id int, heartbeat timestamp);"
        "INSERT INTO trials VALUES (1, 'RUNNING'), (2, 'COMPLETE');"
        "INSERT INTO trial_heartbeats SELECT trial_id, '2020-01-01' FROM trials"
    )
    job = chain.successor()
    chain.start(job)
    chain.wait_for(job)

    assert target.psql(
        "SET TIME ZONE 'UTC'; SELECT string_agg((localtimestamp - heartbeat < '1 min')::text, ' ' ORDER BY trial_id)"
        " FROM trial_heartbeats"
    ) == "true false"
