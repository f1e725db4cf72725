#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: study_trials
short_description: Export all trials of all studies into one file
description:
  - Reads every study of every database with the installed Optuna, and writes them as gzip-compressed JSON for
    M(mala.hpc_db.study_report). The databases are not changed.
  - Times are in seconds since 1970. Optuna before 5 stores the workers' local time, which is read as this host's.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: Database to connect to. O(user) must be a superuser.
    type: str
    required: true
  path:
    description: Path of the file. Only this user can read it. It is written only if something has changed.
    type: path
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
seealso:
  - module: mala.hpc_db.study_report
requirements:
  - optuna
"""

EXAMPLES = r"""
- name: Export the studies
  mala.hpc_db.study_trials:
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: alice
    path: ~/trials.json.gz
"""

RETURN = r"""
studies:
  description: Number of studies.
  returned: success
  type: int
trials:
  description: Number of trials.
  returned: success
  type: int
problems:
  description:
    - Reasons why a database or a study could not be read, such as a schema of a newer Optuna than the installed one.
      Anomalies within a study are recorded in the file.
  returned: success
  type: list
  elements: str
"""

import contextlib
import datetime
import gzip
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import encodable_data, one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import write_atomically

STUDIES = "SELECT study_name FROM studies ORDER BY study_name"


def seconds(time: datetime.datetime | None) -> float | None:
    """Return a time of Optuna's, which is local and has no time zone, in seconds since 1970."""
    try:
        return None if time is None else time.timestamp()
    except (OverflowError, ValueError):  # the year 1 or 9999
        return None


def constraints_of(trial: Any) -> dict[str, float]:
    """Return the values of a trial's constraints; in a feasible trial none is above 0."""
    held = getattr(trial, "constraints", None) or trial.system_attrs.get("constraints") or {}
    named = held if isinstance(held, dict) else {str(number): value for number, value in enumerate(held)}
    numbers = {name: number(value) for name, value in named.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def number(value: float) -> float:
    """Return a number as float; an integer that is too large becomes infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def internal_values(trial: Any) -> Iterator[tuple[str, float]]:
    """Return the numbers that represent a trial's parameters, without parameters that have none."""
    for name, value in trial.params.items():
        with contextlib.suppress(OverflowError, TypeError, ValueError):
            yield name, trial.distributions[name].to_internal_repr(value)


def export_study(database: str, study: Any, trials: list[Any], odd: list[str]) -> dict[str, Any]:
    """Return a study's data in a form that JSON can store.

    A parameter's value is its internal number in the distribution, whatever type its choices have.
    """
    from optuna.distributions import distribution_to_json

    numbers: dict[str, int] = {}

    def number_of(distribution: Any) -> int:
        return numbers.setdefault(distribution_to_json(distribution), len(numbers))

    exported = [
        {
            "number": trial.number,
            "state": trial.state.name,
            "start": seconds(trial.datetime_start),
            "complete": seconds(trial.datetime_complete),
            "values": trial.values,
            "params": {
                name: [number_of(trial.distributions[name]), value] for name, value in internal_values(trial)
            },
            "intermediate": list(trial.intermediate_values.items()),
            "attributes": trial.user_attrs,
            "constraints": constraints_of(trial),
        }
        for trial in trials
    ]
    return {
        "database": database,
        "name": study.study_name,
        "directions": [direction.name.lower() for direction in study.directions],
        "metrics": getattr(study, "metric_names", None),  # since Optuna 3.4
        "attributes": study.user_attrs,
        "distributions": list(numbers),
        "trials": exported,
        "odd": odd,
    }


def look_into(params: dict, database: str) -> tuple[list[str], str]:
    """Return the names of the studies in a database, and why Optuna cannot read them; empty if it can.

    The tables are checked first, because Optuna would create missing ones.
    """
    with _connection.connect(params, database) as connection:
        if not _optuna.has_schema(connection):
            return [], ""
        schema = _optuna.read_schema(connection)
        names = [name for name, in _connection.rows(connection, STUDIES)]
    optuna = optuna_schema.installed_optuna()
    if optuna is None:
        raise _connection.Unreachable(_connection.not_importable("optuna", ImportError("No module named 'optuna'")))
    return names, _optuna.mismatch(database, schema, optuna) if schema else ""


def read_studies(params: dict, database: str, names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the studies of a database, and why others cannot be read."""
    try:
        import optuna
    except ImportError as error:
        raise _connection.Unreachable(_connection.not_importable("optuna", error)) from None
    studies, problems = [], []
    try:
        storage = optuna.storages.RDBStorage(_connection.storage_url(params, database))
        for name in names:
            try:
                study = optuna.load_study(study_name=name, storage=storage)
                trials, unreadable = _optuna.read_trials(storage, storage.get_study_id_from_name(name))
                odd = _optuna.oddities(trials, len(study.directions))
                studies.append(export_study(database, study, trials, [*unreadable, *odd]))
            except Exception as error:  # an error in one study must not lose the others
                if _optuna.is_lost(error):
                    raise
                problems.append(f"study {database}/{name} cannot be read and is not shown: {_optuna.said(error)}")
    except Exception as error:  # any error of Optuna, SQLAlchemy and psycopg2
        raise _connection.Unreachable(f"database {database}: {_optuna.said(error)}") from None
    return studies, problems


def read_all(params: dict) -> dict[str, Any]:
    """Return all studies, and why some are missing."""
    with _connection.connect(params, params["database"]) as connection:
        databases = [name for name, in _connection.rows(connection, _connection.DATABASES)]
    studies: list[dict[str, Any]] = []
    problems: list[str] = []
    for database in databases:
        names, problem = look_into(params, database)
        if problem:
            problems.append(f"{problem}; its studies are not shown: {', '.join(names)}")
        elif names:
            found, unreadable = read_studies(params, database, names)
            studies += found
            problems += unreadable
    return {"studies": studies, "problems": problems}


def ensure_exported(params: dict, check_mode: bool) -> dict[str, Any]:
    """Bring the file to the databases' contents."""
    held = read_all(params)
    content = gzip.compress(json.dumps(held).encode(), mtime=0)
    changed = content != read_bytes(params["path"])
    if changed and not check_mode:
        write_atomically(params["path"], content)
    return {
        "changed": changed,
        "studies": len(held["studies"]),
        "trials": sum(len(study["trials"]) for study in held["studies"]),
        "problems": held["problems"],
    }


def read_bytes(path: str) -> bytes:
    """Return a file's contents; empty if it does not exist."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return b""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    try:
        result = ensure_exported(module.params, module.check_mode)
    except (_connection.Unreachable, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**encodable_data(result))


if __name__ == "__main__":
    main()
