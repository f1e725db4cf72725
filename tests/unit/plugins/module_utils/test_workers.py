# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the worker of a trial is gone. In doubt it is not."""

from __future__ import annotations

import json

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._workers import (
    Connection,
    Job,
    Trial,
    Worker,
    World,
    judge,
    worker_of,
)

NOW = 1_800_000_000.0
HOUR = 3600
NAME = "hpc_db 12.0 mini c1 4711"
BEGUN = NOW - 2 * HOUR


def trial(name: str | None = None, begun: float = BEGUN, **rows) -> Trial:
    """A trial whose worker was recorded under a name; without a name, a trial without such a record."""
    note = None if name is None else json.dumps({"name": name, "address": "10.0.0.1", "since": begun})
    given = {"started": "2027-01-15 06:00:00", "start": begun, "heartbeat_age": None, **rows}
    return Trial("mala", "beryllium", 7, 70, note=note, **given)


def world(connections=(), jobs=(), addresses=(), **settings) -> World:
    given = {"cluster": "mini", "server_start": NOW - 10 * HOUR, "tolerance": 300, "boot": None, **settings}
    return World(connections=list(connections), jobs=list(jobs), addresses=set(addresses), **given)


def job(job_id="12", restart="0", state="RUNNING", start=NOW - 3 * HOUR, nodes="c1") -> Job:
    return Job(job_id, restart, state, start, nodes, "train")


@pytest.mark.parametrize("name, worker", [
    (NAME, Worker("12", "0", "mini")),
    ("hpc_db 12.1 mini", Worker("12", "1", "mini")),
    ("hpc_db 4711.99887766 node-1.site.de node-1.site.de 4711", Worker("4711", "99887766", "node-1.site.de")),
    ("hpc_db .0 mini login 5", None),  # read outside of a job
    ("hpc_db 4711. mac mac 4711", None),  # read where there is no /proc
    ("python", None),
    ("", None),
])
def test_worker_is_known_by_its_connections_name(name, worker):
    assert worker_of(name) == worker


@pytest.mark.parametrize("around, gone, unknown, says", [
    (world(), True, False, "job 12 has ended and has no connection"),
    (world(jobs=[job("13")]), True, False, "job 12 has ended"),
    (world(jobs=[job()]), False, False, "job 12 is RUNNING on c1"),
    (world(jobs=[job(state="COMPLETING")]), False, False, "job 12 is COMPLETING"),
    (world(jobs=[job(state="TELEPORTING")]), False, False, "job 12 is TELEPORTING"),
    (world(jobs=[job(restart="1")]), True, False, "job 12 has been queued again since"),
    (world(jobs=[job(restart="1", state="PENDING", nodes="", start=None)]), True, False, "queued again"),
    (world(jobs=[job(restart="")]), False, False, "job 12 is RUNNING on c1"),
    # Slurm has given up a node that is cut off, but the worker there has not ended.
    (world([Connection("mala", NAME, "10.0.0.1")]), False, False, "job 12 has an open connection"),
    (world([Connection("mala", NAME, "10.0.0.1")], [job(restart="1")]), False, False, "has an open connection"),
    (world([Connection("mala", "hpc_db 13.0 mini c1 5", "10.0.0.1")]), True, False, "has ended"),
    (world([Connection("mala", "", "10.0.0.1")]), True, False, "has ended"),
    (world(cluster="other"), False, True, "job 12 belongs to the cluster mini"),
])
def test_trial_that_is_tied_to_a_job(around, gone, unknown, says):
    verdict = judge(trial(NAME), around)

    assert (verdict.gone, verdict.unknown) == (gone, unknown)
    assert says in verdict.why


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("around, gone, says", [
    (world(), True, "no connection and no job from its start"),
    (world(jobs=[job(start=NOW - 3 * HOUR)]), False, "job 12 (train) may be its worker"),
    (world(jobs=[job(start=None)]), False, "job 12 (train) may be its worker"),
    (world(jobs=[job(start=None, state="PENDING", nodes="")]), True, "no job from its start"),
    (world([Connection("other", "", "10.0.0.9")]), True, "no connection"),
    (world([Connection("mala", "", "10.0.0.9")]), False, "a connection from 10.0.0.9 (no name) may be its worker's"),
    (world([Connection("mala", "", "")]), False, "a connection from the server's own machine"),
    (world([Connection("mala", NAME, "10.0.0.9")]), False, "a connection from 10.0.0.9"),  # from a job that has ended
])
def test_trial_of_an_unknown_worker(noted, around, gone, says):
    verdict = judge(trial("" if noted else None), around)

    assert (verdict.gone, verdict.unknown) == (gone, not gone)
    assert says in verdict.why


@pytest.mark.parametrize("job_began_after, gone", [(-HOUR, False), (0, False), (299, False), (301, True), (HOUR, True)])
def test_job_that_began_after_the_trial_is_not_its_worker(job_began_after, gone):
    later = job(start=BEGUN + job_began_after)
    connections = [Connection("mala", "", "10.0.0.1"), Connection("mala", NAME, "10.0.0.2")]

    assert judge(trial(""), world(connections, [later], ["10.0.0.1"])).gone is gone


@pytest.mark.parametrize("hours_after, gone", [(1, False), (11, False), (12, False), (13, True)])
def test_time_that_may_be_local_is_taken_for_the_latest_that_it_can_be(hours_after, gone):
    later = job(start=BEGUN + hours_after * HOUR)

    assert judge(trial(), world(jobs=[later])).gone is gone
    assert judge(trial(begun=BEGUN, start=None), world(jobs=[later])).gone is False


@pytest.mark.parametrize("age, gone", [(None, True), (-7200.0, False), (0.0, False), (299.0, False), (301.0, True)])
@pytest.mark.parametrize("name", [NAME, ""])
def test_heartbeat_shows_that_a_worker_lives(name, age, gone):
    assert judge(trial(name, heartbeat_age=age), world()).gone is gone


@pytest.mark.parametrize("settings, gone, says", [
    ({"boot": NOW - HOUR}, True, "this machine has been restarted since"),
    ({"boot": NOW - 20 * HOUR, "server_start": NOW - 3 * HOUR}, True, "the server has not been stopped since"),
    ({"boot": NOW - 20 * HOUR, "server_start": NOW - HOUR}, False, "the server may have been stopped"),
    ({"boot": NOW - 20 * HOUR, "server_start": BEGUN - 200}, False, "the server may have been stopped"),
])
def test_without_a_scheduler_a_connection_tells(settings, gone, says):
    process = job(start=None)  # its connections have names, so it is not this trial's worker
    verdict = judge(trial(""), world([Connection("mala", NAME, "")], [process], **settings))

    assert (verdict.gone, verdict.unknown) == (gone, not gone)
    assert says in verdict.why
    assert judge(trial(""), world([Connection("mala", "", "")], **settings)).gone is False


@pytest.mark.parametrize("note", ["", "no json", "[]", "{}", '{"since": "now"}', '{"name": 5}'])
def test_note_that_somebody_else_has_written_is_none(note):
    assert judge(trial()._replace(note=note), world(jobs=[job(start=BEGUN + HOUR)])).unknown is True
