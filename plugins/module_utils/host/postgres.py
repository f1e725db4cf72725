# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run postgres as a child process in the foreground: start, probe, stop."""

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Callable, Dict, List, Optional

from . import causes, files, processes
from .keeper import Keeper
from .layout import Layout
from .threads import signals_waiting

PR_SET_PDEATHSIG = 1
# sockaddr_un holds 108 bytes with the final NUL; PostgreSQL adds "/.s.PGSQL.65535".
LONGEST_SOCKET_FOLDER = 107 - len("/.s.PGSQL.65535")

# The programs that the server job runs, on a node that may differ from the one where they were installed.
PROGRAMS = ("postgres", "psql", "pg_dump", "pg_restore")

# The write goes to the WAL and is flushed like any commit, but needs no table.
PROBE = """
SELECT pg_logical_emit_message(true, 'hpc_db', 'probe');
SELECT count(*), current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
FROM pg_stat_activity WHERE backend_type = 'client backend';
"""

# psql is already connected when it sends SIGTERM to the postmaster. This is PostgreSQL's smart shutdown: new
# connections are refused, existing ones continue. However the server ends, no other state is left behind.
DRAIN = """
\\! kill -TERM %d
DO $$
DECLARE
    over timestamptz := clock_timestamp() + '%f s';
BEGIN
    LOOP
        PERFORM pg_stat_clear_snapshot();
        PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND state = 'idle' AND pid <> pg_backend_pid();
        EXIT WHEN clock_timestamp() > over OR NOT EXISTS (
            SELECT FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
        );
        PERFORM pg_sleep(0.02);
    END LOOP;
END $$;
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid();
"""


# Optuna's heartbeats are in the session's time zone, which is UTC with the client package. This also renews the
# heartbeats of killed workers, which are found dead one grace period later.
HEARTBEATS = """
SET client_min_messages = warning;
SET TIME ZONE 'UTC';
DO $$ BEGIN
    IF to_regclass('trial_heartbeats') IS NOT NULL THEN
        UPDATE trial_heartbeats SET heartbeat = localtimestamp
        WHERE heartbeat < localtimestamp
        AND trial_id IN (SELECT trial_id FROM trials WHERE state = 'RUNNING');
    END IF;
END $$;
"""


class Failed(Exception):
    """postgres cannot run; the message gives the reason in one line."""


class Postgres:
    """One postgres process on the data directory ``data``. Socket and child live as long as this object.

    Meanwhile ``keeper`` renews the lease, and kills postgres if the lease is lost.
    """

    def __init__(self, settings: dict, listen: bool, keeper: Keeper, parameters: Dict[str, str]) -> None:
        self._settings = settings
        self._keeper = keeper
        self._parameters = dict(parameters)
        self._child = None  # type: Optional[subprocess.Popen[bytes]]
        self.socket = socket_folder(settings["socket_parent"], settings["instance"])
        wanted = int(settings["port"])
        self.port = free_port(wanted) if listen else wanted
        if not listen:
            self._parameters["listen_addresses"] = ""

    def start(self) -> None:
        """Start postgres without waiting until it is ready; see ``wait_for_write``."""
        self._check_programs()
        self._keeper.renew()
        end_orphans(self._settings["data"])
        self._keeper.renew()
        self._disarm_pid_file()
        parameters = dict(self._parameters, port=str(self.port), unix_socket_directories=self.socket)
        command = [self._program("postgres"), "-c", "config_file=%s" % self._settings["config"]]
        for name, value in sorted(parameters.items()):
            command += ["-c", "%s=%s" % (name, value)]
        self._keeper.renew()  # nothing slow may come between this and the start
        # A signal between fork and assignment would end the supervisor and leave an orphaned postgres.
        with signals_waiting():
            self._child = subprocess.Popen(
                command, cwd="/", env=program_environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr,
                preexec_fn=_die_with_parent,
            )
        self._keeper.check()

    def _check_programs(self) -> None:
        """Raise Failed while the programs are installed or updated; the playbook waits for our lease to end."""
        prefix = os.path.dirname(self._settings["bindir"])
        if os.path.exists(prefix + ".unfinished"):
            raise Failed(
                "PostgreSQL in %s is being installed or updated, or this was interrupted: run the playbook hpc_db.yml "
                "again" % prefix
            )

    def wait_for_write(self, patience: float, alive: Optional[Callable[[], None]] = None) -> None:
        """Wait until a write succeeds, since crash recovery may take a while; call ``alive`` meanwhile.

        Raise Failed if postgres ends, or after ``patience`` seconds.
        """
        limit = time.monotonic() + patience
        while True:
            if self.returncode() is not None:
                raise Failed("postgres ended with exit code %s while starting: %s" % (
                    self.returncode(), self.last_words()))
            refused = self.probe()
            if not refused:
                return
            if time.monotonic() > limit:
                raise Failed("postgres has accepted no write within %d s: %s" % (patience, refused))
            self._keeper.check()
            if alive:
                alive()
            time.sleep(0.1)

    def last_words(self) -> str:
        """Return the last fatal message in PostgreSQL's logs."""
        folder = Layout(self._settings["root"]).log
        return causes.last_words(folder) or "see %s" % folder

    def probe(self) -> str:
        """Make one durable write and count the connections; return the problem in one line, "" if there is none."""
        try:
            printed = self.query(PROBE, 15)
        except Failed as failed:
            return str(failed)
        counted = re.search(r"(\d+)\|(\d+)\s*$", printed)
        if not counted:
            return "psql printed %r" % printed.strip()
        # Do not count this connection: it is a superuser's, which uses a reserved one.
        used, allowed = int(counted.group(1)) - 1, int(counted.group(2))
        return "connections exhausted: %d of %d are used" % (used, allowed) if used >= allowed else ""

    def renew_heartbeats(self, databases: List[str]) -> None:
        """Renew the heartbeats of running trials: waiting workers could send none.

        Call this before clients can connect. Raise Failed for the first database in which it fails.
        """
        for database in databases:
            self.query(HEARTBEATS, 60, database)

    def query(self, statement: str, patience: float, database: str = "postgres") -> str:
        """Run SQL as the owner over the socket and return its output; raise Failed with psql's last line."""
        options = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", self.socket, "-p", str(self.port), "-d", database]
        try:
            psql = subprocess.run(
                [self._program("psql")] + options, env=client_environment(), input=statement,
                universal_newlines=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=patience, check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failed("no answer within %d s" % patience) from None
        except OSError as error:
            raise Failed("psql does not run: %s" % error) from None
        if psql.returncode:
            raise Failed((psql.stderr.strip().splitlines() or ["psql ended with %d" % psql.returncode])[-1].strip())
        return psql.stdout

    def returncode(self) -> Optional[int]:
        """Return the exit code of postgres; None while it runs."""
        return self._child.poll() if self._child else None

    def drain(self, seconds: float) -> int:
        """Refuse new connections, end idle sessions, and wait for running transactions.

        Return the number of transactions that have not finished in time. Only ``stop`` may follow.
        """
        if not self._child or self.returncode() is not None:
            return 0
        return int(self.query(DRAIN % (self._child.pid, seconds), seconds + 5))

    def stop(self, patience: float) -> bool:
        """Request a fast shutdown (SIGINT): clients are disconnected; all acknowledged writes are on disk.

        Return whether the shutdown was clean. Afterwards no process uses the data directory; if the file system
        hangs, this call takes as long.
        """
        clean = self._child is None or not self._keeper.lost and _end(self._child, patience)
        if self._child is not None:
            self._child.wait()  # if the lease is lost, the keeper kills it
            if not self._keeper.lost:
                end_orphans(self._settings["data"])
        shutil.rmtree(self.socket, ignore_errors=True)
        return clean

    def _disarm_pid_file(self) -> None:
        """Write our own PID into a stale postmaster.pid. We hold the lease, so no other host runs postgres here.

        PostgreSQL checks only whether the PID exists, and it may belong to an unrelated process by now. It never
        takes its own parent for another server. The rest of the file stays, since it identifies the shared memory of
        backends that still run.
        """
        path = os.path.join(self._settings["data"], "postmaster.pid")
        try:
            with open(path) as stream:
                pid, rest = int(stream.readline()), stream.read()
        except FileNotFoundError:
            return
        except ValueError:  # truncated by a crash; PostgreSQL would never start with it
            files.remove(path)
            return
        if pid != os.getpid():
            files.write_atomically(path, "%d\n%s" % (os.getpid(), rest))

    def _program(self, name: str) -> str:
        return os.path.join(self._settings["bindir"], name)


def check_programs(settings: dict) -> None:
    """Raise Failed unless PostgreSQL's programs run on this node and have the data directory's major version."""
    with open(os.path.join(settings["data"], "PG_VERSION")) as stream:
        wanted = stream.read().strip()
    for program in PROGRAMS:
        command = [os.path.join(settings["bindir"], program), "--version"]
        try:
            done = subprocess.run(
                command, env=program_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=60, check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed("%s does not run on %s: %s" % (program, socket.gethostname(), error)) from None
        said = " ".join(done.stdout.decode("utf-8", "replace").split())
        if done.returncode:
            words = said or "exit code %d" % done.returncode
            raise Failed("%s does not run on %s: %s" % (program, socket.gethostname(), words))
        major = re.search(r"\(PostgreSQL\) (\d+)", said)
        if not major or major.group(1) != wanted:
            raise Failed("%s on %s is %s, but %s was made by PostgreSQL %s" % (
                command[0], socket.gethostname(), said, settings["data"], wanted))


def end_orphans(data: str) -> None:
    """Kill all PostgreSQL processes on ``data`` on this host. We hold the lease, so they are orphans.

    Returns when all have ended. A process that hangs in a write cannot be killed, so this waits for it.
    """
    told = time.monotonic() + 10
    while True:
        orphans = processes.all_in("postgres", data)
        if not orphans:
            return
        for pid in orphans:
            processes.kill(pid, signal.SIGKILL)
        if time.monotonic() > told:
            told = float("inf")
            words = (", ".join(map(str, orphans)), data)
            files.log("postgres (PID %s) on %s was killed but has not ended: the file system may hang" % words)
        time.sleep(0.05)


def _end(child: "subprocess.Popen[bytes]", patience: float) -> bool:
    for end_with, wait in ((signal.SIGINT, patience), (signal.SIGQUIT, 5.0)):
        if child.poll() is None:
            child.send_signal(end_with)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(wait) == 0 and end_with == signal.SIGINT
    child.kill()
    child.wait()
    return False


def socket_folder(parent: str, instance: str) -> str:
    """Return a new private folder for the socket; remove the folders of this instance's servers that were killed."""
    prefix = "hpc_db-%s-" % instance
    longest = LONGEST_SOCKET_FOLDER - len("/%s12345678" % prefix)
    if len(os.fsencode(parent)) > longest:
        raise Failed("server_socket_parent: %s is too long; a socket's path leaves %d bytes for it" % (parent, longest))
    try:
        names = os.listdir(parent)
    except OSError as error:
        raise Failed("server_socket_parent: %s: %s" % (parent, error.strerror)) from None
    for name in names:
        folder = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            if name.startswith(prefix) and os.lstat(folder).st_uid == os.geteuid() and not _is_listening(folder):
                shutil.rmtree(folder)
    return tempfile.mkdtemp(prefix=prefix, dir=parent)


def _is_listening(folder: str) -> bool:
    """Return whether a server listens in ``folder``, or may be about to."""
    names = [name for name in os.listdir(folder) if not name.endswith(".lock")]
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(os.path.join(folder, name))
            return True
    return not names and time.time() - os.stat(folder).st_mtime < 60


def free_port(wanted: int) -> int:
    """Return ``wanted`` if it is free on this host, else any free port."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return probe.getsockname()[1]
            except OSError:
                continue
    raise Failed("no free TCP port on %s" % socket.gethostname())


def program_environment() -> Dict[str, str]:
    """Return our environment without variables that are meant for workers or for another installation's programs.

    The locale is C, since the programs' messages are parsed.
    """
    foreign = [name for name in os.environ if name.startswith("PG") or name == "LD_LIBRARY_PATH"]
    return dict({name: value for name, value in os.environ.items() if name not in foreign}, LC_ALL="C")


def client_environment() -> Dict[str, str]:
    """Return the environment of clients on the socket: only the owner's server is accepted, and with a timeout."""
    owner = pwd.getpwuid(os.geteuid()).pw_name
    return dict(program_environment(), PGCONNECT_TIMEOUT="10", PGAPPNAME="hpc_db", PGREQUIREPEER=owner)


def _die_with_parent() -> None:
    """In the child: end immediately, without a slow checkpoint, when the supervisor is killed.

    The lease is not renewed any more then. All acknowledged writes are in the WAL.
    """
    os.umask(0o077)
    end_with_parent(signal.SIGQUIT)


def end_with_parent(number: int) -> None:
    """In a child: request this signal from the kernel for when the supervisor ends."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    except (OSError, AttributeError):
        pass  # not Linux
