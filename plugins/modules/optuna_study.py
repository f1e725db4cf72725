#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: optuna_study
short_description: Create Optuna's schema and named studies in databases
description:
  - Optuna itself creates its schema and the studies, once, before any worker starts. Workers that create the schema at
    the same time would fail.
  - The current state is read with a few queries. Optuna is imported only if something is missing, and only once for
    all databases.
  - A failure in one database does not stop the others.
  - Also creates a worker-tracking trigger. It records for each trial the connection that started it, in the trial's
    system attribute C(hpc_db:worker). M(mala.hpc_db.abandoned_trials) uses this to find trials whose worker has ended.
  - A schema of an older Optuna than the installed one is left unchanged with a warning unless O(upgrade=true). A newer
    schema is refused, with the Optuna version to install.
  - Warns about trials whose times show that workers mix local time (Optuna 4) and UTC (Optuna 5). Optuna records no
    version for its workers, so this cannot be detected where the local time is UTC.
author: mala.hpc_db contributors (@mala-project)
options:
  databases:
    description: Existing databases.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the database. O(user) becomes the owner of the tables.
        type: str
        required: true
      studies:
        description: Studies to create. If empty, only the schema is created.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the study.
            type: str
            required: true
          directions:
            description: Optimisation direction of each objective. An existing study with other directions is refused.
            type: list
            elements: str
            choices: [minimize, maximize]
            default: [minimize]
          user_attributes:
            description: User attributes of the study, with any JSON values. Its other attributes are left unchanged.
            type: dict
            default: {}
  upgrade:
    description:
      - Upgrade a schema of an older Optuna than the installed one. Make a dump first.
      - Refused while O(user) has other connections to the database, because the tables would change under running
        workers.
    type: bool
    default: false
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
requirements:
  - optuna
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Ensure a study exists
  mala.hpc_db.optuna_study:
    host: /tmp/hpc_db-x1y2z3
    port: 5432
    user: study
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    databases:
      - name: mala
        studies:
          - name: beryllium
            directions: [minimize]
            user_attributes:
              snapshots: 4
"""

RETURN = r"""
databases:
  description: Result for each database.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the database.
      type: str
    created:
      description: Studies that were, or would be, created.
      type: list
      elements: str
    attributed:
      description: Studies whose user attributes were, or would be, set.
      type: list
      elements: str
    upgraded:
      description: Whether the schema was, or would be, upgraded.
      type: bool
    schema:
      description: Version of the Optuna that created or upgraded the schema, or would do so.
      type: str
      sample: 5.0.0
"""

import json
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna, _workers
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema

WORKERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
"""
STUDIES = """
SELECT study_name, array_agg(lower(direction::text) ORDER BY objective)
FROM studies JOIN study_directions USING (study_id) GROUP BY study_name
"""
ATTRIBUTES = "SELECT study_name, key, value_json FROM studies JOIN study_user_attributes USING (study_id)"
# Older schemas store the directions in another table.
NAMES = "SELECT study_name, NULL FROM studies"


class Refused(Exception):
    """The existing studies contradict the wanted ones; the message is for the user."""


class Found(NamedTuple):
    """The current state: installed Optuna, schema, why the schema is too old, and the studies' directions if known.

    ``attributes`` are those of the studies; ``notes`` is whether trials are recorded with their workers.
    """

    optuna: optuna_schema.Optuna
    schema: optuna_schema.Schema | None
    too_old: str
    studies: dict[str, list[str] | None]
    clocks: list[tuple]
    workers: int
    attributes: dict[str, dict[str, Any]]
    notes: bool


def look(params: dict) -> Found:
    """Return the current state; raise Refused if Optuna is missing or older than the schema."""
    with _connection.connect(params, params["database"]) as connection:
        optuna = optuna_schema.installed_optuna()
        if optuna is None:
            raise Refused(_connection.not_importable("optuna", ImportError("No module named 'optuna'")))
        schema = _optuna.read_schema(connection) if _optuna.has_schema(connection) else None
        if schema is None:
            return Found(optuna, None, "", {}, [], 0, {}, False)
        mismatch = _optuna.mismatch(params["database"], schema, optuna)
        if optuna_schema.is_newer(schema, optuna):
            raise Refused(mismatch)
        if optuna_schema.is_older(schema, optuna):
            names, workers, attributes = (_connection.rows(connection, query) for query in (NAMES, WORKERS, ATTRIBUTES))
            return Found(optuna, schema, mismatch, dict(names), [], workers[0][0], by_study(attributes), False)
        queries = STUDIES, _optuna.CLOCKS, ATTRIBUTES, _workers.NOTES
        studies, clocks, attributes, notes = (_connection.rows(connection, query) for query in queries)
    return Found(optuna, schema, "", dict(studies), clocks, 0, by_study(attributes), notes == [(_workers.NOTE,)])


def by_study(attributes: list[tuple]) -> dict[str, dict[str, Any]]:
    """Return the rows of ATTRIBUTES grouped by study."""
    held: dict[str, dict[str, Any]] = {}
    for name, key, value in attributes:
        held.setdefault(name, {})[key] = _optuna.attribute(value)
    return held


def let_optuna(params: dict, upgrade: bool, studies: list[dict], attributes: dict[str, dict]) -> None:
    """Let Optuna create or upgrade its schema, create the studies and set attributes."""
    try:
        import optuna
    except ImportError as error:
        raise Refused(_connection.not_importable("optuna", error)) from None
    try:
        url = _connection.storage_url(params, params["database"])
        storage = optuna.storages.RDBStorage(url, skip_compatibility_check=upgrade)
        if upgrade:
            storage.upgrade()
        for study in studies:
            optuna.create_study(storage=storage, study_name=study["name"], directions=study["directions"])
        for name, values in attributes.items():
            loaded = optuna.load_study(storage=storage, study_name=name)
            for key, value in values.items():
                loaded.set_user_attr(key, value)
        storage.engine.dispose()  # otherwise its connection stays open while the other databases are opened
    except Exception as error:  # any error of Optuna, SQLAlchemy, Alembic and psycopg2
        raise Refused(f"database {params['database']}: Optuna reports: {' '.join(str(error).split())}") from None


def take_notes(params: dict) -> None:
    """Install the trigger that records trials with their workers."""
    with _connection.connect(params, params["database"]) as connection, connection.cursor() as cursor:
        cursor.execute(_workers.TAKE_NOTES)


def differing_attributes(params: dict, found: Found) -> dict[str, dict[str, Any]]:
    """Return the wanted attributes that the studies lack or have with another value."""
    differing = {}
    for study in params["studies"]:
        held, wanted = found.attributes.get(study["name"], {}), study.get("user_attributes") or {}
        differing[study["name"]] = {key: value for key, value in wanted.items() if held.get(key, ...) != value}
    return {name: values for name, values in differing.items() if values}


def ensure_databases(params: dict, check_mode: bool) -> dict:
    """Bring each database to the wanted state; then raise Refused with the errors of all databases, if any."""
    reports, refused = [], []
    for database in params["databases"]:
        one = {**params, "database": database["name"], "studies": database["studies"]}
        try:
            reports.append({"name": database["name"], **ensure_studies(one, check_mode)})
        except (_connection.Unreachable, Refused) as error:
            refused.append(str(error))
    if refused:
        raise Refused("; ".join(refused))
    told = ("name", "created", "attributed", "upgraded", "schema")
    return {
        "changed": any(report["changed"] for report in reports),
        "databases": [{key: report[key] for key in told} for report in reports],
        "diff": [
            {**report["diff"], "before_header": report["name"], "after_header": report["name"]}
            for report in reports if report["changed"]
        ],
        "warnings": [warning for report in reports for warning in report["warnings"]],
    }


def ensure_studies(params: dict, check_mode: bool) -> dict:
    """Bring schema and studies of one database to the wanted state."""
    before = found = look(params)
    missing = [study for study in params["studies"] if study["name"] not in before.studies]
    upgrade = bool(before.too_old) and params["upgrade"]
    if before.too_old:
        check_too_old(params, before, missing)
    if upgrade and not check_mode:
        let_optuna(params, True, [], {})
        found = look(params)
    for study in params["studies"]:
        directions = found.studies.get(study["name"]) or study["directions"]
        if directions != study["directions"]:
            raise Refused(
                f"databases_studies: the study {study['name']} in {params['database']} has the directions "
                f"{directions}, not {study['directions']}; directions cannot be changed; choose another name"
            )
    attributes = {} if found.too_old and not upgrade else differing_attributes(params, found)
    if (before.schema is None or missing or attributes) and not check_mode:
        let_optuna(params, False, missing, attributes)
    if not (found.notes or found.too_old or check_mode):
        take_notes(params)
    return report(params, before, found, missing, attributes, upgrade)


def check_too_old(params: dict, found: Found, missing: list[dict]) -> None:
    """Refuse to upgrade a schema that workers use, and to create studies in a schema that is too old."""
    if params["upgrade"] and found.workers:
        raise Refused(
            f"databases_upgrade_schema: {found.workers} connections to the database {params['database']} are open; "
            "end its workers first"
        )
    if missing and not params["upgrade"]:
        names = ", ".join(study["name"] for study in missing)
        raise Refused(f"{found.too_old}; the study {names} is missing and cannot be made before")


def report(
    params: dict, before: Found, found: Found, missing: list[dict], attributes: dict[str, dict], upgrade: bool
) -> dict:
    """Return the module's result for one database."""
    warnings = _optuna.clock_warnings(params["database"], found.clocks, found.optuna)
    if before.too_old and not upgrade:
        warnings = [before.too_old]
    new = upgrade or before.schema is None
    library = before.optuna.version if new or before.schema is None else before.schema.library
    wanted = {**before.studies, **{study["name"]: study["directions"] for study in missing}}
    held = {**before.attributes}
    for name, values in attributes.items():
        held[name] = {**held.get(name, {}), **values}
    notes = before.notes or upgrade or not before.too_old
    return {
        "changed": new or bool(missing or attributes) or notes != before.notes,
        "created": [study["name"] for study in missing],
        "attributed": list(attributes),
        "upgraded": upgrade,
        "schema": library,
        "diff": {
            "before": as_lines(before.schema.library, before.studies, before.attributes, before.notes)
            if before.schema else "no schema\n",
            "after": as_lines(library, wanted, held, notes),
        },
        "warnings": warnings,
    }


def as_lines(
    library: str, studies: dict[str, list[str] | None], attributes: dict[str, dict[str, Any]], notes: bool
) -> str:
    """Return schema and studies as text for a diff."""
    lines = [f"schema of Optuna {library}{', trials with their workers' if notes else ''}\n"]
    for name, directions in sorted(studies.items()):
        lines.append(f"{name}: {', '.join(directions or ['?'])}\n")
        lines += [f"  {key} = {json.dumps(value)}\n" for key, value in sorted(attributes.get(name, {}).items())]
    return "".join(lines)


def main() -> None:
    """Run the module."""
    study_options = {
        "name": {"type": "str", "required": True},
        "directions": {
            "type": "list",
            "elements": "str",
            "choices": ["minimize", "maximize"],
            "default": ["minimize"],
        },
        "user_attributes": {"type": "dict", "default": {}},
    }
    module = AnsibleModule(
        argument_spec={
            "databases": {"type": "list", "elements": "dict", "required": True, "options": {
                "name": {"type": "str", "required": True},
                "studies": {"type": "list", "elements": "dict", "default": [], "options": study_options},
            }},
            "upgrade": {"type": "bool", "default": False},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_databases(module.params, module.check_mode)
    except Refused as error:
        module.fail_json(msg=one_line(error))
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
