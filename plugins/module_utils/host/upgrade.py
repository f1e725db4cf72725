# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Move the studies to another major version of PostgreSQL, and back.

The new data directory is prepared separately and compared with the old one. One rename activates it: that of
``host/settings.json``, which names programs, data directory and configuration. Only its own postgres, as our child
process, ever runs on the old data directory. pg_upgrade starts servers that would keep running if we were killed, so
it works on a copy.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, Optional

from . import files
from .dumps import Dumps, be_modest
from .keeper import Keeper
from .layout import Layout
from .postgres import Failed, Postgres, client_environment, end_orphans, socket_folder

Settings = Dict[str, Any]
Contents = Dict[str, Dict[str, Any]]  # the tables and studies of each database

# A data directory of the new major version, as created by initdb.
NEW = ".new"
# A data directory that is still being built. It is not used otherwise; the next run starts over.
UNFINISHED = ".unfinished"
COPY = ".copy"

BLOCK_BYTES = 16 * 1024 * 1024
START_PATIENCE = 300
STOP_PATIENCE = 300
DUMP_PATIENCE = 24 * 3600
# A row's text must depend only on the row.
SAME_TEXT = "-c timezone=UTC -c datestyle=ISO -c extra_float_digits=1 -c bytea_output=hex"

DATABASES = "SELECT to_json(datname) FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname;"
ROLES = """
SELECT json_build_array('table', 'roles', count(*),
  coalesce(sum(hashtextextended(concat_ws(' ', rolname, rolpassword, rolsuper, rolcanlogin), 0)::numeric), 0)::text)
FROM pg_authid WHERE rolname !~ '^pg_';
"""
# The sum does not depend on the order of the rows.
TABLES = r"""
SELECT format('SELECT json_build_array(''table'', %L, count(*),
  coalesce(sum(hashtextextended(hpc_db_row::text COLLATE "C", 0)::numeric), 0)::text) FROM %I.%I AS hpc_db_row',
  nspname || '.' || relname, nspname, relname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind = 'r' AND nspname <> 'information_schema' AND nspname !~ '^pg_' ORDER BY nspname, relname \gexec
"""
STUDIES = r"""
SELECT to_regclass('public.study_directions') IS NOT NULL AND to_regclass('public.trial_values') IS NOT NULL AS optuna
\gset
\if :optuna
SELECT json_build_array('study', study_name, study_directions.objective, direction, count(trials.trial_id),
  CASE direction::text WHEN 'MINIMIZE' THEN min(value) ELSE max(value) END)
FROM public.studies JOIN public.study_directions USING (study_id)
LEFT JOIN public.trials ON trials.study_id = studies.study_id AND state::text = 'COMPLETE'
LEFT JOIN public.trial_values ON trial_values.trial_id = trials.trial_id
  AND trial_values.objective = study_directions.objective
  AND coalesce(to_jsonb(trial_values)->>'value_type', 'FINITE') = 'FINITE'
GROUP BY study_name, study_directions.objective, direction ORDER BY study_name, study_directions.objective;
\endif
"""

# Reset privileges on PostgreSQL's own functions, since some have other arguments in another major version. The playbook
# that moves the studies sets the privileges again afterwards.
FUNCTIONS = r"""
SELECT format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', name),
  (SELECT format('REVOKE ALL ON FUNCTION %s FROM ', name) || string_agg(grantee::regrole::text, ', ')
   FROM aclexplode(proacl) WHERE grantee NOT IN (0, proowner))
FROM pg_proc, CAST(pg_proc.oid AS regprocedure) AS name
WHERE pronamespace = 'pg_catalog'::regnamespace AND proacl IS NOT NULL
  AND NOT EXISTS (SELECT FROM pg_init_privs WHERE classoid = 'pg_proc'::regclass AND objoid = pg_proc.oid) \gexec
"""

# A table of the storage proxy, which creates and clears it whenever it runs.
NOTES = "hpc_db.requests"

# Parameters of a server that only this program uses.
QUIET = {"shared_buffers": "32MB", "max_connections": "20", "max_wal_size": "256MB"}


class Rejected(Exception):
    """pg_upgrade cannot move this data directory and has not changed anything; the message says why."""


class Upgrade:
    """A move from the major version in ``settings`` to the one in the file ``following``.

    ``keeper`` renews the lease meanwhile, and raises Lost when nothing may be written any more.
    """

    def __init__(self, settings: Settings, following: str, keeper: Keeper) -> None:
        self.root = settings["root"]
        self.old = settings
        self._following = following
        self.new = dict(files.read_json(following) or {}, root=self.root)  # type: Settings
        if "data" not in self.new:
            raise Failed("%s contains no data directory; run the playbook upgrade.yml" % following)
        self._keeper = keeper

    def run(self, back: bool) -> Dict[str, Any]:
        """Move everything, or go back to the data directory that was kept; return a summary with the contents."""
        began = time.monotonic()
        leaving = major_of(self.old["data"])
        if self.new["data"] == self.old["data"]:
            files.remove(self._following)
            raise Failed("another run has already moved the studies to PostgreSQL %s" % leaving)
        kept = self._kept()
        with self._server(self.old) as old:
            before = self.contents(old, self.old)
            self._dump(old)
            for database in [] if kept else before:
                self._ask(old, self.old, database, FUNCTIONS)
        if kept:
            with self._server(self.new) as new:
                after = self.contents(new, self.new)
            lost = differences(before, after, but=NOTES)
            if lost and not back:
                raise Failed(
                    "upgrade_back: PostgreSQL %s holds an earlier state of the studies (%s); upgrade_back=true returns "
                    "to it, and later changes remain in %s"
                    % (major_of(self.new["data"]), in_short(lost), self.old["data"])
                )
            way = "kept"
        else:
            way, after = self._move(before)
        self._switch(kept)
        return {
            "way": way, "from": leaving, "to": major_of(self.new["data"]), "kept": self.old["data"],
            "seconds": round(time.monotonic() - began, 1), "databases": after,
        }

    def _kept(self) -> bool:
        """Return whether this is the way back, to a data directory that was in use."""
        wanted = major_of(self.new["data"])
        return bool(wanted) and int(wanted) < int(major_of(self.old["data"]) or 0)

    def _dump(self, old: Postgres) -> None:
        """Dump every study database; only the user removes these dumps."""
        dumps = Dumps(self.old, old)
        if not dumps.now(DUMP_PATIENCE, self._keeper.check, kept=True):
            raise Failed(dumps.told)

    def _move(self, before: Contents) -> Any:
        """Fill the new data directory under its temporary name; return the method and the contents."""
        self._discard(UNFINISHED)
        self._discard(COPY)
        aside = self.new["data"] + UNFINISHED
        os.rename(self.new["data"] + NEW, aside)
        new = dict(self.new, data=aside)
        try:
            self._pg_upgrade(aside)
            way = "pg_upgrade"
        except Rejected as rejected:
            way = "dump and restore, since pg_upgrade failed: %s" % rejected
            with self._server(self.old) as old, self._server(new) as empty:
                self._restore(old, empty)
        finally:
            with contextlib.suppress(OSError):  # the next run discards it
                self._discard(COPY)
        with self._server(new) as server:
            after = self.contents(server, new)
            lost = differences(before, after)
            if lost:
                raise Failed("the contents of PostgreSQL %s differ: %s" % (major_of(aside), in_short(lost)))
            # pg_upgrade and pg_restore do not transfer all statistics.
            options = ["--all", "--analyze-only", "--quiet"]
            self._program([self._at(new, "vacuumdb")] + options + where(server), client_environment())
        return way, after

    def _pg_upgrade(self, aside: str) -> None:
        """Run pg_upgrade on a copy; raise Rejected if it refuses, Failed if it fails half-way."""
        program = self._at(self.new, "pg_upgrade")
        if not os.path.exists(program):
            raise Rejected("%s is missing" % program)
        copy = self.new["data"] + COPY
        copy_tree(self.old["data"], copy, self._keeper.check)
        # pg_upgrade leaves scripts in its working directory, and needs a path short enough for a socket.
        folder = socket_folder(self.new["socket_parent"], self.new["instance"])
        try:
            # Hard links are safe: they share files only with the copy, not with the old directory.
            self._program([
                program, "--old-bindir=" + self.old["bindir"], "--new-bindir=" + self.new["bindir"],
                "--old-datadir=" + copy, "--new-datadir=" + aside, "--socketdir=" + folder, "--link",
            ], client_environment(), folder=folder)
        except Told as told:
            if "Performing Upgrade" in told.said:
                raise Failed("pg_upgrade failed: %s; its logs are in %s" % (told, aside)) from None
            raise Rejected(told) from None
        finally:
            for data in (copy, aside):
                end_orphans(data)  # servers left behind if pg_upgrade was killed
            shutil.rmtree(folder, ignore_errors=True)

    def _restore(self, old: Postgres, new: Postgres) -> None:
        """Copy roles and databases through pipes, so that no password is ever in a file."""
        environment = client_environment()
        into = [self._at(self.new, "psql"), "-XqAt", "-v", "ON_ERROR_STOP=1"] + where(new)
        # The new major version's programs support both.
        said = self._program(
            [self._at(self.new, "pg_dumpall"), "--roles-only"] + where(old), environment)
        owner = self._program(into + ["-d", "postgres", "-c", "SELECT quote_ident(current_user)"], environment).strip()
        roles = "".join(line for line in said.splitlines(True) if line.strip() != "CREATE ROLE %s;" % owner)
        self._program(into + ["-d", "postgres"], environment, given=roles)
        for database in self._databases(old, self.old):
            options = ["--no-tablespaces"] + ([] if database == "postgres" else ["--create"])
            dump = [self._at(self.new, "pg_dump")] + options + where(old) + ["-d", conninfo(database)]
            self._program(into + ["-d", "postgres"], environment, source=dump)

    def contents(self, server: Postgres, settings: Settings) -> Contents:
        """Return for each database the number and checksum of each table's rows, and each study's best value."""
        found = {}
        for database in self._databases(server, settings):
            asked = TABLES + STUDIES + (ROLES if database == "postgres" else "")
            rows = self._ask(server, settings, database, asked)
            found[database] = {
                "tables": {row[1]: row[2:] for row in rows if row[0] == "table"},
                "studies": [
                    dict(zip(("study", "objective", "direction", "trials", "best"), row[1:]))
                    for row in rows if row[0] == "study"
                ],
            }
        return found

    def _databases(self, server: Postgres, settings: Settings) -> List[str]:
        return self._ask(server, settings, "postgres", DATABASES)

    def _ask(self, server: Postgres, settings: Settings, database: str, script: str) -> List[Any]:
        """Run a psql script; return the JSON value on each line of its output."""
        command = [self._at(settings, "psql"), "-XqAt", "-v", "ON_ERROR_STOP=1"] + where(server)
        environment = dict(client_environment(), PGOPTIONS=SAME_TEXT)
        printed = self._program(command + ["-d", conninfo(database)], environment, given=script)
        # Not splitlines: a study's name may contain other line separators.
        return [json.loads(line) for line in printed.split("\n") if line]

    @contextlib.contextmanager
    def _server(self, settings: Settings) -> Iterator[Postgres]:
        """Run postgres on a data directory for this program only; raise Failed if it does not stop cleanly."""
        postgres = Postgres(settings, False, self._keeper, dict(QUIET, data_directory=settings["data"]))
        try:
            postgres.start()
            postgres.wait_for_write(START_PATIENCE)
            yield postgres
        finally:
            clean = postgres.stop(STOP_PATIENCE)
        if not clean:
            raise Failed("postgres did not stop cleanly on %s" % settings["data"])

    def _switch(self, back: bool) -> None:
        """Activate the new data directory: by one rename, after everything else."""
        data, folder = self.new["data"], os.path.dirname(self.new["data"])
        self._keeper.renew()
        if not back:
            if os.path.lexists(data):  # in use before the user went back, or left by a run that ended here
                os.rename(data, "%s.%s" % (data, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())))
            os.rename(data + UNFINISHED, data)
            files.sync(folder)
        self._keeper.renew()
        settings = Layout(self.root).settings
        os.rename(self._following, settings)
        files.sync(os.path.dirname(settings))

    def _discard(self, ending: str) -> None:
        folder = self.new["data"] + ending
        if os.path.lexists(folder):
            end_orphans(folder)
            shutil.rmtree(folder)

    def _at(self, settings: Settings, program: str) -> str:
        return os.path.join(settings["bindir"], program)

    def _program(
        self, command: List[str], environment: Dict[str, str], given: str = "", folder: str = "/",
        source: Optional[List[str]] = None,
    ) -> str:
        """Run a program with input from ``given`` or from the program ``source``; return its output or raise Told."""
        with contextlib.ExitStack() as after:
            stdin, stdout, stderr = [after.enter_context(tempfile.TemporaryFile()) for _stream in range(3)]
            stdin.write(given.encode("utf-8"))
            stdin.seek(0)
            children = []

            def start(words: List[str], reads: Any, writes: Any) -> "subprocess.Popen[bytes]":
                child = subprocess.Popen(
                    words, cwd=folder, env=environment, stdin=reads, stdout=writes, stderr=stderr,
                    preexec_fn=be_modest,
                )
                after.callback(end, child)
                children.append(child)
                return child

            reads = stdin  # type: Any
            if source:
                reads = start(source, stdin, subprocess.PIPE).stdout
                after.callback(reads.close)
            start(command, reads, stdout)
            if source:
                reads.close()  # so that ``source`` is notified when the other program ends
            while any(child.poll() is None for child in children):
                self._keeper.check()
                time.sleep(0.05)
            said = []
            for stream in (stdout, stderr):
                stream.seek(0)
                said.append(stream.read().decode("utf-8", "replace"))
            for child, words in zip(children, [source, command] if source else [command]):
                if child.returncode:
                    raise Told(os.path.basename((words or command)[0]), *said)
            return said[0]


class Told(Failed):
    """A program failed; the message is its error in one line, ``said`` its whole standard output."""

    def __init__(self, program: str, stdout: str, stderr: str) -> None:
        self.said = stdout
        lines = [line.strip() for line in (stderr.strip() or stdout.strip()).splitlines()]
        # pg_upgrade prints errors to stdout, after a progress line that ends in "fatal"
        fatal = [number for number, line in enumerate(lines) if line.endswith(("fatal", "*failure*"))]
        errors = lines[fatal[-1] + 1:] if fatal else [line for line in lines if "ERROR:" in line or "error:" in line]
        Failed.__init__(self, "%s: %s" % (program, " ".join((errors or lines[-3:] or ["no error message"])[:8])))


def major_of(data: str) -> str:
    """Return the major version of a data directory; "" if the folder is not one."""
    try:
        with open(os.path.join(data, "PG_VERSION")) as stream:
            return stream.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def where(server: Postgres) -> List[str]:
    """Return the options with which PostgreSQL's programs connect to a server."""
    return ["-h", server.socket, "-p", str(server.port)]


def conninfo(database: str) -> str:
    """Return a connection string for a database, which protects any name from being misread."""
    return "dbname='%s'" % re.sub(r"([\\'])", r"\\\1", database)


def end(child: "subprocess.Popen[bytes]") -> None:
    """Kill a program that is still running, and wait for it."""
    if child.poll() is None:
        child.kill()
        child.wait()


def differences(before: Contents, after: Contents, but: str = "") -> List[str]:
    """Return one line for each difference; the table ``but`` is ignored."""
    found = ["%s is missing" % database for database in sorted(set(before) - set(after))]
    for database in sorted(set(before) & set(after)):
        tables, others = before[database]["tables"], after[database]["tables"]
        for name in sorted((set(tables) | set(others)) - {but}):
            had, has = tables.get(name, [0, ""]), others.get(name, [0, ""])
            if had != has:
                rows = "%s has %d rows, not %d" % (name, has[0], had[0])
                found.append("%s: %s" % (database, rows if had[0] != has[0] else "rows of %s differ" % name))
        if before[database]["studies"] != after[database]["studies"]:
            found.append("%s: best values of its studies differ" % database)
    return found


def in_short(lines: List[str]) -> str:
    return "; ".join(lines[:3]) + (" and %d more" % (len(lines) - 3) if len(lines) > 3 else "")


def copy_tree(source: str, target: str, alive: Callable[[], None]) -> None:
    """Copy a data directory; raise Rejected if it contains a symbolic link."""
    os.mkdir(target, 0o700)
    for entry in os.scandir(source):
        path = os.path.join(target, entry.name)
        if entry.is_symlink():
            raise Rejected("%s is a symbolic link" % entry.path)
        if entry.is_dir():
            copy_tree(entry.path, path, alive)
        else:
            with open(entry.path, "rb") as reads, open(path, "wb") as writes:
                for block in iter(lambda: reads.read(BLOCK_BYTES), b""):  # noqa: B023 - used up at once
                    writes.write(block)
                    alive()
