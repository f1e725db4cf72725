# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Optuna's tables reveal about the version that made them and about the clocks of workers.

Optuna is imported only where its trials are read anyway, because the import takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils.host.optuna_schema import (
    HAS_SCHEMA,
    SCHEMA,
    Optuna,
    Schema,
    is_newer,
    is_older,
)

# Trials are numbered in the order of their start, except for trials that waited: Optuna marks some of them, and the
# others start at any time. Time zones differ by multiples of half an hour; clocks of nodes, and the starts of two
# consecutive trials, by less than two minutes.
CLOCKS = """
WITH steps AS (
  SELECT study_id, extract(epoch FROM greatest(datetime_start, datetime_complete) - now() AT TIME ZONE 'UTC') AS ahead,
         extract(epoch FROM lag(datetime_start) OVER (PARTITION BY study_id ORDER BY number) - datetime_start) AS back
  FROM trials WHERE datetime_start IS NOT NULL AND NOT EXISTS (
    SELECT FROM trial_system_attributes AS marks WHERE marks.trial_id = trials.trial_id
    AND key IN ('fixed_params', 'failed_trial', 'retry_history'))
)
SELECT study_name, coalesce(max(ahead), 0)::float,
       count(*) FILTER (WHERE back BETWEEN 1680 AND 50400 AND mod(back, 1800) NOT BETWEEN 1 AND 1680),
       count(*) FILTER (WHERE back >= 1680)
FROM studies JOIN steps USING (study_id) GROUP BY study_name ORDER BY study_name
"""
LONGEST_SHOWN = 60
ENDED = ("COMPLETE", "PRUNED", "FAIL")

# Maximum difference between the clocks of two nodes in seconds.
AHEAD_SECONDS = 300
# Fewer steps, or fewer than half of all, may be chance: 7 % of the steps of trials that waited look like half hours.
FEWEST_STEPS = 3


def has_schema(connection: Any) -> bool:
    """Return whether a database has Optuna's tables."""
    return _connection.rows(connection, HAS_SCHEMA) == [("version_info", "alembic_version")]


def read_schema(connection: Any) -> Schema | None:
    """Return the schema of a database that has Optuna's tables; None if it is incomplete.

    Optuna writes its version last, and completes a schema without it.
    """
    versions = _connection.rows(connection, SCHEMA)
    return Schema(*versions[0]) if versions else None


def mismatch(database: str, schema: Schema, optuna: Optuna) -> str:
    """Return why the installed Optuna cannot use the schema, and the remedy; empty if it can, as far as is known."""
    if not (is_older(schema, optuna) or is_newer(schema, optuna)):
        return ""
    said = f"database {database}: Optuna's schema {schema.revision} there was made by Optuna {schema.library}"
    if is_older(schema, optuna):
        return (
            f"{said}, but the installed Optuna {optuna.version} needs {optuna.revisions[0]}: set "
            "databases_upgrade_schema to true once the workers also have that Optuna, or set "
            f"optuna=={schema.library} in postgres_python_packages"
        )
    return (
        f"{said}, which is newer than the installed Optuna {optuna.version}: set optuna=={schema.library} in "
        "postgres_python_packages"
    )


def attribute(value_json: str | None) -> Any:
    """Return an attribute's value; the stored text if it is not JSON."""
    try:
        return json.loads(value_json or "")
    except (ValueError, RecursionError):
        return value_json


def cut(value: Any) -> str:
    """Return a value as text, shortened for a message."""
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def read_trials(storage: Any, study_id: int) -> tuple[list[Any], list[str]]:
    """Return a study's trials, and a line for each unreadable one. Optuna itself reads all trials or none."""
    try:
        return storage.get_all_trials(study_id, deepcopy=False), []
    except Exception as error:  # any error of Optuna and SQLAlchemy
        if is_lost(error) or not hasattr(storage, "engine"):
            raise
    with storage.engine.connect() as connection:
        query = f"SELECT trial_id, number FROM trials WHERE study_id = {int(study_id)} ORDER BY trial_id"
        held = connection.exec_driver_sql(query).fetchall()
    trials, unreadable = [], []
    for trial_id, number in held:
        try:
            trials.append(storage.get_trial(trial_id))
        except Exception as error:  # as above
            if is_lost(error):
                raise
            unreadable.append(f"trial {number} cannot be read: {said(error)}")
    return trials, unreadable


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: Optuna's, SQLAlchemy's, the driver's."""
    while error:
        yield error
        error = error.__cause__


def said(error: BaseException) -> str:
    """Return the root cause and its type in one line: Optuna's own message is the same for all causes."""
    *_others, first = causes(error)
    return f"{type(first).__name__}: {' '.join(str(first).split())}".rstrip(": ")


def is_lost(error: Exception) -> bool:
    """Return whether the connection to the database failed, so that the error does not concern a single row."""
    return any(
        getattr(each, "connection_invalidated", False)  # set by SQLAlchemy
        or getattr(each, "pgcode", "") is None  # set by psycopg2, for an error that is not the server's
        for each in causes(error)
    )


def oddities(trials: list[Any], objectives: int) -> list[str]:
    """Return trials' oddities, one line per kind, that Optuna stores but refuses in a newly created study."""
    outside = [found for trial in trials for found in values_outside(trial)[:1]]
    valued = [(trial, sum(str(value) != "nan" for value in trial.values or [])) for trial in trials]
    short = [
        f"trial {trial.number} is COMPLETE with {count} of {objectives} values"
        for trial, count in valued if trial.state.name == "COMPLETE" and count != objectives
    ]
    endless = [
        f"trial {trial.number} is {trial.state.name} without an end time"
        for trial in trials if trial.state.name in ENDED and trial.datetime_complete is None
    ]
    return [
        kind[0] + (f" (and so on, in {len(kind)} trials)" if len(kind) > 1 else "")
        for kind in (outside, short, endless) if kind
    ]


def values_outside(trial: Any) -> list[str]:
    """Return the trial's parameters whose value is outside of their distribution; such a value can be enqueued."""
    from optuna.trial import create_trial

    def is_outside(names: Iterable[str]) -> bool:
        held = {name: trial.params[name] for name in names}
        try:
            create_trial(value=0.0, params=held, distributions={name: trial.distributions[name] for name in names})
        except (OverflowError, TypeError, ValueError):
            return True
        return False

    return [
        f"trial {trial.number} has {cut(name)} = {cut(trial.params[name])} outside of {trial.distributions[name]}"
        for name in trial.params if is_outside([name])
    ] if is_outside(trial.params) else []


def clock_warnings(database: str, clocks: list[tuple], optuna: Optuna) -> list[str]:
    """Return warnings, from the rows of CLOCKS, about workers whose clocks cannot be compared."""
    mixed = "the workers of a study must not mix Optuna before 5 (local time) with 5 (UTC), nor time zones"
    told = []
    for study, ahead, steps, all_steps in clocks:
        where = f"study {study} in database {database}"
        if steps >= FEWEST_STEPS and steps >= all_steps / 2:
            told.append(f"{where}: {steps} trials began half an hour or more before their predecessors; {mixed}")
        elif ahead > AHEAD_SECONDS and int(optuna.version.partition(".")[0]) >= 5:
            told.append(
                f"{where}: a trial's time is {ahead / 3600:.1f} h ahead of UTC, as written by Optuna before 5, but the "
                f"installed Optuna is {optuna.version}; {mixed}"
            )
    return told
