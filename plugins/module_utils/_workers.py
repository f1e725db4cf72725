# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds a trial's worker, and whether that worker has gone.

Optuna does not store a trial's worker. A trigger in the database does: it records the connection under which a trial
became RUNNING, for any client. If the worker's job script sets PGAPPNAME, the record names its job.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import Job

# Key of the attribute; Optuna reads it like any other and ignores it.
KEY = "hpc_db:worker"
TRIGGER = "hpc_db_worker"

# A trial must continue even if it cannot be recorded.
NOTE = f"""
BEGIN
  INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
  VALUES (NEW.trial_id, '{KEY}', json_build_object(
    'name', current_setting('application_name'), 'address', host(inet_client_addr()),
    'since', extract(epoch FROM clock_timestamp()))::text)
  ON CONFLICT (trial_id, key) DO UPDATE SET value_json = EXCLUDED.value_json;
  RETURN NULL;
EXCEPTION WHEN OTHERS THEN
  RETURN NULL;
END
"""
NOTES = f"""
SELECT prosrc FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
WHERE tgrelid = to_regclass('public.trials') AND tgname = '{TRIGGER}'
"""
# Statements sent in one call are one transaction. It waits for running transactions, but at most for lock_timeout.
TAKE_NOTES = f"""
SET lock_timeout = '20s';
CREATE OR REPLACE FUNCTION public.{TRIGGER}() RETURNS trigger LANGUAGE plpgsql AS $note${NOTE}$note$;
DROP TRIGGER IF EXISTS {TRIGGER} ON public.trials;
CREATE TRIGGER {TRIGGER} AFTER INSERT OR UPDATE OF state ON public.trials
FOR EACH ROW WHEN (NEW.state = 'RUNNING') EXECUTE FUNCTION public.{TRIGGER}()
"""

# Name of a worker's connections: hpc_db, job, restart, cluster, and for readers host and PID.
NAME = re.compile(r"hpc_db (?P<job>\S+)\.(?P<restart>[^\s.]+) (?P<cluster>\S+)(?: (?P<host>\S+))?.*")

# Optuna before 5 writes local time: at most this much behind and ahead of UTC, in seconds.
BEHIND_UTC, AHEAD_OF_UTC = 12 * 3600, 14 * 3600

# A job in this state has no processes.
WAITING = "PENDING"

# Connections of the collection's own programs and of PostgreSQL's programs, which run no trials.
TOOLS = {"hpc_db", "hpc_db doctor", "mala.hpc_db", "pg_dump", "pg_restore", "psql"}


class Worker(NamedTuple):
    """A worker, as named by its connections."""

    job: str
    restart: str
    cluster: str


class Trial(NamedTuple):
    """The data of a RUNNING trial, with ages in seconds and times in seconds since 1970."""

    database: str
    study: str
    number: int
    trial_id: int
    started: str | None
    start: float | None
    note: str | None
    heartbeat_age: float | None


class Connection(NamedTuple):
    """An open connection to a study database; the address is empty on the server's own machine."""

    database: str
    name: str
    address: str


class World(NamedTuple):
    """The state of the cluster: connections, then jobs, both read after the trials.

    ``addresses`` are those of the jobs' nodes. ``boot`` is this machine's boot time, if there is no scheduler.
    """

    cluster: str
    connections: list[Connection]
    jobs: list[Job]
    addresses: set[str]
    server_start: float
    tolerance: float
    boot: float | None


class Verdict(NamedTuple):
    """Whether a trial's worker has gone, and the reason for this conclusion or for the uncertainty."""

    gone: bool
    why: str
    unknown: bool = False


def worker_of(name: str) -> Worker | None:
    """Return the worker named by a connection; None if the name is not a worker's."""
    found = NAME.fullmatch(name)
    return Worker(found["job"], found["restart"], found["cluster"]) if found else None


def read_note(trial: Trial) -> dict:
    """Return the trigger's record; empty if the trial is older than the trigger."""
    try:
        note = json.loads(trial.note or "{}")
    except ValueError:
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("since"), (int, float)) else {}


def span_of_start(trial: Trial) -> tuple[float, float] | None:
    """Return the earliest and the latest possible start of the trial."""
    noted = read_note(trial).get("since")
    if noted is not None:
        return noted, noted
    if trial.start is None:
        return None
    return trial.start - AHEAD_OF_UTC, trial.start + BEHIND_UTC


def is_later(restart: str, before: str) -> bool:
    """Return whether a job has been restarted since. A worker may report more restarts than its job has had.

    A job submitted from within another job inherits its SLURM_RESTART_COUNT, until it is restarted itself.
    """
    return restart.isdigit() and before.isdigit() and int(restart) > int(before)


def judge(trial: Trial, world: World) -> Verdict:
    """Return whether the worker of a trial has gone."""
    age = trial.heartbeat_age
    if age is not None and age < world.tolerance:
        return Verdict(False, f"its worker sent a heartbeat {max(age, 0):.0f} s ago")
    name = str(read_note(trial).get("name", ""))
    worker = worker_of(name)
    if worker is None:
        return judge_by_time(trial, world)
    if any(connection.name == name for connection in world.connections):
        return Verdict(False, f"job {worker.job} has an open connection")
    if worker.cluster != world.cluster:
        return Verdict(False, f"job {worker.job} belongs to the cluster {worker.cluster}; requeue there", True)
    for job in world.jobs:
        if job.id == worker.job and is_later(job.restart, worker.restart):
            return Verdict(True, f"job {job.id} has been queued again since")
        if job.id == worker.job:
            return Verdict(False, f"job {job.id} is {job.state}{f' on {job.nodes}' if job.nodes else ''}")
    return Verdict(True, f"job {worker.job} has ended and has no connection")


def judge_by_time(trial: Trial, world: World) -> Verdict:
    """Return whether no job or connection that may have started the trial is left."""
    span = span_of_start(trial)
    # Without a scheduler the only jobs are processes with named connections, and this trial's connection has no name.
    jobs = [] if world.boot is not None and read_note(trial) else world.jobs
    older = [
        job for job in jobs
        if job.state != WAITING and (not (job.start and span) or job.start <= span[1] + world.tolerance)
    ]
    known = {(job.id, job.restart, world.cluster) for job in world.jobs}
    strangers = [
        connection for connection in world.connections
        if connection.database == trial.database
        and worker_of(connection.name) not in known
        and connection.address not in world.addresses
    ]
    if strangers:
        where = strangers[0].address or "the server's own machine"
        return Verdict(False, f"a connection from {where} ({strangers[0].name or 'no name'}) may be its worker's", True)
    if older:
        return Verdict(False, f"job {older[0].id} ({older[0].name}) may be its worker", True)
    if world.boot is None:
        return Verdict(True, "no connection and no job from its start are left")
    if span and span[1] + world.tolerance < world.boot:
        return Verdict(True, "this machine has been restarted since it began")
    # On a single machine a connection ends only with its worker or with the server.
    if span and span[0] - world.tolerance > world.server_start:
        return Verdict(True, "its connection is closed, and the server has not been stopped since it began")
    return Verdict(False, "the server may have been stopped since it began, and its worker may wait", True)
