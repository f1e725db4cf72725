# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sidecars PgBouncer and Optuna's storage proxy, for more workers than postgres has connections.

They are child processes like postgres. A sidecar that ends is restarted a few times. If it cannot run, workers can
still connect directly.
"""

import contextlib
import os
import pwd
import re
import resource
import signal
import socket
import subprocess
import time
from typing import Dict, List, Optional  # noqa: F401 - in type comments

from . import files
from .layout import Layout
from .postgres import Failed, Postgres, end_with_parent, free_port, program_environment

# Crashes of a sidecar that are further apart than this are unrelated.
DEATHS_COUNT_SECONDS = 600.0
LONGEST_PAUSE = 4.0
# A program that imports many Python modules from a parallel file system starts slowly.
START_SECONDS = 120.0
# PgBouncer needs only a few hundred bytes per client; file descriptors are the limit.
MOST_CLIENTS = 20000
SPARE_DESCRIPTORS = 100
# A rotation changes the password on the server slightly earlier than in the file that workers read.
ROTATION_SECONDS = 15.0
# Since this version, PgBouncer supports prepared statements (used by psycopg 3) across server connections.
FOLLOWS_PREPARED = (1, 21)


class Engine:
    """One sidecar. ``port`` is None while it does not answer; ``reason`` then says why."""

    name = ""

    def __init__(self, settings: dict, postgres: Postgres, address: str) -> None:
        self.settings = settings[self.name]
        self.port = None  # type: Optional[int]
        self.reason = ""
        self._root = settings["root"]
        self._service = settings["service"]
        self._limit = settings["restarts"]
        self._postgres = postgres
        self._address = address
        self._listen = int(self.settings["port"])
        self._child = None  # type: Optional[subprocess.Popen[bytes]]
        self._deaths = []  # type: List[float]
        self._due = 0.0  # when to start it; infinity for never
        self._late = 0.0
        self._log = os.path.join(Layout(self._root).log, "%s.log" % self.name)
        with contextlib.suppress(OSError):
            files.remove(self._log)

    def poll(self) -> None:
        """Start or restart the program, check whether it answers, or refresh it; whichever is due."""
        try:
            if self._child is None:
                if time.monotonic() >= self._due:
                    self._start()
            elif self._child.poll() is not None:
                raise Failed("ended with exit code %d: %s" % (self._child.returncode, self._last_words()))
            elif self.port is None:
                self._wait()
            else:
                self.refresh()
        except (Failed, OSError) as died:
            self._died(str(died))

    def stop(self) -> None:
        """Kill the program; it holds no data that could be lost."""
        self.port = None
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # if the file system hangs
                self._child.wait(5)
            self._child = None

    def command(self) -> List[str]:
        """Write the program's configuration and return its command line."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Pass changes on to the running program."""

    def _start(self) -> None:
        self._listen = free_port(self._listen)
        command = self.command()
        with open(self._log, "ab") as log:
            self._child = subprocess.Popen(
                command, cwd=Layout(self._root).host, env=program_environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_be_an_engine,
            )
        self._late = time.monotonic() + START_SECONDS

    def _wait(self) -> None:
        with contextlib.suppress(OSError), contextlib.closing(
            socket.create_connection((self._address, self._listen), timeout=1)
        ):
            self.port, self.reason = self._listen, ""
            return
        if time.monotonic() > self._late:
            raise Failed("does not answer on %s:%d" % (self._address, self._listen))

    def _died(self, why: str) -> None:
        self.stop()
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < DEATHS_COUNT_SECONDS] + [now]
        again = len(self._deaths) <= self._limit
        self._due = now + min(2.0 ** (len(self._deaths) - 1), LONGEST_PAUSE) if again else float("inf")
        self.reason = "%s %s%s" % (self.name, why, "" if again else "; not restarted, direct connections still work")

    def _last_words(self) -> str:
        """Return the last line of the program's log."""
        with open(self._log, "rb") as stream:
            stream.seek(max(0, os.path.getsize(self._log) - 4096))
            lines = stream.read().decode("utf-8", "replace").split("\n")
        return ([line.strip() for line in lines if line.strip()] or ["see %s" % self._log])[-1]


class Pooler(Engine):
    """PgBouncer in transaction mode: any number of clients share few connections.

    PgBouncer knows only the study role's SCRAM verifier. It authenticates a client with that, learns the client's key
    from the proof, and uses it to log in to postgres. It cannot log in by itself, and it cannot admit the owner.
    """

    name = "pooler"

    def __init__(self, settings: dict, postgres: Postgres, address: str) -> None:
        Engine.__init__(self, settings, postgres, address)
        self._databases = settings["databases"]
        self._folder = postgres.socket  # private, on the node's local disk, removed with the socket
        self._verifier = ""
        self._seen = None  # type: Optional[float]
        self._settle = self._next_look = 0.0

    def command(self) -> List[str]:
        """Write PgBouncer's configuration files; see Engine."""
        self._seen = self._changed()
        self._verifier = self._ask_verifier()
        self._write("users", '"%s" "%s"\n' % (self._service["user"], self._verifier))
        self._write("hba", pooler_rules(self._service["user"], self._databases, self.settings))
        program = os.path.expanduser(self.settings["program"])
        parameters = self._parameters(version_of(program))
        lines = ["[databases]"]
        lines += ["%s = host=%s port=%d" % (name, self._postgres.socket, self._postgres.port)
                  for name in self._databases]
        lines += ["[pgbouncer]"] + ["%s = %s" % item for item in sorted(parameters.items())]
        return [program, self._write("ini", "\n".join(lines) + "\n")]

    def refresh(self) -> None:
        """Reload PgBouncer after a change of the password."""
        now = time.monotonic()
        changed = self._changed()
        if changed != self._seen:
            self._seen, self._settle = changed, now + ROTATION_SECONDS
        if now > self._settle or now < self._next_look:
            return
        self._next_look = now + 1.0
        verifier = self._ask_verifier()
        if verifier != self._verifier and self._child is not None:
            self._verifier = verifier
            self._write("users", '"%s" "%s"\n' % (self._service["user"], verifier))
            self._child.send_signal(signal.SIGHUP)

    def _parameters(self, version: "tuple") -> Dict[str, object]:
        parameters = {
            "listen_addr": self.settings["listen"], "listen_port": self._listen, "unix_socket_dir": "",
            "pool_mode": "transaction", "default_pool_size": self.settings["connections"],
            "max_client_conn": most_clients(int(self.settings["connections"])),
            "auth_type": "hba", "auth_hba_file": self._path("hba"), "auth_file": self._path("users"),
            "client_tls_sslmode": "disable", "server_tls_sslmode": "disable",
            # libpq may send this; the server sets it anyway.
            "ignore_startup_parameters": "extra_float_digits",
            # Many workers log in at the same time and have to wait; the clients give up after 30 s.
            "listen_backlog": 4096, "client_login_timeout": 30, "query_wait_timeout": 120,
            # Reconnect soon after a restart of postgres or a change of the password.
            "server_login_retry": 1, "server_idle_timeout": 60,
            "log_connections": 0, "log_disconnections": 0, "log_stats": 0,
        }  # type: Dict[str, object]
        if self.settings.get("certificate"):
            parameters.update({
                "client_tls_sslmode": "require", "client_tls_cert_file": self.settings["certificate"],
                "client_tls_key_file": self.settings["key"],
            })
        if version >= FOLLOWS_PREPARED:
            parameters["max_prepared_statements"] = 200
        return parameters

    def _ask_verifier(self) -> str:
        role = self._service["user"].replace("'", "''")
        found = self._postgres.query("SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = '%s'" % role, 15)
        if not found.startswith("SCRAM-SHA-256$"):
            raise Failed("cannot serve the role %s, which has no SCRAM password" % self._service["user"])
        return found.strip()

    def _changed(self) -> Optional[float]:
        try:
            return os.stat(self._service["passfile"]).st_mtime
        except OSError:
            return None

    def _path(self, kind: str) -> str:
        return os.path.join(self._folder, "pgbouncer." + kind)

    def _write(self, kind: str, text: str) -> str:
        files.write_atomically(self._path(kind), text)
        return self._path(kind)


class Proxy(Engine):
    """Optuna's storage proxy, for clients with the instance's certificate."""

    name = "proxy"

    def command(self) -> List[str]:
        """Return the command line, which contains no secrets."""
        owner = pwd.getpwuid(os.geteuid()).pw_name  # required of the server; others may reuse our folder's name later
        url = "postgresql+psycopg2://%s@/%s?host=%s&port=%d&requirepeer=%s&passfile=%s&application_name=%s" % (
            self._service["user"], self._service["dbname"], quoted(self._postgres.socket), self._postgres.port,
            quoted(owner), quoted(self._service["passfile"]), "hpc_db-proxy")
        return [
            self.settings["python"], "-m", "storage_proxy", "--storage", url,
            "--listen", self.settings["listen"], "--port", str(self._listen),
            "--connections", str(self.settings["connections"]),
            "--certificate", self.settings["certificate"], "--key", self.settings["key"],
        ]


def engines_of(settings: dict, postgres: Postgres, address: str) -> List[Engine]:
    """Return the sidecars that the settings enable."""
    return [kind(settings, postgres, address) for kind in (Pooler, Proxy) if settings[kind.name]]


def pooler_rules(role: str, databases: List[str], settings: dict) -> str:
    """Return PgBouncer's rules (auth_hba_file): the study role, from the networks allowed for postgres itself."""
    kind = "hostssl" if settings.get("certificate") else "host"
    networks = [each for network in settings["networks"]
                for each in (("0.0.0.0/0", "::/0") if network == "all" else (network,))]
    return "".join(
        '%s "%s" "%s" %s scram-sha-256\n' % (kind, database, role, network)
        for database in databases for network in networks
    )


def version_of(program: str) -> "tuple":
    """Return PgBouncer's version as major and minor number."""
    try:
        said = subprocess.check_output(
            [program, "--version"], env=program_environment(), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            universal_newlines=True, timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Failed("does not run on %s: %s" % (socket.gethostname(), error)) from None
    found = re.search(r"(?i)pgbouncer (\d+)\.(\d+)", said)
    if not found:
        raise Failed("is not PgBouncer: %s printed %r" % (program, said[:80]))
    return int(found.group(1)), int(found.group(2))


def most_clients(connections: int) -> int:
    """Return the number of clients that the limit of file descriptors allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = MOST_CLIENTS if hard == resource.RLIM_INFINITY else hard - connections - SPARE_DESCRIPTORS
    return max(100, min(MOST_CLIENTS, limit))


def quoted(value: str) -> str:
    """Return a value encoded for a URL's query, without braces, since Optuna formats the URL."""
    return re.sub(r"[^\w/.~-]", lambda found: "".join("%%%02X" % byte for byte in os.fsencode(found.group())), value)


def _be_an_engine() -> None:
    """In the child: raise the limit of file descriptors as far as possible, and end with the supervisor."""
    os.umask(0o077)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    end_with_parent(signal.SIGKILL)
