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
  - Reads the number of connections and their clients, the sizes of the databases, and the number of trials of each
    study by state.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: Database to connect to. O(user) must be a superuser.
    type: str
    required: true
  idle_nodes:
    description:
      - Nodes without a job of this user, by the scheduler's names, as returned by M(mala.hpc_db.hosting_job_info).
        Connections from these nodes are orphaned.
    type: list
    elements: str
    default: []
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
- name: Read connections, databases and studies
  mala.hpc_db.server_info:
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: alice
"""

RETURN = r"""
no_answer:
  description:
    - Reason why the server does not answer, for example because its node has died and the scheduler has not noticed
      yet. Empty if it answers.
    - In this case the module does not fail, and nothing else is returned.
  returned: success
  type: str
version:
  description: Version of PostgreSQL.
  returned: success
  type: str
connections:
  description: Open client connections, except for this module's own.
  returned: success
  type: dict
  contains:
    used:
      description: Number of connections.
      type: int
    max:
      description: Maximum number of connections.
      type: int
    clients:
      description:
        - Number (RV(ignore:count)) of connections per RV(ignore:host) and RV(ignore:user), the largest first.
      type: list
      elements: dict
    idle_in_transaction:
      description:
        - Connections that are idle in a transaction for a second or longer. They keep their locks until the server ends
          them (C(idle_in_transaction_session_timeout)).
        - Each has RV(ignore:pid), RV(ignore:host), RV(ignore:user), RV(ignore:database) and the idle time in
          RV(ignore:seconds).
      type: list
      elements: dict
    orphaned:
      description:
        - Connections from a node without a job of this user that have been open for 10 s or longer. Either the worker
          has outlived its job, or its node has died. In the latter case the server closes them after two minutes of
          silence.
        - Each entry is one host and user with the RV(ignore:count) of connections, and the RV(ignore:seconds) since the
          last activity of any of them.
      type: list
      elements: dict
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
unreadable:
  description: Databases whose studies cannot be read, each with the server's error message.
  returned: success
  type: list
  elements: str
"""

import socket
import threading
from collections import Counter
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

SETTINGS = "SELECT current_setting('max_connections')::int, current_setting('server_version')"
SESSIONS = """
SELECT pid, coalesce(host(client_addr), ''), coalesce(usename, '-'), coalesce(datname, '-'), coalesce(state, '-'),
       extract(epoch FROM clock_timestamp() - coalesce(state_change, backend_start))::float,
       extract(epoch FROM clock_timestamp() - backend_start)::float
FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY pid
"""
SIZES = f"""
SELECT datname, pg_database_size(oid) FROM pg_database WHERE datname IN ({_connection.DATABASES}) ORDER BY datname
"""
TRIALS = """
SELECT study_name, lower(state::text), count(trial_id)
FROM studies LEFT JOIN trials USING (study_id) GROUP BY study_name, state ORDER BY study_name, state
"""


# Longest normal pause within a transaction of Optuna, which waits only for its next statement.
LONGEST_PAUSE_SECONDS = 1
# Minimum age of an orphaned connection: a worker may have started after the scheduler was asked.
ORPHANED_SECONDS = 10
LOOKUP_SECONDS = 5.0
# Same as in the workers' service entry: a dead node does not answer at all.
CONNECT_SECONDS = 5
# Host name shown for connections over the Unix socket, which have no address.
HERE = "socket"


def names_of(addresses: set[str]) -> dict[str, str]:
    """Return each address's host name, short as in the scheduler; the address itself if no name is found in time."""
    names = {address: address for address in addresses}

    def look_up(address: str) -> None:
        try:
            names[address] = socket.gethostbyaddr(address)[0].partition(".")[0]
        except OSError:
            pass  # the address has no name

    threads = [threading.Thread(target=look_up, args=(address,), daemon=True) for address in sorted(addresses)]
    for thread in threads:
        thread.start()
    # A missing name server must not block: most lookups finish at once.
    for thread in threads:
        thread.join(LOOKUP_SECONDS / len(threads))
    return dict(names)


def by_client(sessions: list[tuple], idle_nodes: list[str]) -> dict[str, list[dict]]:
    """Return the connections per client, and the connections that are unused."""
    names = {"": HERE, **names_of({session[1] for session in sessions} - {""})}
    idle = {node.partition(".")[0] for node in idle_nodes}
    counts: Counter[tuple[str, str]] = Counter()
    stuck: list[dict] = []
    orphaned: dict[tuple[str, str], dict] = {}
    for pid, address, user, database, state, silent, age in sessions:
        client = {"host": names[address], "user": user}
        counts[client["host"], user] += 1
        if state.startswith("idle in transaction") and silent >= LONGEST_PAUSE_SECONDS:
            stuck.append({**client, "pid": pid, "database": database, "seconds": int(silent)})
        if address and client["host"] in idle and age >= ORPHANED_SECONDS:
            found = orphaned.setdefault((client["host"], user), {**client, "count": 0, "seconds": int(silent)})
            found.update(count=found["count"] + 1, seconds=min(found["seconds"], int(silent)))
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "clients": [{"host": host, "user": user, "count": count} for (host, user), count in most_first],
        "idle_in_transaction": stuck,
        "orphaned": list(orphaned.values()),
    }


def studies_of(params: dict, database: str) -> list[dict[str, Any]]:
    """Return the studies in a database; none if Optuna has no schema there."""
    with _connection.connect(params, database) as connection:
        if not _optuna.has_schema(connection):
            return []
        found: dict[str, dict[str, int]] = {}
        for name, state, count in _connection.rows(connection, TRIALS):
            found.setdefault(name, {}).update({state: count} if state else {})
    return [{"database": database, "name": name, "trials": trials} for name, trials in found.items()]


def read_server(params: dict) -> dict:
    """Return the server's contents."""
    with _connection.connect(params, params["database"]) as connection:
        (maximum, version) = _connection.rows(connection, SETTINGS)[0]
        sessions = _connection.rows(connection, SESSIONS)
        databases = [{"name": name, "size": size} for name, size in _connection.rows(connection, SIZES)]
    studies: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for database in databases:
        try:
            studies += studies_of(params, database["name"])
        except _connection.Unreachable as error:
            unreadable.append(one_line(error))
    return {
        "version": version,
        "connections": {"used": len(sessions), "max": maximum, **by_client(sessions, params["idle_nodes"])},
        "databases": databases,
        "studies": studies,
        "unreadable": unreadable,
    }


def read_if_reached(params: dict) -> dict:
    """Return the server's contents, or why it does not answer."""
    try:
        return {"no_answer": "", **read_server({**params, "connect_timeout": CONNECT_SECONDS})}
    except _connection.Unreachable as error:
        return {"no_answer": one_line(error)}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "idle_nodes": {"type": "list", "elements": "str", "default": []},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **read_if_reached(module.params))


if __name__ == "__main__":
    main()
