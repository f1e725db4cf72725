#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: optuna_study_info
short_description: Read the studies in a database
description:
  - Returns each study with its directions, user attributes, number of trials by state, and best value.
  - Takes less than a second, because Optuna is not imported. A schema from before Optuna 3.0 has no directions and is
    refused.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: Name of the database.
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
seealso:
  - module: mala.hpc_db.optuna_study
"""

EXAMPLES = r"""
- name: Read the studies
  mala.hpc_db.optuna_study_info:
    host: c1
    port: 5432
    user: study
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: mala
  register: found

- name: Print the best value
  mala.hpc_db.show:
    text: "{{ found.studies | selectattr('name', 'eq', 'beryllium') | map(attribute='best_value') | first }}"
"""

RETURN = r"""
studies:
  description: Studies, ordered by name. Empty if the database has no schema of Optuna.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the study.
      type: str
    directions:
      description: Optimisation direction of each objective.
      type: list
      elements: str
    user_attributes:
      description: User attributes of the study. Values that are not valid JSON are returned as text.
      type: dict
    trials:
      description: Number of trials by state, in lower case.
      type: dict
    best_value:
      description: Best value of a completed trial. V(null) if there is none, and with several objectives.
      type: float
  sample:
    - name: beryllium
      directions: [minimize]
      user_attributes: {snapshots: 4}
      trials: {complete: 40, running: 2}
      best_value: 0.25
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import encodable_data, one_line

# Optuna stores infinity outside of the column value, so it cannot be the best value here. PostgreSQL sorts NaN above
# all numbers.
STUDIES = """
SELECT study_name, array_agg(lower(direction::text) ORDER BY objective),
  (SELECT coalesce(json_object_agg(key, value_json), '{}') FROM study_user_attributes AS held
   WHERE held.study_id = studies.study_id),
  (SELECT coalesce(json_object_agg(state, number), '{}') FROM (
     SELECT lower(state::text) AS state, count(*) AS number FROM trials
     WHERE trials.study_id = studies.study_id GROUP BY 1) AS counts),
  (SELECT CASE WHEN max(direction::text) = 'MAXIMIZE' THEN max(value) ELSE min(value) END
   FROM trials JOIN trial_values USING (trial_id)
   WHERE trials.study_id = studies.study_id AND state = 'COMPLETE' AND value_type = 'FINITE' AND value <> 'NaN')
FROM studies JOIN study_directions USING (study_id) GROUP BY study_id, study_name ORDER BY study_name
"""


def read_studies(params: dict) -> list[dict[str, Any]]:
    """Return the studies in a database."""
    with _connection.connect(params, params["database"]) as connection:
        if not _optuna.has_schema(connection):
            return []
        rows = _connection.rows(connection, STUDIES)
    return [
        {
            "name": name,
            "directions": directions,
            "user_attributes": {key: _optuna.attribute(value) for key, value in attributes.items()},
            "trials": trials,
            "best_value": best if len(directions) == 1 else None,
        }
        for name, directions, attributes, trials, best in rows
    ]


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"database": {"type": "str", "required": True}, **_connection.CONNECTION_OPTIONS},
        supports_check_mode=True,
    )
    try:
        studies = read_studies(module.params)
    except _connection.Unreachable as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(changed=False, studies=encodable_data(studies))


if __name__ == "__main__":
    main()
