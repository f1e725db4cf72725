#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: study_dump
short_description: Dump a study database, or restore one from a dump
description:
  - C(pg_dump) writes the dump while workers run. The dump gets its name only after it was read back completely.
  - The name is C(DATABASE-TIME.kept.dump). The server job deletes only its own old dumps, never these.
  - A dump is restored into a new database, which replaces the old one once it contains every trial of the dump. A
    restore that fails or is interrupted therefore changes nothing that workers see.
  - Workers of the old database are disconnected, and cannot continue with remembered IDs. The new database has
    another C(hpc_db.generation), which tells the client package that it is a new one, and assigns no study or trial an
    ID that the old database has used.
author: mala.hpc_db contributors (@mala-project)
options:
  root:
    description: Path of the instance directory. Dumps are written into its folder C(dumps).
    type: path
    required: true
  database:
    description: Name of the study database.
    type: str
    required: true
  state:
    description: V(dumped) makes a dump. V(restored) restores one.
    type: str
    choices: [dumped, restored]
    default: dumped
  file:
    description:
      - Path of the dump to restore. V(newest) is the newest dump of O(database) in the instance directory, whether made
        by the server job or by a playbook.
      - It must match the checksum in the file of the same name with C(.sha256) appended, which is written with each
        dump.
    type: path
  owner:
    description: Role that owns the restored database and its contents.
    type: str
  replace:
    description:
      - Restore even if O(database) contains studies. The old database is kept with the time appended to its name.
      - Connections to it are closed.
    type: bool
    default: false
  tables:
    description:
      - V(optuna) is a study database. Its trials are counted to check that dump and restored database are complete.
      - V(none) is a database of another program. Its tables are counted instead.
    type: str
    choices: [optuna, none]
    default: optuna
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Dump the studies
  mala.hpc_db.study_dump:
    root: ~/hpc_db/hpc_db
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: studies

- name: Restore the newest dump
  mala.hpc_db.study_dump:
    root: ~/hpc_db/hpc_db
    host: c1
    port: 5432
    user: alice
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: studies
    state: restored
    file: newest
    owner: study
    replace: true
"""

RETURN = r"""
file:
  description: Path of the dump that was, or would be, made or restored.
  returned: success
  type: str
trials:
  description: Number of trials in the dump. Null in check mode with O(state=dumped), and with O(tables=none).
  returned: success
  type: int
tables:
  description: Number of tables in the dump with O(tables=none). Otherwise null, as in check mode with O(state=dumped).
  returned: success
  type: int
kept:
  description: Name of the replaced database, which is kept. Null if there was none or it contained no study.
  returned: O(state=restored)
  type: str
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import ENGLISH
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host import dumps, files
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import read_settings

# The database from which others are created and renamed.
MAINTENANCE = "postgres"
# A partial dump unchanged for this long was left by a killed run; a running dump never pauses that long.
LEFTOVER_SECONDS = 3600
# Maximum length of a database's name within the names of databases beside it.
MOST_BESIDE = 45

# The objects counted in a database, by its kind of tables.
COUNTED = {"optuna": "trials", "none": "tables"}
EXISTS = "SELECT 1 FROM pg_database WHERE datname = %s"
COUNTS = "SELECT (SELECT count(*) FROM studies), (SELECT count(*) FROM trials)"
# Tables as listed in a dump: without extensions' tables, although it may have their rows. 1259 is the oid of pg_class.
TABLE_ENTRY = re.compile(r"^\d+; 1259 \d+ TABLE ", re.MULTILINE)
TABLES = """
SELECT count(*) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p') AND nspname <> 'information_schema' AND nspname !~ '^pg_'
AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e')
"""
# The sequences from which SQLAlchemy and Optuna take their ids.
COUNTERS = "SELECT schemaname, sequencename, last_value FROM pg_sequences WHERE last_value IS NOT NULL"
COUNT_ON = "SELECT setval(to_regclass(%s), %s) WHERE to_regclass(%s) IS NOT NULL"
# More ids than workers use until they are disconnected.
SPARE_IDS = 10000
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ANY(%s)"

Run = Callable[[list[str]], str]


class Refused(Exception):
    """The dump or the database is not suitable; nothing was changed."""


class Failed(Exception):
    """The operation failed; the message is for the user."""


def restore_command(bindir: str, params: dict, database: str, path: str) -> list[str]:
    """Return the call that restores a dump into an empty database, completely or not at all."""
    return [
        f"{bindir}/pg_restore",
        "--single-transaction",
        "--exit-on-error",
        "--no-owner",
        "--no-privileges",
        f"--role={params['owner']}",
        f"--dbname={_connection.conninfo(params, database)}",
        path,
    ]


def count_rows(script: str) -> int:
    """Return the number of rows in a script with one table's data."""
    lines = script.split("\n")
    begin = next((number for number, line in enumerate(lines) if line.startswith("COPY ")), None)
    return 0 if begin is None else lines.index("\\.", begin) - begin - 1


def count_dump(bindir: str, path: str, run: Run, tables: str = "optuna") -> int | None:
    """Read the whole dump and return its number of trials; None if it has no table of trials.

    For a dump of another program, return the number of tables.
    """
    command = [f"{bindir}/pg_restore", "--format=custom", path]
    listed = run([*command, "--list"])
    run(dumps.read_command(bindir, path))
    if tables == "none":
        return len(TABLE_ENTRY.findall(listed))
    if " TABLE DATA public trials " not in listed:
        return None
    return count_rows(run([*command, "--data-only", "--table=trials", "--file=-"]))


def check_dump(bindir: str, path: str, run: Run, tables: str = "optuna") -> int:
    """Return the result of ``count_dump``; raise Refused if the dump is damaged or not a dump of studies."""
    name = os.path.basename(path)
    try:
        if os.path.exists(path + dumps.SUM):
            with open(path + dumps.SUM, encoding="utf-8", errors="replace") as stream:
                if stream.read().split()[:1] != [dumps.finish(dumps.checksum(path))]:
                    raise Refused(f"restore_from: {name} is damaged: it does not fit {name}{dumps.SUM}")
        counted = count_dump(bindir, path, run, tables)
    except (Failed, OSError) as error:
        raise Refused(f"restore_from: {name} is not a dump, or is damaged: {error}") from None
    if counted is None:
        raise Refused(
            f"restore_from: {name} is a dump of something else: it has no table of Optuna's trials; a database of "
            "another program is in databases_studies with tables: none"
        )
    return counted


def newest_dump(folder: str, database: str) -> str:
    """Return the newest dump of a database."""
    found = dumps.find(folder, database)
    if not found:
        raise Refused(f"{folder} contains no dump of {database}")
    _made, _kept, path = found[-1]
    return path


def ensure_dumped(params: dict, run: Run, check_mode: bool) -> dict:
    """Make a dump. ``run`` takes an argument list and returns its stdout."""
    bindir = read_settings(params["root"])["bindir"]
    folder = Layout(params["root"]).dumps
    path = dumps.new_path(folder, params["database"], kept=True)
    count = None
    if not check_mode:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        remove_leftovers(folder)
        # Hidden: .part files without a leading dot belong to the supervisor.
        part = os.path.join(folder, f".{os.path.basename(path)}.part")
        try:
            database = _connection.conninfo(params, params["database"])
            run(dumps.dump_command(bindir, part, [f"--dbname={database}"]))
            count = count_dump(bindir, part, run, params["tables"]) or 0
            dumps.finish(dumps.publish(part, path))
        finally:
            files.remove(part)
    diff = {"before": "", "after": f"{path}\n"}
    return {"changed": True, "file": path, **told(params, count), "diff": diff}


def remove_leftovers(folder: str) -> None:
    """Remove the partial dumps of killed runs."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if re.fullmatch(r"\..+\.dump\.part", name) and time.time() - os.stat(path).st_mtime > LEFTOVER_SECONDS:
            os.unlink(path)


def look(params: dict) -> tuple[int, int] | None:
    """Return the result of ``count``; None if the database does not exist."""
    with _connection.connect(params, MAINTENANCE) as connection:
        if not _connection.rows(connection, EXISTS, (params["database"],)):
            return None
    return count(params, params["database"])


def count(params: dict, database: str) -> tuple[int, int]:
    """Return the number of studies and trials in a database; for another program's, the number of tables twice."""
    with _connection.connect(params, database) as connection:
        if params["tables"] == "none":
            ((tables,),) = _connection.rows(connection, TABLES)
            return (tables, tables)
        if _connection.rows(connection, "SELECT to_regclass('trials')") == [(None,)]:
            return (0, 0)
        studies, trials = _connection.rows(connection, COUNTS)[0]
        return (studies, trials)


def ensure_restored(params: dict, run: Run, check_mode: bool) -> dict:
    """Replace the database by a dump. ``run`` takes an argument list and returns its stdout."""
    bindir, database = read_settings(params["root"])["bindir"], params["database"]
    path = params["file"]
    if path == "newest":
        path = newest_dump(Layout(params["root"]).dumps, database)
    tables, counted = params["tables"], COUNTED[params["tables"]]
    wanted = check_dump(bindir, path, run, tables)
    found = look(params)
    if found and found[0] and not params["replace"]:
        held = f"{found[0]} studies with {found[1]} trials" if tables == "optuna" else f"{found[0]} tables"
        raise Refused(
            f"restore_database: {database} contains {held}; with restore_replace=true the dump takes its place, "
            "and it is kept under another name"
        )
    kept = beside(database, dumps.stamp()) if found else None
    if not check_mode:
        with restored_aside(bindir, params, path, run) as aside:
            restored = count(params, aside)
            if restored[1] != wanted:
                lost = f"{path} contains {wanted} {counted}, but {restored[1]} were restored"
                raise Failed(f"{lost}; nothing was changed")
            if found:
                count_on(params, aside)
            generation = f"{dumps.stamp()}-{os.urandom(4).hex()}"
            execute(params, f"ALTER DATABASE {quoted(aside)} SET hpc_db.generation = '{generation}'")
            swap(params, aside, kept)
        if kept and found and not found[0]:
            execute(params, f"DROP DATABASE {quoted(kept)}")
    return {
        "changed": True,
        "file": path,
        **told(params, wanted),
        "kept": kept if found and found[0] else None,
        "diff": {
            "before": f"{database}: {found[1]} {counted}\n" if found else "",
            "after": f"{database}: {wanted} {counted}\n",
        },
    }


def told(params: dict, count: int | None) -> dict[str, int | None]:
    """Return the count under the name of the counted objects."""
    return {**dict.fromkeys(COUNTED.values()), COUNTED[params["tables"]]: count}


@contextlib.contextmanager
def restored_aside(bindir: str, params: dict, path: str, run: Run) -> Iterator[str]:
    """Restore a dump into a new database, which is removed afterwards if it still has that name."""
    aside = beside(params["database"], "restoring")
    drop = f"DROP DATABASE IF EXISTS {quoted(aside)} WITH (FORCE)"
    execute(params, drop)  # an earlier run may have been killed
    try:
        execute(params, f"CREATE DATABASE {quoted(aside)} OWNER {quoted(params['owner'])}")
        run(restore_command(bindir, params, aside, path))
        yield aside
    finally:
        execute(params, drop)


def count_on(params: dict, aside: str) -> None:
    """Advance the sequences of ``aside`` beyond all ids that the database in use has issued or may still issue."""
    given: dict[str, int] = {}
    for database in (params["database"], aside):
        with _connection.connect(params, database) as connection:
            for schema, name, last in _connection.rows(connection, COUNTERS):
                sequence = f"{quoted(schema)}.{quoted(name)}"
                given[sequence] = max(given.get(sequence, 0), last)
    with _connection.connect(params, aside) as connection:
        for sequence, last in given.items():
            _connection.rows(connection, COUNT_ON, (sequence, last + SPARE_IDS, sequence))


def beside(database: str, what: str) -> str:
    """Return a name that no study database has and that is within PostgreSQL's limit of 63 bytes."""
    if len(database) > MOST_BESIDE:  # other names may begin like it
        digest = hashlib.sha256(database.encode()).hexdigest()[:8]
        database = f"{database[:MOST_BESIDE - 9]}-{digest}"
    return f"{database}-{what}"


def swap(params: dict, aside: str, kept: str | None) -> None:
    """Rename the database ``aside`` to its final name, and the present one to ``kept``, in one transaction."""
    database = params["database"]
    renames = [(database, kept)] if kept else []
    statement = "; ".join(
        f"ALTER DATABASE {quoted(old)} RENAME TO {quoted(new)}" for old, new in [*renames, (aside, database)]
    )
    # While the renaming waits for sessions to end, new ones are locked out. Statements sent in one call are one
    # transaction.
    with ThreadPoolExecutor(1) as pool, _connection.connect(params, MAINTENANCE) as connection:
        renaming = pool.submit(execute, params, statement)
        while not renaming.done():
            _connection.rows(connection, END_SESSIONS, ([database, aside],))
            time.sleep(0.1)
        renaming.result()


def execute(params: dict, statement: str) -> None:
    """Run a statement that returns nothing."""
    with _connection.connect(params, MAINTENANCE) as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def quoted(name: str) -> str:
    """Return a name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def run_command(module: AnsibleModule, command: list[str]) -> str:
    """Run one of PostgreSQL's programs; raise Failed with its error message."""
    try:
        returncode, stdout, stderr = module.run_command(command, handle_exceptions=False, environ_update=ENGLISH)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if returncode:
        errors = [line for line in stderr.splitlines() if "error:" in line] or stderr.split("\n")
        raise Failed(f"{os.path.basename(command[0])} failed: {' '.join(errors[0].split())}")
    return stdout


def main() -> None:
    """Run the module."""
    argument_spec: dict[str, Any] = {
        "root": {"type": "path", "required": True},
        "database": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["dumped", "restored"], "default": "dumped"},
        "file": {"type": "path"},
        "owner": {"type": "str"},
        "replace": {"type": "bool", "default": False},
        "tables": {"type": "str", "choices": ["optuna", "none"], "default": "optuna"},
        **_connection.CONNECTION_OPTIONS,
    }
    module = AnsibleModule(
        argument_spec=argument_spec,
        required_if=[("state", "restored", ["file", "owner"])],
        supports_check_mode=True,
    )
    os.umask(0o077)
    # PostgreSQL's programs read PGOPTIONS and other PG variables, and load libraries.
    for name in [name for name in os.environ if name.startswith("PG") or name == "LD_LIBRARY_PATH"]:
        del os.environ[name]
    act = ensure_dumped if module.params["state"] == "dumped" else ensure_restored
    try:
        result = act(module.params, lambda command: run_command(module, command), module.check_mode)
    except (_connection.Unreachable, Refused, Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
