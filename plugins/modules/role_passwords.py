#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: role_passwords
short_description: Keep the passwords of PostgreSQL roles, generated on the target
description:
  - Generates a random password for each role that has none in the password file, and gives it to the server.
  - No password ever leaves the target, and the server is sent a SCRAM verifier only, so that its log holds none either.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: A database to connect to. O(user) must be a superuser.
    type: str
    required: true
  roles:
    description: The roles, which exist already.
    type: list
    elements: str
    required: true
  rotate:
    description: Whether to generate new passwords for all O(roles), though they have some. Always a change.
    type: bool
    default: false
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
- name: Keep the study role's password
  mala.hpc_db.role_passwords:
    host: /tmp/hpc_db-x1y2z3
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: postgres
    roles: [study]
"""

RETURN = r"""
changed_roles:
  description: The roles whose password was, or would be, set.
  returned: success
  type: list
  elements: str
"""

import base64
import hashlib
import hmac
import os
import re
import secrets

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

# Bytes of randomness in a password: 256 bits cannot be guessed, whoever has the verifier.
PASSWORD_BYTES = 32
# PostgreSQL's own default (scram_iterations).
ITERATIONS = 4096


def scram_verifier(password: str, salt: bytes, iterations: int) -> str:
    """Return what PostgreSQL stores for a password (RFC 5803)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.new(salted, b"Client Key", hashlib.sha256).digest()
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.new(salted, b"Server Key", hashlib.sha256).digest()
    encoded = [base64.b64encode(part).decode() for part in (salt, stored_key, server_key)]
    return f"SCRAM-SHA-256${iterations}:{encoded[0]}${encoded[1]}:{encoded[2]}"


def matches(password: str, verifier: str | None) -> bool:
    """Tell whether the server's verifier was made from this password."""
    found = re.match(r"SCRAM-SHA-256\$(\d+):([^$]+)\$", verifier or "")
    if not found:
        return False
    made = scram_verifier(password, base64.b64decode(found.group(2)), int(found.group(1)))
    return hmac.compare_digest(made, verifier or "")


def escape(field: str) -> str:
    """Return a field as a password file has it."""
    return field.replace("\\", "\\\\").replace(":", "\\:")


def read_passwords(path: str) -> dict[str, str]:
    """Return the password of each role that this module has written; the role is escaped as in the file."""
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.rstrip("\n") for line in stream]
    except FileNotFoundError:
        return {}
    return {line[6:].rpartition(":")[0]: line[6:].rpartition(":")[2] for line in lines if line.startswith("*:*:*:")}


def write_passwords(path: str, passwords: dict[str, str]) -> None:
    """Replace the password file by rename; nobody else can ever read it."""
    aside = path + ".new"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.writelines(f"*:*:*:{role}:{password}\n" for role, password in passwords.items())
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(aside, path)


def ensure_passwords(params: dict, check_mode: bool) -> dict:
    """Bring file and server to the same passwords."""
    from psycopg2 import sql

    for role in params["roles"]:
        if len(role.splitlines()) != 1:  # the password file has one line a role
            raise ValueError(f"roles: {role!r} is no role's name")
    before = read_passwords(params["passfile"])
    missing = {escape(role): secrets.token_urlsafe(PASSWORD_BYTES) for role in params["roles"]}
    missing = {role: password for role, password in missing.items() if params["rotate"] or role not in before}
    passwords = {**before, **missing}
    # The connection comes first: over the network it needs the password that is about to change.
    with _connection.connect(params, params["database"]) as connection:
        stored = dict(_connection.rows(connection, "SELECT rolname, rolpassword FROM pg_authid"))
        stale = [role for role in params["roles"] if not matches(passwords[escape(role)], stored.get(role))]
        if missing and not check_mode:
            write_passwords(params["passfile"], passwords)
        try:
            for role in [] if check_mode else stale:
                verifier = scram_verifier(passwords[escape(role)], os.urandom(16), ITERATIONS)
                statement = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier))
                with connection.cursor() as cursor:
                    cursor.execute(statement)
                before[escape(role)] = passwords[escape(role)]
        except Exception:
            write_passwords(params["passfile"], before)  # what the server has
            raise
    return {"changed": bool(stale or missing), "changed_roles": stale}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "database": {"type": "str", "required": True},
            "roles": {"type": "list", "elements": "str", "required": True},
            "rotate": {"type": "bool", "default": False},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_passwords(module.params, module.check_mode)
    except (_connection.Unreachable, OSError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
