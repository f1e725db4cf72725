#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: abandoned_trials
short_description: Requeue stale trials
description:
  - Checks every C(RUNNING) trial in all study databases and requeues those whose worker has ended. Live workers can
    continue during the check.
  - A trial whose job was recorded by M(mala.hpc_db.optuna_study) is requeued once the scheduler no longer lists that
    job and no connection of that job is open.
  - A list of jobs without the job that hosts the server is considered incomplete and is not used.
  - Any other trial is requeued once no job of this user and no connection is left that could have started it. While
    this is unknown, the trial is left unchanged and the reason is returned.
  - As with Optuna's C(RetryFailedTrialCallback), the trial becomes C(FAIL), and a new trial with the same parameters
    and user attributes waits for a worker. Both happen in one transaction, and only if the trial is still
    C(RUNNING). If its worker is alive after all, Optuna refuses the worker's result.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: Database to connect to. O(user) must be a superuser.
    type: str
    required: true
  cluster:
    description: Name of the cluster, as in the workers' C(PGAPPNAME). Not used by O(scheduler=local).
    type: str
    required: true
  studies:
    description: Studies to check, each as C(database/study). If empty, all studies.
    type: list
    elements: str
    default: []
  other_jobs:
    description: Names of jobs that run no workers, in addition to the server job.
    type: list
    elements: str
    default: []
  clock_tolerance:
    description:
      - Maximum difference between the clocks of two nodes in seconds. Smaller differences between the times of trials
        and jobs are treated as unknown order.
      - A worker that sent a heartbeat within this time is alive.
    type: int
    default: 300
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
  - mala.hpc_db.scheduler
attributes:
  action_group:
    description: Use these groups in C(module_defaults) to set the options of each for several tasks.
    support: full
    membership: [mala.hpc_db.postgresql, mala.hpc_db.scheduler]
  check_mode:
    support: full
  diff_mode:
    support: full
seealso:
  - module: mala.hpc_db.optuna_study
"""

EXAMPLES = r"""
- name: Requeue stale trials
  mala.hpc_db.abandoned_trials:
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: alice
    name: hpc_db
    root: /home/alice/hpc_db/hpc_db
    cluster: hemera5
"""

RETURN = r"""
requeued:
  description: Trials that were, or would be, requeued.
  returned: success
  type: list
  elements: dict
  contains:
    study: &study
      description: Database and study, separated by a slash.
      type: str
    number: &number
      description: Number of the trial.
      type: int
    why:
      description: Reason why its worker is considered dead.
      type: str
    new_number:
      description: Number of the new trial. V(null) in check mode.
      type: int
left:
  description: Trials that were left unchanged.
  returned: success
  type: list
  elements: dict
  contains:
    study: *study
    number: *number
    why:
      description: Reason why it was left unchanged.
      type: str
    unknown:
      description: Whether it is unknown if its worker has ended.
      type: bool
"""

import datetime
import json
import socket
from collections.abc import Iterable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna, _workers
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import encodable_data, one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_name,
    hosts_of,
    make_run,
    serving_worker,
)
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS

# Revision of the schema that this module writes to: Optuna 3.2 to 5.
REVISION = "v3.2.0.a"

STUDIES = "SELECT study_name FROM studies"
TRIALS = """
SELECT study_name, number, trials.trial_id, datetime_start::text, extract(epoch FROM datetime_start)::float, value_json,
       extract(epoch FROM now() AT TIME ZONE 'UTC' - heartbeat)::float
FROM trials JOIN studies USING (study_id) LEFT JOIN trial_heartbeats USING (trial_id)
LEFT JOIN trial_system_attributes AS notes ON notes.trial_id = trials.trial_id AND key = %s
WHERE state = 'RUNNING' ORDER BY study_name, number
"""
CONNECTIONS = """
SELECT datname, application_name, coalesce(host(client_addr), ''), extract(epoch FROM pg_postmaster_start_time())::float
FROM pg_stat_activity WHERE backend_type = 'client backend'
"""

# Optuna locks the study before it adds a trial, because the new trial's number depends on the existing ones. So do we.
LOCK = "SELECT study_id FROM studies JOIN trials USING (study_id) WHERE trial_id = %(id)s FOR UPDATE OF studies"
FAIL = """
UPDATE trials SET state = 'FAIL', datetime_complete = %(now)s
WHERE trial_id = %(id)s AND state = 'RUNNING' AND datetime_start::text IS NOT DISTINCT FROM %(started)s
RETURNING number
"""
WAIT = """
INSERT INTO trials (study_id, number, state) SELECT study_id, greatest(count(*), max(number) + 1), 'WAITING' FROM trials
WHERE study_id = (SELECT study_id FROM trials WHERE trial_id = %(id)s) GROUP BY study_id RETURNING trial_id, number
"""
COPY = """
INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
SELECT %(new)s, param_name, param_value, distribution_json FROM trial_params WHERE trial_id = %(id)s;
INSERT INTO trial_user_attributes (trial_id, key, value_json)
SELECT %(new)s, key, value_json FROM trial_user_attributes WHERE trial_id = %(id)s;
INSERT INTO trial_system_attributes (trial_id, key, value_json)
SELECT %(new)s, key, value_json FROM trial_system_attributes WHERE trial_id = %(id)s
AND key NOT IN (%(note)s, 'failed_trial', 'retry_history');
INSERT INTO trial_system_attributes (trial_id, key, value_json)
SELECT %(new)s, 'failed_trial', coalesce(max(value_json), %(number)s::text) FROM trial_system_attributes
WHERE trial_id = %(id)s AND key = 'failed_trial';
INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (%(new)s, 'retry_history', %(history)s)
"""
HISTORY = "SELECT value_json FROM trial_system_attributes WHERE trial_id = %s AND key = 'retry_history'"


class Refused(Exception):
    """The request does not fit the existing databases or studies; the message is for the user."""


def look_into(params: dict, database: str) -> tuple[list[str], list[_workers.Trial]]:
    """Return the studies in a database and their running trials; none if Optuna has no schema there."""
    with _connection.connect(params, database) as connection:
        if not _optuna.has_schema(connection):
            return [], []
        schema = _optuna.read_schema(connection)
        if schema and schema.revision != REVISION:
            raise Refused(
                f"database {database}: Optuna's schema {schema.revision} there was made by Optuna "
                f"{schema.library}, but trials can be requeued only in {REVISION}, that of Optuna 3.2 to 5"
            )
        studies = [name for name, in _connection.rows(connection, STUDIES)]
        trials = [_workers.Trial(database, *row) for row in _connection.rows(connection, TRIALS, (_workers.KEY,))]
    return studies, trials


def running_trials(params: dict) -> tuple[list[_workers.Trial], list[str]]:
    """Return the running trials of the selected studies, and one line for each database that cannot be read.

    An unreadable database is an error if no other database has studies or one of its studies is selected.
    """
    with _connection.connect(params, params["database"]) as connection:
        databases = [name for name, in _connection.rows(connection, _connection.DATABASES)]
    found: dict[str, tuple[list[str], list[_workers.Trial]]] = {}
    unreadable: list[str] = []
    for database in databases:
        try:
            found[database] = look_into(params, database)
        except (Refused, _connection.Unreachable) as error:
            if any(study.startswith(f"{database}/") for study in params["studies"]):
                raise
            unreadable.append(str(error))
    if unreadable and not any(names for names, _trials in found.values()):
        raise Refused("; ".join(unreadable))
    known = {f"{database}/{name}" for database, (names, _trials) in found.items() for name in names}
    for study in params["studies"]:
        if study not in known:
            raise Refused(
                f"requeue_studies: {study} is not allowed; existing studies: {', '.join(sorted(known)) or 'none'}"
            )
    trials = [
        trial for _names, trials in found.values() for trial in trials
        if not params["studies"] or name_of(trial) in params["studies"]
    ]
    return trials, unreadable


def name_of(trial: _workers.Trial) -> str:
    """Return the study's name as used in messages."""
    return f"{trial.database}/{trial.study}"


def look_around(params: dict, run: Run, trials: list[_workers.Trial]) -> _workers.World:
    """Return the state of the cluster: first the connections, then the jobs.

    Both are read after the trials. A worker that had started one of these trials was in a job by then and, if it is
    alive, still is.
    """
    scheduler = SCHEDULERS[params["scheduler"]]
    with _connection.connect(params, params["database"]) as connection:
        rows = _connection.rows(connection, CONNECTIONS)
    connections = [_workers.Connection(*row[:3]) for row in rows if row[1] not in _workers.TOOLS]
    names = [connection.name for connection in connections]
    names += [str(_workers.read_note(trial).get("name", "")) for trial in trials]
    ids = sorted({worker.job for worker in map(_workers.worker_of, names) if worker})
    jobs = scheduler.parse_jobs(run(scheduler.jobs_command(ids)))
    local = params["scheduler"] == "local"
    worker = serving_worker(Layout(params["root"]))
    hosts = [job for job in jobs if (job.id == worker if worker else job.name == params["name"])]
    if trials and not local and not hosts:
        raise Refused(
            f"the scheduler does not list {worker or params['name']}, the job that hosts the server; so it may not "
            "list the jobs of workers either, and no trial is requeued"
        )
    jobs = [job for job in jobs if job.name not in (params["name"], *params["other_jobs"])]
    return _workers.World(
        cluster=socket.gethostname() if local else params["cluster"],
        connections=connections,
        jobs=jobs,
        addresses=addresses(() if local else hosts_of(scheduler, {job.nodes for job in jobs}, run))
        - addresses([params["host"]]),
        server_start=rows[0][3],
        tolerance=params["clock_tolerance"],
        boot=boot_time() if local else None,
    )


def addresses(hosts: Iterable[str]) -> set[str]:
    """Return the addresses of the hosts whose names this host can resolve."""
    found: set[str] = set()
    for host in hosts:
        try:
            found.update(str(entry[4][0]) for entry in socket.getaddrinfo(host, None))
        except OSError:
            continue
    return found


def boot_time() -> float:
    """Return this machine's boot time in seconds since 1970; 0 if it is unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            return next((float(line.split()[1]) for line in stream if line.startswith("btime ")), 0.0)
    except OSError:
        return 0.0


def now() -> datetime.datetime:
    """Return the current time as the installed Optuna stores it: local before Optuna 5, UTC since."""
    optuna = optuna_schema.installed_optuna()
    if optuna and int(optuna.version.partition(".")[0]) < 5:
        return datetime.datetime.now()
    return datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)


def numbers(held: str | None) -> list[int]:
    """Return the trial numbers that an attribute lists; none if its value is not as Optuna writes it."""
    value = _optuna.attribute(held)
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []


def requeue(params: dict, trial: _workers.Trial) -> int | None:
    """Fail a trial and add a waiting copy; return the copy's number. Return None if the trial is no longer running."""
    values = {
        "id": trial.trial_id, "started": trial.started, "number": trial.number, "now": now(), "note": _workers.KEY,
    }
    with _connection.connect(params, trial.database) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN; SET LOCAL lock_timeout = '20s'")
        cursor.execute(LOCK, values)
        cursor.execute(FAIL, values)
        if not cursor.fetchall():
            cursor.execute("ROLLBACK")
            return None
        cursor.execute(WAIT, values)
        ((new, number),) = cursor.fetchall()
        history = [each for held, in _connection.rows(connection, HISTORY, (trial.trial_id,)) for each in numbers(held)]
        cursor.execute(COPY, {**values, "new": new, "history": json.dumps([*history, trial.number])})
        cursor.execute("COMMIT")
    return number


def ensure_requeued(params: dict, run: Run, check_mode: bool) -> dict:
    """Requeue the trials whose workers have gone. ``run`` takes an argument list and returns its stdout."""
    check_name(params["name"])
    trials, unreadable = running_trials(params)
    world = look_around(params, run, trials)
    requeued: list[dict] = []
    left: list[dict] = []
    refused: dict[str, str] = {}  # by study: every further trial of a locked study would wait just as long
    for trial in trials:
        verdict = _workers.judge(trial, world)
        told = {"study": name_of(trial), "number": trial.number, "why": verdict.why}
        new_number = None
        if verdict.gone and not check_mode and name_of(trial) not in refused:
            try:
                new_number = requeue(params, trial)
            except _connection.Unreachable as error:
                if error.sqlstate is None:
                    raise
                refused[name_of(trial)] = str(error)
        if verdict.gone and name_of(trial) in refused:
            left.append({**told, "why": f"it could not be requeued: {refused[name_of(trial)]}", "unknown": False})
        elif not verdict.gone:
            left.append({**told, "unknown": verdict.unknown})
        elif check_mode or new_number is not None:
            requeued.append({**told, "new_number": new_number})
        else:
            left.append({**told, "why": "it has ended in the meantime", "unknown": False})
    return {
        "changed": bool(requeued),
        "requeued": requeued,
        "left": left,
        "warnings": [f"{why}; its trials are left alone" for why in unreadable],
        "diff": {
            "before": "".join(f"{trial['study']} {trial['number']}: RUNNING\n" for trial in requeued),
            "after": "".join(f"{trial['study']} {trial['number']}: FAIL, and WAITING anew\n" for trial in requeued),
        },
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "cluster": {"type": "str", "required": True},
            "studies": {"type": "list", "elements": "str", "default": []},
            "other_jobs": {"type": "list", "elements": "str", "default": []},
            "clock_tolerance": {"type": "int", "default": 300},
            **ARGUMENT_SPEC,
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_requeued(module.params, make_run(module), module.check_mode)
        for warning in result.pop("warnings"):
            module.warn(one_line(warning))
    except (_connection.Unreachable, SchedulerError, Refused, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**encodable_data(result))


if __name__ == "__main__":
    main()
