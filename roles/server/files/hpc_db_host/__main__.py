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
from .postgres import Failed, Postgres

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
        self._owner = False

    def serve(self, patience: float, lifetime: Optional[float]) -> None:
        """Serve until told to stop, or for ``lifetime`` seconds; raise what ended it."""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": self.job, "kind": self._kind()}
        ttl = float(self.settings.get("lease_ttl", DEFAULT_TTL))
        lease = Lease(self.run, holder, self._has_ended, ttl)
        self.tell("starting", "asking for the lease")
        lease.acquire(patience, lambda held: self.tell("starting", "waiting: %s" % held))
        self._owner = True
        self.tell("starting", "postgres is starting")
        clean = False
        postgres = None
        try:
            postgres = Postgres(
                self.settings, listen=not self.bootstrap, parameters=BOOTSTRAP_PARAMETERS if self.bootstrap else {}
            )
            postgres.start()
            self._withdraw()  # whatever a holder that died left behind
            postgres.wait_for_write(self.settings.get("start_patience", 300))
            self._publish(postgres)
            self.tell("serving", "since the first accepted write")
            self._watch(postgres, lease, lifetime)
        finally:
            self._withdraw()
            clean = postgres is None or postgres.stop(self.settings.get("stop_patience", 60))
            if clean:
                lease.release()

    def tell(self, state: str, reason: str) -> None:
        """Log the state and, if the lease is ours, leave it for others. A short-lived server leaves none."""
        if (state + reason) == self._told:
            return
        self._told = state + reason
        print("%s %s: %s" % (time.strftime("%Y-%m-%dT%H:%M:%S%z"), state, reason), file=sys.stderr, flush=True)
        if self._owner and not self.bootstrap:
            content = {"state": state, "reason": reason, "job": self.job, "host": self.hostname, "since": time.time()}
            files.write_json(os.path.join(self.run, "state.json"), content)

    def _watch(self, postgres: Postgres, lease: Lease, lifetime: Optional[float]) -> None:
        ends = None if lifetime is None else time.monotonic() + lifetime
        while True:
            time.sleep(0.5)  # ended early by a signal, which raises Stop
            if postgres.returncode() is not None:
                raise Failed("postgres ended by itself with exit code %d" % postgres.returncode())
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
        """Ask the scheduler about a holder on another host. A short-lived server has no job to ask about."""
        if holder.get("kind") == "bootstrap":
            return True
        return scheduler.job_has_ended(holder.get("kind", ""), self.settings.get("bin_dir", ""), holder.get("job", ""))


def job_id() -> str:
    """Return the id of the job that we run in; with no scheduler the PID is one."""
    return os.environ.get("SLURM_JOB_ID") or str(os.getpid())


def on_signal(number: int, _frame: object) -> None:
    """Turn a signal into the way out; a second one changes nothing."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stop("told to by %s" % signal.Signals(number).name)


def main() -> int:
    """Run the program; the exit code is 0 after a clean stop that somebody asked for."""
    parser = argparse.ArgumentParser(prog="hpc_db_host", description=__doc__)
    parser.add_argument("what", choices=("serve", "bootstrap"))
    parser.add_argument("--root", required=True, help="the instance directory")
    parser.add_argument("--lifetime", type=float, help="seconds after which a bootstrap server ends by itself")
    parser.add_argument("--lease-patience", type=float, default=0.0, help="seconds to wait for the lease")
    arguments = parser.parse_args()
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, on_signal)
    host = Host(arguments.root, arguments.what == "bootstrap")
    try:
        host.serve(arguments.lease_patience, arguments.lifetime)
    except Stop as stop:
        host.tell("ended", str(stop))
        return 0
    except Held as held:
        host.tell("failed", str(held))
        return 3
    except (Failed, Lost) as failed:
        host.tell("failed", str(failed))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
