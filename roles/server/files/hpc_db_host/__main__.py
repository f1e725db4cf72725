# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hosting program: it owns the lease, runs postgres, and says where it is.

    python3 -m hpc_db_host serve --root ROOT       in the hosting job
    python3 -m hpc_db_host bootstrap --root ROOT   a short-lived server on a socket, without a job
"""

import argparse
import os
import signal
import socket
import sys
import time
from typing import Optional

from . import endpoint, files, scheduler
from .lease import DEFAULT_TTL, Held, Lease, Lost
from .postgres import STOP_SIGNALS, Failed, Postgres

# A short-lived server runs on a login node: it must not take a compute node's memory there.
BOOTSTRAP_PARAMETERS = {"shared_buffers": "32MB", "max_connections": "20", "max_wal_size": "256MB"}


class Stop(Exception):
    """The program was told to stop; the message says by what."""


class Host:
    """The hosting program on one instance directory."""

    def __init__(self, root: str, bootstrap: bool) -> None:
        self.settings = dict(files.read_json(os.path.join(root, "host", "settings.json")) or {}, root=root)
        if "bindir" not in self.settings:
            raise Failed("%s/host/settings.json is missing; run the playbook hpc_db.yml first" % root)
        self.run = os.path.join(root, "run")
        self.bootstrap = bootstrap
        self.job = "" if bootstrap else job_id()
        self.hostname = self.settings.get("advertise") or socket.gethostname()
        self._told = ""
        self._lease = None  # type: Optional[Lease]

    def serve(self, patience: float, lifetime: Optional[float]) -> None:
        """Serve until told to stop, or for ``lifetime`` seconds; raise what ended it."""
        holder = {
            "host": socket.gethostname(), "pid": os.getpid(), "job": self.job, "kind": self._kind(),
            "cluster": self.settings["cluster"],
        }
        ttl = float(self.settings.get("lease_ttl", DEFAULT_TTL))
        lease = Lease(self.run, holder, self._has_ended, ttl)
        self.tell("starting", "asking for the lease")
        lease.acquire(patience, lambda held: self.tell("starting", "waiting: %s" % held))
        self._lease = lease
        postgres = None
        try:
            self.tell("starting", "postgres is starting")
            parameters = BOOTSTRAP_PARAMETERS if self.bootstrap else {}
            postgres = Postgres(self.settings, not self.bootstrap, lease.renew_if_due, parameters)
            postgres.start()
            self._withdraw()  # whatever a holder that died left behind
            postgres.wait_for_write(self.settings.get("start_patience", 300))
            self._publish(postgres)
            self.tell("serving", "since the first accepted write")
            self._watch(postgres, lease, lifetime)
        except Lost:
            if postgres:
                postgres.abort()
            raise
        finally:
            ignore_signals()
            self._leave(postgres, lease)

    def _leave(self, postgres: Optional[Postgres], lease: Lease) -> None:
        """Send the clients away, then stop, even if the endpoint cannot be taken back."""
        try:
            self.tell("stopping", "postgres is stopping")
            if lease.is_ours():  # else the endpoint is the next holder's
                self._withdraw()
        finally:
            if postgres is None or postgres.stop(self.settings.get("stop_patience", 60)):
                lease.release()

    def tell(self, state: str, reason: str) -> None:
        """Log the state and, if the lease is ours, leave it for others. A short-lived server leaves none."""
        if (state + reason) == self._told:
            return
        self._told = state + reason
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        print("%s %s: %s" % (now, state, reason), file=sys.stderr, flush=True)
        if self._lease and self._lease.is_ours() and not self.bootstrap:
            content = {"state": state, "reason": reason, "job": self.job, "host": self.hostname}
            files.write_json(os.path.join(self.run, "state.json"), dict(content, since=time.time()))

    def _watch(self, postgres: Postgres, lease: Lease, lifetime: Optional[float]) -> None:
        ends = None if lifetime is None else time.monotonic() + lifetime
        while True:
            time.sleep(0.5)  # ended early by a signal, which raises Stop
            returncode = postgres.returncode()
            if returncode is not None:
                raise Failed("postgres ended by itself with exit code %d" % returncode)
            if ends is not None and time.monotonic() > ends:
                raise Stop("its lifetime is over")
            lease.renew_if_due()

    def _publish(self, postgres: Postgres) -> None:
        where = {
            "instance": self.settings["instance"], "cluster": self.settings["cluster"], "host": self.hostname,
            "port": postgres.port, "socket": postgres.socket, "job": self.job, "since": time.time(),
        }
        if self.bootstrap:
            where.update(host=socket.gethostname(), pid=os.getpid())
            files.write_json(os.path.join(self.run, "bootstrap.json"), where)
        else:
            endpoint.publish(self.run, self._service_file(), where, self.settings["service"])

    def _withdraw(self) -> None:
        if self.bootstrap:
            files.remove(os.path.join(self.run, "bootstrap.json"))
        endpoint.withdraw(self.run, self._service_file(), self.settings["instance"])

    def _service_file(self) -> str:
        return os.path.expanduser(self.settings.get("service_file") or "~/.pg_service.conf")

    def _kind(self) -> str:
        return "bootstrap" if self.bootstrap else self.settings["scheduler"]

    def _has_ended(self, holder: dict) -> bool:
        """Tell whether the scheduler says that a holder in another place, or before a reboot, has ended."""
        kind, job = holder.get("kind", ""), holder.get("job", "")
        if kind == "bootstrap":
            return True  # it had no job to ask about
        if holder.get("cluster") != self.settings["cluster"]:
            return False  # another scheduler's
        if kind == "local":
            return holder.get("host") == socket.gethostname()
        # Our own job, which was queued again: then its first run has ended.
        return job == self.job or scheduler.job_has_ended(kind, self.settings.get("bin_dir", ""), job)


def job_id() -> str:
    """Return the id of the job that we run in; with no scheduler the PID is one."""
    return os.environ.get("SLURM_JOB_ID") or str(os.getpid())


def on_signal(number: int, _frame: object) -> None:
    """Turn a signal into the way out; a second one changes nothing."""
    ignore_signals()
    raise Stop("told to by %s" % signal.Signals(number).name)


def ignore_signals() -> None:
    """On the way out already."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def detach(log: str) -> None:
    """Go on in a session of our own, which outlives the connection that started us; the parent prints our PID."""
    child = os.fork()
    if child:
        print(child, flush=True)
        os._exit(0)
    os.setsid()
    for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY), (2, log, os.O_WRONLY)):
        opened = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, stream)
        os.close(opened)


def main() -> int:
    """Run the program; the exit code is 0 after a clean stop that somebody asked for."""
    parser = argparse.ArgumentParser(prog="hpc_db_host", description=__doc__)
    parser.add_argument("what", choices=("serve", "bootstrap"))
    parser.add_argument("--root", required=True, help="the instance directory")
    parser.add_argument("--lifetime", type=float, help="seconds after which it ends by itself")
    parser.add_argument("--lease-patience", type=float, default=0.0, help="seconds to wait for the lease")
    parser.add_argument("--detach", metavar="LOG", help="go on in the background, print the PID, and write to LOG")
    arguments = parser.parse_args()
    os.umask(0o077)
    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
    try:
        host = Host(arguments.root, arguments.what == "bootstrap")
    except Failed as failed:
        parser.exit(1, "%s\n" % failed)
    if arguments.detach:
        detach(arguments.detach)
    try:
        host.serve(arguments.lease_patience, arguments.lifetime)
    except Stop as stop:
        host.tell("ended", str(stop))
        return 0
    except Held as held:
        host.tell("failed", str(held))
        return 3
    except (Failed, Lost, OSError) as failed:
        host.tell("failed", str(failed))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
