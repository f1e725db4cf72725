# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps of the study databases, made beside everything else that the hosting program does.

A round is a generator: it gives way while a program runs, and closing it ends that program.

Dumps that a user asked for are called ``DATABASE-TIME.kept.dump``. Only the user removes them.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import time
from typing import Callable, Generator, List, Optional  # noqa: F401 - Optional in a type comment

from . import files
from .layout import Layout
from .postgres import Failed, Postgres, client_environment, end_with_parent

Steps = Generator[None, None, None]

# Seconds after the start in which workers come back and nothing else should happen.
FIRST_PAUSE = 60.0
NICENESS = 10
# pg_dump reads beside all workers; only a change of the schema makes it wait.
LOCK_WAIT_MILLISECONDS = 60000
SUM = ".sha256"
KEPT = ".kept"
# What is read at a time; the hosting program has other things to do in between.
BLOCK_BYTES = 16 * 1024 * 1024


class Dumps:
    """The dumps in ``<root>/dumps``. ``told`` says why the last round left a database without one, else ""."""

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
            if re.match(r"\w+-\w+(\.kept)?\.dump\.part$", name):  # of an earlier life; the lease is ours
                files.remove(os.path.join(self._folder, name))
        self._due = time.monotonic() + max(pause, self._every - self._age())

    def poll(self) -> None:
        """Go on with the round, or begin one that is due. Never waits."""
        if self._round is None and self._every and time.monotonic() >= self._due:
            self._begin()
        if self._round is not None:
            try:
                next(self._round)
            except StopIteration:
                self._round = None

    def now(self, patience: float, alive: Callable[[], None], kept: bool = False) -> bool:
        """Make a round at once, or give it up after ``patience`` seconds. True if every database has a new dump.

        Later rounds never remove dumps that are ``kept``.
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

    def cancel(self) -> None:
        """Give the round up, if there is one; what it has not finished is removed."""
        if self._round is not None:
            self._round.close()
            self._round = None

    def _begin(self, kept: bool = False) -> None:
        self._due = time.monotonic() + self._every
        self._round = self._dump_all(kept)

    def _age(self) -> float:
        """Return how many seconds ago the last dump was made, of the database where that is longest."""
        newest = [self._dumps_of(database)[-1:] for database in self._databases]
        if not all(newest):
            return self._every
        made = [os.stat(path).st_mtime for paths in newest for path in paths]
        return max(0.0, time.time() - min(made or [0.0]))

    def _dumps_of(self, database: str) -> List[str]:
        """Return the finished dumps of regular rounds, oldest first."""
        name = re.compile(r"%s-\w+\.dump$" % re.escape(database))
        return [os.path.join(self._folder, each) for each in sorted(os.listdir(self._folder)) if name.match(each)]

    def _dump_all(self, kept: bool = False) -> Steps:
        refused = []
        for database in self._databases:
            try:
                yield from self._dump(database, kept)
            except (Failed, OSError) as error:
                refused.append("no dump of %s: %s" % (database, error))
        self.told = "; ".join(refused)

    def _dump(self, database: str, kept: bool = False) -> Steps:
        made = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = os.path.join(self._folder, "%s-%s%s.dump" % (database, made, KEPT if kept else ""))
        part = path + ".part"
        try:
            yield from self._run(
                "pg_dump", "--format=custom", "--no-privileges", "--lock-wait-timeout=%d" % LOCK_WAIT_MILLISECONDS,
                "--host=%s" % self.postgres.socket, "--port=%d" % self.postgres.port, "--no-password",
                "--file=%s" % part, database,  # synced to the disk by pg_dump
            )
            # Everything is read: the list of contents, which is at the front, is fine in a dump that was cut off.
            yield from self._run("pg_restore", "--file=%s" % os.devnull, part)
            digest = hashlib.sha256()
            with open(part, "rb") as stream:
                for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
                    digest.update(block)
                    yield
            # In the form of sha256sum, which finds what PostgreSQL does not: a changed bit in the list of contents.
            files.write_atomically(path + SUM, "%s  %s\n" % (digest.hexdigest(), os.path.basename(path)))
            os.rename(part, path)
            files.sync(self._folder)
        finally:
            with contextlib.suppress(OSError):  # no reason to lose why we end; the next start removes it
                files.remove(part)
        for older in [] if kept else self._dumps_of(database)[:-self._keep]:
            files.remove(older)
            files.remove(older + SUM)

    def _run(self, program: str, *arguments: str) -> Steps:
        """Run one of PostgreSQL's programs, giving way until it ends; raise Failed with its own words."""
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                [os.path.join(self._bindir, program)] + list(arguments), cwd=self._folder, env=client_environment(),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=be_modest,
            )
            try:
                while child.poll() is None:
                    yield
            finally:
                if child.poll() is None:
                    child.kill()
                    with contextlib.suppress(subprocess.TimeoutExpired):  # where the file system hangs
                        child.wait(5)
            if child.returncode:
                said.seek(0)
                lines = said.read().decode("utf-8", "replace").splitlines()
                errors = [line.strip() for line in lines if "error:" in line]
                raise Failed((errors or lines or ["%s ended with %d" % (program, child.returncode)])[0])


def be_modest() -> None:
    """In the child: leave the processor to postgres, and end when the hosting program does."""
    os.umask(0o077)
    os.nice(NICENESS)
    end_with_parent(signal.SIGKILL)
