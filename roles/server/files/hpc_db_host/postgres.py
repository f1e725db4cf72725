# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""postgres as a child in the foreground: start, probe, stop."""

import contextlib
import ctypes
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Callable, Dict, Optional

from . import files, processes

PR_SET_PDEATHSIG = 1
# What asks the hosting program to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# sockaddr_un holds 108 bytes with the final NUL; PostgreSQL adds "/.s.PGSQL.65535".
LONGEST_SOCKET_FOLDER = 107 - len("/.s.PGSQL.65535")

# What runs in the job, on a node that may differ from the one where it was installed.
PROGRAMS = ("postgres", "psql", "pg_dump", "pg_restore")

# A write that goes to the WAL and is flushed like any commit, and needs no table of ours.
PROBE = """
SELECT pg_logical_emit_message(true, 'hpc_db', 'probe');
SELECT count(*), current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
FROM pg_stat_activity WHERE backend_type = 'client backend';
"""

# psql is connected when it sends the postmaster SIGTERM, PostgreSQL's smart shutdown: nobody else is let in, those who
# are in may go on. All of that ends with the server, however that ends.
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


class Failed(Exception):
    """postgres cannot run; the message says why, in one line."""


class Postgres:
    """One postgres process on the data directory ``data``. Socket and child live as long as this object.

    ``alive`` is called while it starts, which takes as long as crash recovery does.
    """

    def __init__(
        self, settings: dict, listen: bool, alive: Callable[[], None], parameters: Dict[str, str]
    ) -> None:
        self._settings = settings
        self._alive = alive
        self._parameters = dict(parameters)
        self._child = None  # type: Optional[subprocess.Popen[bytes]]
        self.socket = socket_folder(settings["socket_parent"], settings["instance"])
        wanted = int(settings["port"])
        self.port = free_port(wanted) if listen else wanted
        if not listen:
            self._parameters["listen_addresses"] = ""

    def start(self) -> None:
        """Start postgres; ``wait_for_write`` tells whether it came up."""
        self._check_programs()
        self._disarm_pid_file()
        parameters = dict(self._parameters, port=str(self.port), unix_socket_directories=self.socket)
        command = [self._program("postgres"), "-c", "config_file=%s" % self._settings["config"]]
        for name, value in sorted(parameters.items()):
            command += ["-c", "%s=%s" % (name, value)]
        # A signal that ended us between fork and assignment would leave a postgres that nobody knows of.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._child = subprocess.Popen(
                command, cwd="/", env=program_environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr,
                preexec_fn=_die_with_parent,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _check_programs(self) -> None:
        """Raise Failed while the programs are installed or updated, which waits for the end of our lease in turn."""
        prefix = os.path.dirname(self._settings["bindir"])
        if os.path.exists(prefix + ".unfinished"):
            raise Failed(
                "PostgreSQL in %s is being installed or updated, or that was interrupted: run the playbook hpc_db.yml "
                "once more" % prefix
            )

    def wait_for_write(self, patience: float) -> None:
        """Wait until a write succeeds: crash recovery may take a while; raise Failed if postgres ends."""
        limit = time.monotonic() + patience
        while True:
            if self.returncode() is not None:
                raise Failed("postgres ended with exit code %s while starting: %s" % (
                    self.returncode(), self.last_words()))
            refused = self.probe()
            if not refused:
                return
            if time.monotonic() > limit:
                raise Failed("postgres accepts no write after %d s: %s" % (patience, refused))
            self._alive()
            time.sleep(0.1)

    def last_words(self) -> str:
        """Return the last line in which PostgreSQL's log says what is fatal."""
        logs = glob.glob(os.path.join(glob.escape(self._settings["root"]), "log", "*.log"))
        for path in sorted(logs, key=os.path.getmtime, reverse=True):
            with open(path, "rb") as stream:
                stream.seek(max(0, os.path.getsize(path) - 65536))
                lines = stream.read().decode("utf-8", "replace").splitlines()
            fatal = [line for line in lines if re.search("(FATAL|PANIC): +(?!the database system is)", line)]
            if fatal:
                return re.split("(?=FATAL:|PANIC:)", fatal[-1], maxsplit=1)[-1].strip()
        return "see %s" % os.path.join(self._settings["root"], "log")

    def probe(self) -> str:
        """Make one durable write and count the connections; return "" if all is well, else why not, in one line."""
        try:
            printed = self.query(PROBE, 15)
        except Failed as failed:
            return str(failed)
        counted = re.search(r"(\d+)\|(\d+)\s*$", printed)
        if not counted:
            return "psql printed %r" % printed.strip()
        # The connection that asks is a superuser's, for whom some are reserved.
        used, allowed = int(counted.group(1)) - 1, int(counted.group(2))
        return "connections exhausted: %d of %d are used" % (used, allowed) if used >= allowed else ""

    def query(self, statement: str, patience: float) -> str:
        """Run SQL as the owner, over the socket; return what it prints, raise Failed with psql's last line."""
        options = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", self.socket, "-p", str(self.port), "-d", "postgres"]
        environment = dict(program_environment(), PGCONNECT_TIMEOUT="10", PGAPPNAME="hpc_db")
        try:
            psql = subprocess.run(
                [self._program("psql")] + options, env=environment, input=statement, universal_newlines=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=patience, check=False,
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

    def abort(self) -> None:
        """End without a checkpoint: the data directory is another's now, and every write would harm it."""
        if self._child and self._child.poll() is None:
            self._child.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(10)

    def drain(self, seconds: float) -> int:
        """Let nobody in, end idle sessions, await running transactions; return how many of them take longer.

        Only ``stop`` may follow.
        """
        if not self._child or self.returncode() is not None:
            return 0
        return int(self.query(DRAIN % (self._child.pid, seconds), seconds + 5))

    def stop(self, patience: float) -> bool:
        """Stop fast (SIGINT): clients are disconnected, everything acknowledged is on disk. True if clean."""
        clean = self._child is None or _end(self._child, patience)
        shutil.rmtree(self.socket, ignore_errors=True)
        return clean

    def _disarm_pid_file(self) -> None:
        """Let a stale postmaster.pid name us: the lease is ours, so no other host runs postgres here.

        PostgreSQL believes the PID alone, which may be an innocent process of today, but never takes its own
        parent for another server. The rest stays: it leads to the shared memory of backends that live on.
        """
        data = self._settings["data"]
        path = os.path.join(data, "postmaster.pid")
        try:
            with open(path) as stream:
                pid, rest = int(stream.readline()), stream.read()
        except FileNotFoundError:
            return
        except ValueError:  # cut short by a crash; PostgreSQL would refuse it for ever
            files.remove(path)
            return
        end_orphan(pid, data, self._alive)  # on its way out, maybe
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # else the orphan has removed it
            files.write_atomically(path, "%d\n%s" % (os.getpid(), rest))

    def _program(self, name: str) -> str:
        return os.path.join(self._settings["bindir"], name)


def check_programs(settings: dict) -> None:
    """Raise Failed unless each of PostgreSQL's programs runs on this node, in the data directory's major version."""
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


def end_orphan(pid: int, data: str, alive: Callable[[], None]) -> None:
    """End the postgres that whoever had the lease before has left on ``data``, if ``pid`` is one."""
    limit = time.monotonic() + 60
    while processes.runs_in(pid, "postgres", data):
        if time.monotonic() > limit:
            raise Failed("postgres (PID %d) already runs on %s on this host" % (pid, data))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        alive()
        time.sleep(0.5)


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
    """Return a new private folder for the socket; those of servers of ours that were killed are removed."""
    prefix = "hpc_db-%s-" % instance
    longest = LONGEST_SOCKET_FOLDER - len("/%s12345678" % prefix)
    if len(os.fsencode(parent)) > longest:
        raise Failed("server_socket_parent: %s is too long; a socket's path leaves %d bytes for it" % (parent, longest))
    for name in os.listdir(parent):
        folder = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            if name.startswith(prefix) and os.lstat(folder).st_uid == os.geteuid() and not _is_listening(folder):
                shutil.rmtree(folder)
    return tempfile.mkdtemp(prefix=prefix, dir=parent)


def _is_listening(folder: str) -> bool:
    """Tell whether a server still listens in ``folder``, or may be about to."""
    names = [name for name in os.listdir(folder) if not name.endswith(".lock")]
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(os.path.join(folder, name))
            return True
    return not names and time.time() - os.stat(folder).st_mtime < 60


def free_port(wanted: int) -> int:
    """Return ``wanted`` if nobody has it on this host, else any free port."""
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
    """Return our environment without what is meant for workers, or for programs of another installation."""
    foreign = [name for name in os.environ if name.startswith("PG") or name == "LD_LIBRARY_PATH"]
    return {name: value for name, value in os.environ.items() if name not in foreign}


def _die_with_parent() -> None:
    """In the child: end fast and cleanly when the hosting program is killed."""
    os.umask(0o077)
    end_with_parent(signal.SIGINT)


def end_with_parent(number: int) -> None:
    """In a child: have the kernel send us this signal when the hosting program ends."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    except (OSError, AttributeError):
        pass  # not Linux
