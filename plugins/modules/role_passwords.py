#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: role_passwords
short_description: Generate passwords of PostgreSQL roles on the target
description:
  - Generates a random password for each role without one in the password file, and sets it on the server.
  - Passwords never leave the target. The server receives only a SCRAM verifier, so that its log contains no passwords.
  - If a run is interrupted, both old and new passwords are kept (the new ones in O(passfile) with C(.new) appended)
    until the next run has determined which of them the server uses.
author: mala.hpc_db contributors (@mala-project)
options:
  database:
    description: Database to connect to. O(user) must be a superuser.
    type: str
    required: true
  roles:
    description: Existing roles. An empty list only completes an interrupted run.
    type: list
    elements: str
    required: true
  rotate:
    description: Generate new passwords for all O(roles), even if they have one. Always reports a change.
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
- name: Ensure the study role has a password
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
  description: Roles whose password was, or would be, set.
  returned: success
  type: list
  elements: str
passfile:
  description:
    - Path of the file with the passwords that the server uses. This is O(passfile), except in check mode after an
      interrupted run.
  returned: success
  type: str
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

# Bytes of randomness in a password: 256 bits cannot be guessed, even with the verifier.
PASSWORD_BYTES = 32
# PostgreSQL's default (scram_iterations).
ITERATIONS = 4096
# Suffix of the password file with new passwords while the server is being given them.
ASIDE = ".new"

# Two runs at once would overwrite each other's files. The end of a connection releases the lock; the server notices
# within 2 minutes that a client's node is gone.
LOCK = "SELECT set_config('lock_timeout', '150s', false), pg_advisory_lock(hashtext('hpc_db:passwords'))"
VERIFIERS = "SELECT rolname, rolpassword FROM pg_authid"


def scram_verifier(password: str, salt: bytes, iterations: int) -> str:
    """Return the verifier that PostgreSQL stores for a password (RFC 5803)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.new(salted, b"Client Key", hashlib.sha256).digest()
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.new(salted, b"Server Key", hashlib.sha256).digest()
    encoded = [base64.b64encode(part).decode() for part in (salt, stored_key, server_key)]
    return f"SCRAM-SHA-256${iterations}:{encoded[0]}${encoded[1]}:{encoded[2]}"


def matches(password: str, verifier: str | None) -> bool:
    """Return whether the server's verifier was made from this password."""
    found = re.match(r"SCRAM-SHA-256\$(\d+):([^$]+)\$", verifier or "")
    if not found:
        return False
    made = scram_verifier(password, base64.b64decode(found.group(2)), int(found.group(1)))
    return hmac.compare_digest(made, verifier or "")


def escape(field: str) -> str:
    """Return a field with the escapes of a password file."""
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
    """Write a new password file that is never readable by others."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.writelines(f"*:*:*:{role}:{password}\n" for role, password in passwords.items())
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def log_in(params: dict) -> Iterator[Any]:
    """Connect with the password file, or with the new one if the server already has the new passwords."""
    aside = params["passfile"] + ASIDE
    with contextlib.ExitStack() as opened:
        try:
            connection = opened.enter_context(_connection.connect(params, params["database"]))
        except _connection.Unreachable as refused:
            if not os.path.exists(aside):
                raise
            try:
                given = {**params, "passfile": aside}
                connection = opened.enter_context(_connection.connect(given, params["database"]))
            except _connection.Unreachable:
                raise refused from None
        yield connection


def ensure_passwords(params: dict, check_mode: bool) -> dict:
    """Bring file and server to the same passwords.

    New passwords are first written to a second file, then set in the server in one transaction, then the file is
    renamed into place. After an interruption the server's verifiers show which of the two files is valid.
    """
    for role in params["roles"]:
        if len(role.splitlines()) != 1:  # the password file has one line per role
            raise ValueError(f"roles: {role!r} is not a role's name")
    passfile, aside = params["passfile"], params["passfile"] + ASIDE
    if not params["roles"] and not os.path.exists(aside):
        return {"changed": False, "changed_roles": [], "passfile": passfile}
    with log_in(params) as connection:
        _connection.rows(connection, LOCK)
        interrupted = os.path.exists(aside)
        before, begun = read_passwords(passfile), read_passwords(aside)
        stored = {escape(role): verifier for role, verifier in _connection.rows(connection, VERIFIERS)}
        new = {role: password for role, password in begun.items() if password != before.get(role)}
        taken = any(matches(password, stored.get(role)) for role, password in new.items())
        kept = begun if taken else before
        missing = [escape(role) for role in params["roles"] if params["rotate"] or escape(role) not in kept]
        wanted = {**kept, **{role: secrets.token_urlsafe(PASSWORD_BYTES) for role in missing}}
        stale = [role for role in params["roles"] if not matches(wanted[escape(role)], stored.get(escape(role)))]
        if not check_mode:
            if taken:
                os.rename(aside, passfile)
            if missing or stale:
                write_passwords(aside, wanted)
                set_passwords(connection, {role: wanted[escape(role)] for role in stale})
                os.rename(aside, passfile)
            elif interrupted and not taken:
                os.unlink(aside)
    return {
        "changed": bool(stale or missing or interrupted),
        "changed_roles": stale,
        "passfile": aside if check_mode and taken else passfile,
    }


def set_passwords(connection: Any, passwords: dict[str, str]) -> None:
    """Set all passwords or none: statements sent in one call are one transaction."""
    from psycopg2 import sql

    statements = [
        sql.SQL("ALTER ROLE {} PASSWORD {}").format(
            sql.Identifier(role), sql.Literal(scram_verifier(password, os.urandom(16), ITERATIONS))
        )
        for role, password in passwords.items()
    ]
    if statements:
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("; ").join(statements))


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
