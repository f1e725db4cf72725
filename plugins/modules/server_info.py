#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: server_info
short_description: Read connections, databases and studies from the server
description:
  - Reads how many connections are used, how large the databases are, and the trials of each study by state.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: A database to connect to. O(user) must be a superuser.
    type: str
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Read what the server holds
  mala.hpc_db.server_info:
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: alice
"""

RETURN = r"""
version:
  description: PostgreSQL's version.
  returned: success
  type: str
connections:
  description: Client connections that are open, and the largest number allowed.
  returned: success
  type: dict
databases:
  description: Name and size in bytes of each database.
  returned: success
  type: list
  elements: dict
studies:
  description: Database, name, and number of trials by state of each study.
  returned: success
  type: list
  elements: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection

CONNECTIONS = """
SELECT count(*) FILTER (WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()),
       current_setting('max_connections')::int, current_setting('server_version')
FROM pg_stat_activity
"""
DATABASES = "SELECT datname, pg_database_size(oid) FROM pg_database WHERE NOT datistemplate ORDER BY datname"
TRIALS = """
SELECT study_name, lower(state::text), count(trial_id)
FROM studies LEFT JOIN trials USING (study_id) GROUP BY study_name, state ORDER BY study_name, state
"""


def studies_of(params: dict, database: str) -> list[dict[str, Any]]:
    """Return the studies in a database; none where Optuna has made no schema."""
    with _connection.connect(params, database) as connection:
        if _connection.rows(connection, "SELECT to_regclass('trials')") == [(None,)]:
            return []
        found: dict[str, dict[str, int]] = {}
        for name, state, count in _connection.rows(connection, TRIALS):
            found.setdefault(name, {}).update({state: count} if state else {})
    return [{"database": database, "name": name, "trials": trials} for name, trials in found.items()]


def read_server(params: dict) -> dict:
    """Return what the server holds."""
    with _connection.connect(params, params["database"]) as connection:
        (used, maximum, version) = _connection.rows(connection, CONNECTIONS)[0]
        databases = [{"name": name, "size": size} for name, size in _connection.rows(connection, DATABASES)]
    return {
        "version": version,
        "connections": {"used": used, "max": maximum},
        "databases": databases,
        "studies": [study for database in databases for study in studies_of(params, database["name"])],
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"database": {"type": "str", "required": True}, **_connection.CONNECTION_OPTIONS},
        supports_check_mode=True,
    )
    try:
        result = read_server(module.params)
    except _connection.Unreachable as error:
        module.fail_json(msg=" ".join(str(error).splitlines()))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
