# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""At most one server writes to the data directory, whatever happens to nodes, jobs and processes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from mini_cluster import MiniCluster, Process, Watch, eventually, on_host, other_node

HOST_PROGRAM = "cd hpc_db/hpc_db/host && exec python3 -m hpc_db_host serve --root ~/hpc_db/hpc_db"
BY_HAND = f'sbatch --job-name=by_hand --mem=500M --output=by_hand.log --nodelist=$1 --wrap="{HOST_PROGRAM} $2"'
Figure = Callable[[str, str], None]


@pytest.fixture
def no_job(cluster: MiniCluster) -> Iterator[None]:
    """Ensure that there is no server, and no job that would start one."""
    for job, state in cluster.jobs().items():
        cluster.run("scontrol hold $1 || true" if state == "PENDING" else "scancel $1", job)
    eventually(lambda: "RUNNING" not in cluster.jobs().values() and not cluster.postmasters(), 30)
    if not cluster.jobs():  # a placeholder takes the successor's job name, so that no server submits one
        cluster.run("sbatch --job-name=hpc_db --hold --wrap true")
    yield
    for program in cluster.host_programs():  # left by a test that failed
        os.kill(program.pid, signal.SIGTERM)
    cluster.run("scancel --name=hpc_db")
    eventually(lambda: not cluster.jobs(), 30)


@pytest.mark.usefixtures("no_job")
def test_two_starts_at_once(cluster: MiniCluster, figure: Figure, soak: bool) -> None:
    began = time.monotonic()
    rounds = 0
    while time.monotonic() - began < 30 or soak and rounds < 20:
        starts = [cluster.start(host, f"{HOST_PROGRAM} --lease-patience 0") for host in ("c1", "c2")]
        eventually(lambda: any(start.poll() is not None for start in starts), 20)  # noqa: B023
        refused = next(start for start in starts if start.poll() is not None)
        assert refused.returncode == 3
        assert "failed: the data directory is held by job" in refused.communicate()[0]
        eventually(cluster.is_serving, 20)
        assert len(cluster.postmasters()) == 1

        (program,) = cluster.host_programs()
        os.kill(program.pid, signal.SIGTERM)
        starts.remove(refused)
        starts[0].communicate(timeout=20)
        assert starts[0].returncode == 0
        rounds += 1
    figure("D1", f"1 postmaster in {rounds} of {rounds} rounds")


def test_second_job_by_hand(cluster: MiniCluster, serving: dict, figure: Figure) -> None:
    cluster.run(BY_HAND, other_node(serving), "--lease-patience 3")
    eventually(lambda: not cluster.jobs("by_hand"), 30)

    said = (cluster.home / "by_hand.log").read_text().splitlines()[-1]
    (cluster.home / "by_hand.log").unlink()
    holder = rf"job {serving['job']} on {serving['host']} \(PID \d+\) since 20\S+ \S+ UTC"
    assert re.search(f"failed: the data directory is held by {holder}", said)
    assert cluster.said("endpoint")["since"] == serving["since"]
    figure("D2", "refused, names job, node and since")


def test_pid_of_a_dead_server_is_an_innocent_process(cluster: MiniCluster, serving: dict, figure: Figure) -> None:
    node = serving["host"]
    pid_file = cluster.root / "data" / "17" / "postmaster.pid"
    cluster.run("scontrol update nodename=$1 state=drain reason=test", other_node(serving), host="ctl", user="root")
    innocent = cluster.start(node, "echo $$; exec sleep 1234")
    assert innocent.stdout
    pid = innocent.stdout.readline().strip()

    def sleepers() -> list[Process]:
        return [process for process in cluster.processes("sleep") if "1234" in process.command]

    eventually(sleepers, 30)
    (sleeper,) = sleepers()

    # The supervisor comes last: its end ends the job, and Slurm kills the rest of it.
    doomed = [*cluster.postmasters(), *cluster.host_programs()]
    for process in doomed:
        os.kill(process.pid, signal.SIGSTOP)
    pid_file.write_text("\n".join([pid, *pid_file.read_text().split("\n")[1:]]))
    for process in doomed:
        os.kill(process.pid, signal.SIGKILL)
    cluster.wait_for_another(serving, 60)
    started = cluster.said("endpoint")

    assert started["host"] == node
    cluster.mend(other_node(serving))
    cluster.run("scancel $1", started["job"])
    cluster.wait_for_another(started, 60)
    assert innocent.poll() is None
    os.kill(sleeper.pid, signal.SIGKILL)
    innocent.communicate()
    figure("D4", "starts; the innocent process lives")


def test_hosting_program_is_killed(cluster: MiniCluster, serving: dict, watch: Watch, figure: Figure) -> None:
    (program,) = cluster.host_programs()
    os.kill(program.pid, signal.SIGKILL)
    gone = eventually(lambda: not on_host(cluster.processes("postgres"), serving["host"]), 10, 0.02)

    assert gone <= 2
    cluster.wait_for_another(serving, 90)
    watch.wait_for_acknowledgement(60)
    figure("D5", f"postgres gone after {gone:.1f} s; workers wait {watch.gap(serving['at']):.0f} s")


def test_node_is_cut_off(cluster: MiniCluster, serving: dict, watch: Watch, figure: Figure) -> None:
    node, ttl, log = serving["host"], cluster.settings()["lease_ttl"], len(cluster.log())
    client = cluster.start("c3", CLIENT)
    assert client.stdout
    assert client.stdout.readline() == "connected\n"
    cut = time.monotonic()
    cluster.verb("cut", node)

    talking, connecting = map(float, client.communicate(timeout=60)[0].split())
    assert talking <= 25 and connecting <= 25
    figure("L6", f"error after {talking:.1f} s, in a new connection after {connecting:.1f} s")

    # Slurm moves the job to another node, where it waits: the node that was cut off still renews the lease.
    eventually(lambda: on_host(cluster.host_programs(), other_node(serving)), 90)
    elsewhere = time.monotonic() - cut
    epoch = newest(cluster, "lease")
    while time.monotonic() - cut < 120:
        beat = (cluster.root / "run" / f"hb.{epoch}").read_text()
        time.sleep(ttl / 3)
        assert (cluster.root / "run" / f"hb.{epoch}").read_text() != beat
        assert newest(cluster, "lease") == epoch
        assert [process.host for process in cluster.postmasters()] == [node]
    whole = time.monotonic() - cut
    assert "its job has ended, but its heartbeat continues: its node may be cut off" in cluster.log()[log:]

    cluster.mend(node)
    cluster.wait_for_another(serving, 120)
    watch.wait_for_acknowledgement(60)
    figure("L5", f"8 workers wait up to {watch.gap(cut):.0f} s and go on, two of them with heartbeats (L7)")
    figure("D6", f"1 writer during {whole:.0f} s; the job was elsewhere after {elsewhere:.0f} s")


def test_node_is_killed(cluster: MiniCluster, serving: dict, watch: Watch, figure: Figure) -> None:
    target = cluster.slurm("SlurmdTimeout") + cluster.settings()["lease_ttl"] + 15
    killed = time.monotonic()
    cluster.verb("kill", serving["host"])
    page = cluster.playbooks.play("status")  # before Slurm notices
    assert page.returncode == 0, page.stdout
    assert f"endpoint     {serving['host']} port " in page.stdout
    assert re.search(r"PostgreSQL   does not answer: database alice: .*(timeout expired|No route to host)", page.stdout)

    eventually(lambda: on_host(cluster.host_programs(), other_node(serving)), 90)
    elsewhere = time.monotonic() - killed
    back = elsewhere + cluster.wait_for_another(serving, 180)

    watch.wait_for_acknowledgement(60)
    figure("D7", f"back after {back:.0f} s ({target} wanted), {elsewhere:.0f} of them until Slurm has the job start "
                 f"elsewhere; {watch.gap(serving['at']):.0f} s without a result")
    assert back <= target
    assert back - elsewhere <= cluster.settings()["lease_ttl"] + 5  # the rest of the time is Slurm's


def test_hosting_program_is_frozen(cluster: MiniCluster, serving: dict, figure: Figure) -> None:
    ttl = cluster.settings()["lease_ttl"]
    (program,) = cluster.host_programs()
    os.kill(program.pid, signal.SIGSTOP)
    cluster.run(BY_HAND, other_node(serving), f"--lease-patience {ttl + 8}")
    log = cluster.home / "by_hand.log"
    eventually(lambda: log.exists() and "its heartbeat has stopped, but its job has not ended" in log.read_text(),
               ttl + 30)
    epoch = newest(cluster, "lease")
    beat = (cluster.root / "run" / f"hb.{epoch}").read_text()
    os.kill(program.pid, signal.SIGCONT)

    renewed = eventually(lambda: (cluster.root / "run" / f"hb.{epoch}").read_text() != beat, ttl)
    eventually(lambda: not cluster.jobs("by_hand"), ttl + 30)
    assert "failed: the data directory is held by" in log.read_text()
    figure("D8", f"frozen for {ttl + 8} s: 1 writer, and the lease is renewed {renewed:.1f} s after it goes on")
    assert cluster.said("endpoint")["since"] == serving["since"]


CLIENT = """
exec hpc_db/hpc_db/python/bin/python -u - <<'END'
import psycopg2, time
connection = psycopg2.connect("service=hpc_db")
connection.autocommit = True
cursor = connection.cursor()
print("connected")
for again in (lambda: cursor.execute("SELECT 1"), lambda: psycopg2.connect("service=hpc_db")):
    try:
        while True:
            began = time.time()
            again()
            time.sleep(0.5)
    except psycopg2.OperationalError:
        print(time.time() - began)
END
"""


def newest(cluster: MiniCluster, kind: str) -> int:
    return max(int(path.suffix[1:]) for path in (cluster.root / "run").glob(f"{kind}.*"))
