# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Attacks by another user of the cluster; run as that user. Prints each attempt and how it was refused, one per line.

    intruder.py doors HOST:PORT... -- ROLE... -- DATABASE...    log in without a password
    intruder.py leaked HOST:PORT ROLE DATABASE                  go further with the password in PGPASSWORD
"""

import itertools
import os
import sys

import psycopg2

BEYOND = {
    "programs": "COPY (SELECT 1) TO PROGRAM 'id'",
    "programs' output": "CREATE TEMP TABLE t (line text); COPY t FROM PROGRAM 'id'",
    "files": "SELECT pg_read_file('/etc/passwd')",
    "files by COPY": "CREATE TEMP TABLE t (line text); COPY t FROM '/etc/passwd'",
    "writing files": "COPY (SELECT 1) TO '/tmp/planted'",
    "ALTER SYSTEM": "ALTER SYSTEM SET fsync = off",
    "CREATE ROLE": "CREATE ROLE intruder SUPERUSER",
    "the owner's role": "SET ROLE alice",
}


def attempt(what: str, where: dict, statement: str) -> None:
    """Run one attempt and print its result."""
    try:
        connection = psycopg2.connect(connect_timeout=5, **where)
        connection.autocommit = True
        connection.cursor().execute(statement)
    except psycopg2.Error as error:
        print(f"{what}: refused: {' '.join(str(error).split())}")
    else:
        print(f"{what}: ALLOWED")


def main() -> None:
    """Run all attempts."""
    verb, *arguments = sys.argv[1:]
    if verb == "leaked":
        address, role, database = arguments
        host, _colon, port = address.rpartition(":")
        where = {"host": host, "port": port, "user": role, "dbname": database}
        attempt("its own database", where, "SELECT 1")
        for what, statement in BEYOND.items():
            attempt(what, where, statement)
        return
    first = arguments.index("--")
    second = arguments.index("--", first + 1)
    doors = itertools.product(arguments[:first], arguments[first + 1:second], arguments[second + 1:])
    for (address, role, database), mode in itertools.product(doors, ("disable", "require")):
        host, _colon, port = address.rpartition(":")
        if mode == "require" and os.path.isabs(host):
            continue
        where = {"host": host, "port": port, "user": role, "dbname": database, "sslmode": mode}
        attempt(f"{role}@{database} on {address}, TLS {mode}", where, "SELECT 1")


if __name__ == "__main__":
    main()
