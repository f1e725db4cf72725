# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: plan
short_description: Derive values from the settings of an instance
version_added: 0.1.0
description:
  - Returns PostgreSQL's sizes and access rules, the workers' service entries, and the databases' URLs. The roles share
    the result with the settings in the dictionary C(hpc_db).
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: All settings of the host, as M(mala.hpc_db.settings) returns them.
    type: dict
    required: true
  instance:
    description: The instance as M(mala.hpc_db.instance) returns it. Only C(root) is required.
    type: dict
    required: true
  host:
    description: Name of the host in the inventory.
    type: str
    default: ""
  inventory:
    description: The inventory's folder on the workstation.
    type: str
    default: ""
  base_python:
    description: Path of the Python on the login node from which environments are made.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Print the URL for the workers
  ansible.builtin.debug:
    msg: "{{ (hpc_db | mala.hpc_db.plan({'root': '/home/alice/hpc_db/hpc_db', 'owner': 'alice'})).url }}"
"""

RETURN = r"""
_value:
  description:
    - C(root), C(owner) and C(major) are those of the instance. C(python) is the Python of the management environment.
    - C(major_changes) is true if the studies are in another major version than the wanted one.
    - C(prefix), C(bindir), C(data) and C(config) are PostgreSQL's paths, and C(pooler_prefix) is PgBouncer's. C(config)
      is relative to the instance directory. C(bindir) is an empty text if only the login node knows it.
    - C(optuna_databases) and C(other_databases) are the databases with and without Optuna's tables, C(database_roles)
      all their roles. C(reserved) are names that no database of C(databases_studies) may have. C(refused) has the names
      that are not allowed, by the reasons C(reader), C(names), C(roles), C(with_role) and C(with_studies).
    - C(passfile) is the password file of the instance, on the cluster.
    - C(backup_folder), C(report_folder) and C(report_page) are absolute paths on the workstation. C(restore_upload) and
      C(import_upload) are those of the files to restore and to import, or empty texts if the files are not there.
    - C(restore_target) is the database to restore into, with C(name), C(owner), C(tables) and C(allowed), and
      C(import_target) the name of the database to import into.
    - C(worker) has C(folder), C(url), C(python), C(program) and C(outage) of the workers' job script. C(outage) is in
      seconds, or an empty text if workers do not wait for the server.
    - C(lock_file) and C(stage), the folder for staged packages, are paths on the workstation.
    - C(base_python) is the Python from which environments are made, and C(embedded_wheel) the requirement of
      PostgreSQL's wheel.
    - C(conda_environments) and C(python_environments) are the environments to install. The last of
      C(python_environments) is the management environment. C(staged) and C(wheelhouse) are the folders of staged
      packages and of wheels on the login node, and C(lock) is the text of the lock file.
    - C(supervisor) are the settings of the program in the server job, and C(successor_options) those of its successor's
      job.
    - C(sizes) has memory sizes in megabytes. C(memory) is that of the job. C(need) is that of PostgreSQL with all
      C(connections), and C(shared), C(base) and C(each) are its parts.
    - C(warns) is true if the settings are allowed but dangerous.
    - C(rules) are the rules of C(pg_hba.conf).
    - C(services) are libpq's parameters, C(direct) and C(pooled) for workers and C(tunnel) for the dashboard.
    - C(url) and C(plain_url) are the URLs of the first database with and without the client package's plugin. C(urls)
      has the URL of each database by its name, C(other_urls) those of the others, and C(ways) those for more workers
      than connections.
  type: dict
"""

from ansible_collections.mala.hpc_db.plugins.module_utils._plan import plan


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"plan": plan}
