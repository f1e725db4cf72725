#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: optuna_study
short_description: Keep Optuna's schema and named studies in a database
description:
  - Optuna itself makes its schema and the studies, once, before any worker starts. Workers that race for it fail.
  - Looking is done with three queries; Optuna is imported only when something is missing.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: The database. O(user) becomes the owner of the tables.
    type: str
    required: true
  studies:
    description: The studies to keep. Without any, only the schema is kept.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The study's name.
        type: str
        required: true
      directions:
        description: What each objective is optimised to. A study that exists with others is refused.
        type: list
        elements: str
        choices: [minimize, maximize]
        default: [minimize]
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
- name: Keep a study
  mala.hpc_db.optuna_study:
    host: /tmp/hpc_db-x1y2z3
    port: 5432
    user: study
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: mala
    studies:
      - name: beryllium
        directions: [minimize]
"""

RETURN = r"""
created:
  description: The studies that were, or would be, created.
  returned: success
  type: list
  elements: str
"""

from urllib.parse import quote, urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection

STUDIES = """
SELECT study_name, array_agg(lower(direction::text) ORDER BY objective)
FROM studies JOIN study_directions USING (study_id) GROUP BY study_name
"""


class Refused(Exception):
    """What is there contradicts what is wanted; the message is for the user."""


def look(params: dict) -> dict[str, list[str]] | None:
    """Return the directions of each study; None if the schema is missing."""
    with _connection.connect(params, params["database"]) as connection:
        # Optuna writes its version last: a schema without it was interrupted, and Optuna completes it.
        if _connection.rows(connection, "SELECT to_regclass('version_info'), to_regclass('alembic_version')") != [
            ("version_info", "alembic_version")
        ]:
            return None
        if not _connection.rows(connection, "SELECT 1 FROM alembic_version"):
            return None
        return dict(_connection.rows(connection, STUDIES))


def storage_url(params: dict) -> str:
    """Return SQLAlchemy's URL; host and password file go into the query, where a path is allowed."""
    query = {"host": params["host"], "port": params["port"], "passfile": params["passfile"]}
    user, database = (quote(params[name], safe="") for name in ("user", "database"))
    return f"postgresql+psycopg2://{user}@/{database}?{urlencode(query)}"


def create(params: dict, studies: list[dict]) -> None:
    """Let Optuna make its schema and the studies."""
    import optuna

    storage = optuna.storages.RDBStorage(storage_url(params))
    for study in studies:
        optuna.create_study(storage=storage, study_name=study["name"], directions=study["directions"])


def ensure_studies(params: dict, check_mode: bool) -> dict:
    """Bring schema and studies to the wanted state."""
    found = look(params)
    known = found or {}
    for study in params["studies"]:
        directions = known.get(study["name"], study["directions"])
        if directions != study["directions"]:
            raise Refused(
                f"databases_studies: the study {study['name']} in {params['database']} has the directions "
                f"{directions}, not {study['directions']}; directions cannot be changed, choose another name"
            )
    missing = [study for study in params["studies"] if study["name"] not in known]
    wanted = {**known, **{study["name"]: study["directions"] for study in missing}}
    changed = found is None or bool(missing)
    if changed and not check_mode:
        create(params, missing)
    return {
        "changed": changed,
        "created": [study["name"] for study in missing],
        "diff": {"before": as_lines(found), "after": as_lines(wanted)},
    }


def as_lines(studies: dict[str, list[str]] | None) -> str:
    """Return studies as text for a diff."""
    if studies is None:
        return "no schema\n"
    return "".join(f"{name}: {', '.join(directions)}\n" for name, directions in sorted(studies.items()))


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
    }
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "studies": {"type": "list", "elements": "dict", "default": [], "options": study_options},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_studies(module.params, module.check_mode)
    except (_connection.Unreachable, Refused) as error:
        module.fail_json(msg=" ".join(str(error).splitlines()))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
