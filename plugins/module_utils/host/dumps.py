# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps of the study databases: their names, commands and checksums; and those that the supervisor makes.

The supervisor goes on with its other tasks meanwhile. A round is a generator: it yields while a program runs, and
closing it ends that program.

Dumps that a user requested are called ``DATABASE-TIME.kept.dump``. Only the user removes them. The module study_dump
makes such dumps, too.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import time
from typing import Callable, Generator, List, Optional, Tuple, TypeVar  # noqa: F401 - Optional in a type comment

from . import files
from .layout import Layout
from .postgres import Failed, Postgres, client_environment, end_with_parent

Result = TypeVar("Result")
Steps = Generator[None, None, None]

# No dump in the first seconds after the start, when the workers reconnect.
FIRST_PAUSE = 60.0
NICENESS = 10
# pg_dump does not conflict with workers; it waits only for a change of the schema.
LOCK_WAIT_MILLISECONDS = 60000
SUM = ".sha256"
# Follows the time in the name of a dump that only the user removes.
KEPT = ".kept"
# Bytes per read; the supervisor does other work in between.
BLOCK_BYTES = 16 * 1024 * 1024


def stamp() -> str:
    """Return the current time in UTC in the format of dump names, such as ``20260101T000000Z``."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def new_path(folder: str, database: str, kept: bool) -> str:
    """Return the path of a new dump in ``folder``. Later rounds of the supervisor never remove one that is ``kept``."""
    return os.path.join(folder, "%s-%s%s.dump" % (database, stamp(), KEPT if kept else ""))


def find(folder: str, database: str) -> List[Tuple[str, bool, str]]:
    """Return time, whether it is kept, and path of each finished dump of a database; the oldest is first."""
    name = re.compile(r"%s-(\w+)(%s)?\.dump" % (re.escape(database), re.escape(KEPT)))
    found = [name.fullmatch(each) for each in (os.listdir(folder) if os.path.isdir(folder) else [])]
    return sorted((each.group(1), bool(each.group(2)), os.path.join(folder, each.group())) for each in found if each)


def dump_command(bindir: str, path: str, connection: List[str]) -> List[str]:
    """Return the call that dumps a database to ``path``. ``connection`` are the arguments that name the database."""
    # pg_dump syncs the file to the disk.
    return [os.path.join(bindir, "pg_dump"), "--format=custom", "--no-privileges", "--file=%s" % path] + connection


def read_command(bindir: str, path: str) -> List[str]:
    """Return the call that reads all of a dump: if one is truncated, the table of contents at its front is intact."""
    return [os.path.join(bindir, "pg_restore"), "--format=custom", "--file=%s" % os.devnull, path]


def checksum(path: str) -> "Generator[None, None, str]":
    """Return a file's SHA-256; yield after each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
            digest.update(block)
            yield
    return digest.hexdigest()


def publish(part: str, path: str) -> Steps:
    """Write the checksum of the dump ``part``, which was read back, and rename the dump to ``path``."""
    digest = yield from checksum(part)
    # In sha256sum's format. The sum detects a flipped bit in the table of contents; PostgreSQL does not.
    files.write_atomically(path + SUM, "%s  %s\n" % (digest, os.path.basename(path)))
    os.rename(part, path)
    files.sync(os.path.dirname(path))


def finish(steps: "Generator[None, None, Result]") -> Result:
    """Run all steps without a pause; return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Dumps:
    """The dumps in ``<root>/dumps``. ``told`` says why the last round failed for a database; "" if it did not."""

    def __init__(self, settings: dict, postgres: Postgres, pause: float = FIRST_PAUSE) -> None:
        self.told = ""
        self.postgres = postgres
        self._bindir = settings["bindir"]
        self._databases = list(settings["databases"])
        self._keep = max(1, settings["dump_keep"])
        self._every = 60 * settings["dump_minutes"]
        self._folder = Layout(settings["root"]).dumps
        self._round = None  # type: Optional[Steps]
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        for name in os.listdir(self._folder):
            if re.match(r"\w+-\w+(\.kept)?\.dump\.part$", name):  # from an earlier run; we hold the lease
                files.remove(os.path.join(self._folder, name))
        self._due = time.monotonic() + max(pause, self._every - self._age())

    def poll(self) -> None:
        """Continue the current round, or begin one that is due. Never blocks."""
        if self._round is None and self._every and time.monotonic() >= self._due:
            self._begin()
        if self._round is not None:
            try:
                next(self._round)
            except StopIteration:
                self._round = None

    def now(self, patience: float, alive: Callable[[], None], kept: bool = False) -> bool:
        """Make a round now; abandon it after ``patience`` seconds. Return whether every database has a new dump.

        Later rounds never remove dumps made with ``kept``.
        """
        limit = time.monotonic() + patience
        self.cancel()
        self._begin(kept)
        try:
            while self._round is not None and time.monotonic() < limit:
                self.poll()
                alive()
                time.sleep(0.05)
            if self._round is not None:
                self.told = "no dump within %g s" % patience
        finally:
            self.cancel()
        return not self.told

    def are_recent(self) -> bool:
        """Return whether no regular round is due."""
        return self._age() < self._every

    def cancel(self) -> None:
        """Abandon the current round, if any, and remove its unfinished dump."""
        if self._round is not None:
            self._round.close()
            self._round = None

    def _begin(self, kept: bool = False) -> None:
        self._due = time.monotonic() + self._every
        self._round = self._dump_all(kept)

    def _age(self) -> float:
        """Return the age in seconds of the last dump, of the database where it is oldest."""
        newest = [self._dumps_of(database)[-1:] for database in self._databases]
        if not all(newest):
            return self._every
        made = [os.stat(path).st_mtime for paths in newest for path in paths]
        return max(0.0, time.time() - min(made or [0.0]))

    def _dumps_of(self, database: str) -> List[str]:
        """Return the finished dumps of regular rounds, oldest first."""
        return [path for _made, kept, path in find(self._folder, database) if not kept]

    def _dump_all(self, kept: bool = False) -> Steps:
        refused = []
        for database in self._databases:
            try:
                yield from self._dump(database, kept)
            except (Failed, OSError) as error:
                refused.append("cannot dump %s: %s" % (database, error))
        self.told = "; ".join(refused)

    def _dump(self, database: str, kept: bool = False) -> Steps:
        path = new_path(self._folder, database, kept)
        part = path + ".part"
        try:
            yield from self._run(dump_command(self._bindir, part, [
                "--lock-wait-timeout=%d" % LOCK_WAIT_MILLISECONDS, "--host=%s" % self.postgres.socket,
                "--port=%d" % self.postgres.port, "--no-password", database,
            ]))
            yield from self._run(read_command(self._bindir, part))
            yield from publish(part, path)
        finally:
            with contextlib.suppress(OSError):  # must not hide the original error; the next start removes the file
                files.remove(part)
        for older in [] if kept else self._dumps_of(database)[:-self._keep]:
            files.remove(older)
            files.remove(older + SUM)

    def _run(self, command: List[str]) -> Steps:
        """Run one of PostgreSQL's programs, yielding until it ends; raise Failed with its error message."""
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                command, cwd=self._folder, env=client_environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=said, preexec_fn=be_modest,
            )
            try:
                while child.poll() is None:
                    yield
            finally:
                if child.poll() is None:
                    child.kill()
                    with contextlib.suppress(subprocess.TimeoutExpired):  # if the file system hangs
                        child.wait(5)
            if child.returncode:
                said.seek(0)
                lines = said.read().decode("utf-8", "replace").splitlines()
                errors = [line.strip() for line in lines if "error:" in line]
                raise Failed((errors or lines or ["%s ended with %d" % (
                    os.path.basename(command[0]), child.returncode)])[0])


def be_modest() -> None:
    """In the child: run at a lower priority than postgres, and end with the supervisor."""
    os.umask(0o077)
    os.nice(NICENESS)
    end_with_parent(signal.SIGKILL)
