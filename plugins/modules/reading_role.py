#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: reading_role
short_description: Create a read-only PostgreSQL role
description:
  - Creates a role that may log in and read all tables of some databases, including tables that are created later.
  - The role owns nothing, cannot create tables (not even temporary ones), and cannot read password hashes. Its
    transactions are read-only by default, so that a program that tries to write gets a clear error. It can have 10
    connections at the same time.
  - All privileges are granted directly. The role is not a member of C(pg_read_all_data), which can also read password
    hashes.
  - In these databases only O(writer) and superusers may call functions with which even a read-only role could fill the
    disk or use up shared resources. These are the functions of large objects and advisory locks,
    C(pg_logical_emit_message), C(pg_export_snapshot), C(txid_current) and C(pg_current_xact_id).
  - The role's settings are replaced by a fixed list of timeouts and limits. A session may change the timeouts, so these
    only end forgotten sessions. It cannot change C(temp_file_limit) or the logging of temporary files.
author: mala.hpc_db contributors (@mala-project)
options:
  role:
    description: Name of the role. M(mala.hpc_db.role_passwords) sets its password.
    type: str
    required: true
  writer:
    description: Role that owns the databases. O(role) can also read the tables that it creates later.
    type: str
    required: true
  databases:
    description: Existing databases.
    type: list
    elements: str
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
seealso:
  - module: mala.hpc_db.role_passwords
"""

EXAMPLES = r"""
- name: Ensure the read-only role can read the studies
  mala.hpc_db.reading_role:
    host: /tmp/hpc_db-x1y2z3
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    role: reader
    writer: study
    databases: [mala]
"""

RETURN = r"""
statements:
  description: SQL statements that were, or would be, executed, each prefixed by its database.
  returned: success
  type: list
  elements: str
  sample: ['mala: GRANT SELECT ON ALL TABLES IN SCHEMA public TO "reader"']
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

# The database in which roles are created.
MAINTENANCE = "postgres"
SETTINGS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "5min",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "1min",
    # Only a superuser can change this and the following settings. The limit applies per process.
    "temp_file_limit": "256MB",
    # A failing statement is otherwise logged with its whole text, and so is its error.
    "log_min_messages": "fatal",
    "log_min_error_statement": "panic",
}

ROLE = """
SELECT rolcanlogin AND NOT (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls),
       rolconnlimit, coalesce(rolconfig, '{}'),
       ARRAY(
           SELECT datname::text FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
           WHERE setrole = pg_roles.oid ORDER BY 1
       )
FROM pg_roles WHERE rolname = %s
"""
# Functions with which a role that can only read could fill the disk or use up what all sessions share: large objects,
# advisory locks, freely chosen log records and files, and transaction numbers. PUBLIC has no right to lo_import and
# lo_export by default.
HARMFUL = (
    r"^lo_(?!import|export)|^lo(read|write)$|advisory"
    "|^(pg_logical_emit_message|pg_export_snapshot|txid_current|pg_current_xact_id)$"
)
OPEN = """
SELECT string_agg(
    format('pg_catalog.%%I(%%s)', proname, pg_get_function_identity_arguments(oid)), ', ' ORDER BY proname, oid
)
FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname ~ %s AND (
    has_function_privilege('public', oid, 'EXECUTE') OR NOT has_function_privilege(%s, oid, 'EXECUTE')
    OR EXISTS (SELECT FROM pg_roles WHERE rolname = %s AND has_function_privilege(pg_roles.oid, pg_proc.oid, 'EXECUTE'))
)
"""
# The role's rights in a database, and which of the roles that create tables do not let it read new ones.
RIGHTS = """
SELECT has_database_privilege(rolname, current_database(), 'CONNECT'),
       has_database_privilege(rolname, current_database(), 'TEMPORARY'),
       has_schema_privilege(rolname, 'public', 'USAGE'),
       has_schema_privilege(rolname, 'public', 'CREATE'),
       EXISTS (
           SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')
           AND NOT has_table_privilege(rolname, pg_class.oid, 'SELECT')
       ),
       ARRAY(
           SELECT maker.rolname::text FROM pg_roles maker WHERE maker.rolname = ANY(%s) AND NOT EXISTS (
               SELECT FROM pg_default_acl, aclexplode(defaclacl) granted
               WHERE defaclrole = maker.oid AND defaclnamespace = 'public'::regnamespace AND defaclobjtype = 'r'
               AND grantee = reader.oid AND privilege_type = 'SELECT'
           ) ORDER BY 1
       )
FROM pg_roles reader WHERE rolname = %s
"""

# SQL with a placeholder for each name, and the names.
Statement = tuple[str, list[str]]
CONNECTIONS = 10
ATTRIBUTES = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
ALTER = f"ALTER ROLE {{}} {ATTRIBUTES} CONNECTION LIMIT {CONNECTIONS}"


def for_role(params: dict, found: list[tuple]) -> list[Statement]:
    """Return the statements that create or correct the role. ``found`` are the rows of ROLE."""
    role = params["role"]
    harmless, connections, settings, databases = found[0] if found else (False, None, [], [])
    statements: list[Statement] = [] if found else [("CREATE ROLE {}", [role])]
    if not harmless or connections != CONNECTIONS:
        statements.append((ALTER, [role]))
    # A role may change its own settings.
    if {setting.partition("=")[0] for setting in settings} - SETTINGS.keys():
        statements.append(("ALTER ROLE {} RESET ALL", [role]))
        settings = []
    statements += [("ALTER ROLE {} IN DATABASE {} RESET ALL", [role, database]) for database in databases]
    for name, value in SETTINGS.items():
        if f"{name}={value}" not in settings:
            statements.append((f"ALTER ROLE {{}} SET {name} = '{value}'", [role]))
    return statements


def for_database(params: dict, database: str, found: list[tuple], functions: str | None) -> list[Statement]:
    """Return the statements that let the role read the database and do nothing else.

    ``found`` are the rows of RIGHTS, ``functions`` is the result of OPEN.
    """
    role, writer = params["role"], params["writer"]
    # In check mode the role may not exist yet; it would then have the rights of PUBLIC.
    connects, makes_temporary, uses, makes, lacks, makers = (
        found[0] if found else (True, True, True, False, True, sorted({params["user"], writer}))
    )
    statements: list[Statement] = []
    if not connects:
        statements.append(("GRANT CONNECT ON DATABASE {} TO {}", [database, role]))
    if makes_temporary:
        statements.append(("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC, {}", [database, role]))
    if not uses:
        statements.append(("GRANT USAGE ON SCHEMA public TO {}", [role]))
    if makes:
        statements.append(("GRANT USAGE, CREATE ON SCHEMA public TO {}", [writer]))
        statements.append(("REVOKE CREATE ON SCHEMA public FROM PUBLIC, {}", [role]))
    if lacks:
        statements.append(("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}", [role]))
    if functions:  # the writer first, so that it always has this right
        statements.append((f"GRANT EXECUTE ON FUNCTION {functions} TO {{}}", [writer]))
        statements.append((f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC, {{}}", [role]))
    for maker in makers:
        granted = "ALTER DEFAULT PRIVILEGES FOR ROLE {} IN SCHEMA public GRANT SELECT ON TABLES TO {}"
        statements.append((granted, [maker, role]))
    return statements


def bring(params: dict, database: str, check_mode: bool) -> list[str]:
    """Run the remaining statements in a database, for the role itself in MAINTENANCE; return them."""
    from psycopg2 import sql

    with _connection.connect(params, database) as connection:
        if database == MAINTENANCE:
            statements = for_role(params, _connection.rows(connection, ROLE, (params["role"],)))
        else:
            makers = [params["user"], params["writer"]]
            found = _connection.rows(connection, RIGHTS, (makers, params["role"]))
            if not found and not check_mode:
                raise _connection.Unreachable(f"database {database}: the role {params['role']} does not exist")
            ((functions,),) = _connection.rows(connection, OPEN, (HARMFUL, params["writer"], params["role"]))
            statements = for_database(params, database, found, functions)
        for text, names in [] if check_mode else statements:
            with connection.cursor() as cursor:
                cursor.execute(sql.SQL(text).format(*map(sql.Identifier, names)))
    return [text.format(*(f'"{name}"' for name in names)) for text, names in statements]


def ensure_reader(params: dict, check_mode: bool) -> dict:
    """Bring the role and its rights to the wanted state."""
    said = [
        f"{database}: {statement}"
        for database in [MAINTENANCE, *params["databases"]]
        for statement in bring(params, database, check_mode)
    ]
    return {
        "changed": bool(said),
        "statements": said,
        "diff": {"before": "", "after": "".join(f"{line}\n" for line in said)},
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "role": {"type": "str", "required": True},
            "writer": {"type": "str", "required": True},
            "databases": {"type": "list", "elements": "str", "required": True},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_reader(module.params, module.check_mode)
    except (_connection.Unreachable, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
