# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A tunnel from this machine to a server that moves: ``tunnel.py SETTINGS --port=N`` with SETTINGS in JSON.

One ssh connection to the login node reads the server's address every few seconds, and forwards 127.0.0.1:N there. When
the server moves, or the connection fails, a new connection is opened. The service entry and the password for libpq are
in two files that only their owner can read. The password is read over the same connection, and never an argument.

A new connection is used, rather than a new forwarding over the old one, because nothing else ends the dashboard's
sessions on a node that has failed: the other end of their TCP connections is this machine's own ssh, which still runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple, NoReturn

# Longer than ssh itself needs to detect that the other end is gone.
ANSWER_SECONDS = 30.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
# ssh gives up a connection without any reply for 5 s, twice in a row.
ALIVE = {"ServerAliveInterval": "5", "ServerAliveCountMax": "2", "ConnectTimeout": "15"}
# No prompts, since nobody can answer; and overrides for settings in the user's configuration beyond connecting.
QUIET = {
    "BatchMode": "yes", "ExitOnForwardFailure": "yes", "ClearAllForwardings": "yes", "PermitLocalCommand": "no",
    "RemoteCommand": "none", "RequestTTY": "no", "ForwardAgent": "no", "ForwardX11": "no",
}
# Time limit in seconds for the login.
LOGIN_SECONDS = 90.0
DIE_WITH_PARENT = 1  # Linux' PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None)

# Separates our output from text that the login shell prints before it.
MARK = "hpc_db-tunnel:"
# Does not ask the scheduler whether the endpoint's job still runs: every few seconds, that would be too many questions.
# An endpoint left behind by a failed node leads nowhere until the next server replaces it. If another server has got
# its port, the parameters of the service entry protect the password.
LOOK = (
    f'printf "\\n{MARK}"; cat "$1/run/endpoint.json" 2>/dev/null; '
    f'printf "\\n{MARK}"; grep "^[*]:[*]:[*]:$2:" "$1/secrets/pgpass" 2>/dev/null; printf "\\n{MARK}"'
)


class Lost(Exception):
    """The connection has to be replaced; the message says why."""


class Place(NamedTuple):
    """The server's address and the start time of its endpoint."""

    host: str
    port: int
    since: float


class Seen(NamedTuple):
    """The state on the cluster: the server's address, if any, and the line of the password file, or ""."""

    place: Place | None
    password: str


def say(text: str) -> None:
    """Write a line to the log; escape non-printable characters, which may come from the cluster."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)


def options(given: dict[str, str]) -> list[str]:
    """Return options for ssh. ssh uses the first value of an option, so these come before the inventory's."""
    return [word for name, value in given.items() for word in ("-o", f"{name}={value}")]


def master_command(settings: dict[str, Any], control: str) -> list[str]:
    """Return the call that connects to the login node and keeps the connection open."""
    own = {**QUIET, **ALIVE, "ControlMaster": "yes", "ControlPath": control, "ControlPersist": "no"}
    return [settings["ssh"], *options(own), *shlex.split(settings["arguments"]), "-N", "--", settings["host"]]


def over_master(settings: dict[str, Any], control: str, *arguments: str) -> list[str]:
    """Return a call that uses this connection and never opens its own."""
    own = {"BatchMode": "yes", "ControlMaster": "no", "ControlPath": control, "ProxyCommand": "false"}
    return [settings["ssh"], "-F", "/dev/null", *options(own), *arguments]


def look_command(settings: dict[str, Any], control: str) -> list[str]:
    """Return the call that reads the server's address and the password."""
    remote = ["exec", "sh", "-c", LOOK, "sh", settings["root"], settings["role"]]
    return over_master(settings, control, "--", settings["host"], " ".join(map(shlex.quote, remote)))


def forward_command(settings: dict[str, Any], control: str, port: int, place: Place) -> list[str]:
    """Return the call that forwards our port to the server over the connection."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    forwarding = f"127.0.0.1:{port}:{host}:{place.port}"
    return over_master(settings, control, "-O", "forward", "-L", forwarding, "--", settings["host"])


def parse_look(text: str, role: str) -> Seen:
    """Return the state in the output of LOOK; raise Lost for any other text."""
    parts = text.split(f"\n{MARK}")
    if len(parts) < 4:
        raise Lost(f"{' '.join(text.split())[-200:]!r} is not a valid answer of the login node")
    password = parts[-2].rstrip("\n")
    found = re.fullmatch(rf"\*:\*:\*:{re.escape(role)}:[^\r\n]+", password)
    return Seen(parse_endpoint(parts[-3]), password if found else "")


def parse_endpoint(text: str) -> Place | None:
    """Return the server's address; None if there is none, or if ssh could misread it."""
    try:
        found = json.loads(text)
        place = Place(str(found["host"]), int(found["port"]), float(found["since"]))
    except (ValueError, KeyError, TypeError):
        return None
    good = re.fullmatch(r"[A-Za-z0-9:][A-Za-z0-9.:_-]*", place.host) and 0 < place.port < 65536
    return place if good else None


def write_private(path: str, text: str) -> None:
    """Replace a file atomically by one with this text that only its owner can read."""
    aside = f"{path}.new"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(aside, path)


def write_service(settings: dict[str, Any], port: int) -> None:
    """Write the service file with our local port; libpq reads it at every connect."""
    parameters = {**settings["parameters"], "host": "127.0.0.1", "port": port, "user": settings["role"],
                  "passfile": os.path.join(settings["folder"], "pgpass")}
    lines = [f"[{settings['service']}]", *(f"{name}={value}" for name, value in sorted(parameters.items()))]
    write_private(os.path.join(settings["folder"], "pg_service.conf"), "\n".join(lines) + "\n")


def die_with_parent() -> None:
    """In the child: end ssh when this program is killed. On macOS, which lacks this, the process group is ended."""
    if sys.platform.startswith("linux"):
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGTERM)


class Connection:
    """One ssh connection to the login node, and the forwarding over it."""

    def __init__(self, settings: dict[str, Any], port: int, control: str) -> None:
        self._settings, self._port, self._control = settings, port, control
        with contextlib.suppress(FileNotFoundError):
            os.unlink(control)  # left by a tunnel that was killed
        command = master_command(settings, control)
        self._ssh = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)

    def wait_until_there(self) -> None:
        """Wait until the login has succeeded."""
        deadline = time.monotonic() + LOGIN_SECONDS
        while not os.path.exists(self._control):
            if self._ssh.poll() is not None:
                raise Lost(f"ssh to {self._settings['host']} has ended with {self._ssh.returncode}")
            if time.monotonic() > deadline:
                raise Lost(f"{self._settings['host']} has not accepted the login for {LOGIN_SECONDS:.0f} s")
            time.sleep(0.05)

    def _ask(self, command: list[str]) -> str:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
                timeout=ANSWER_SECONDS, preexec_fn=die_with_parent, check=False,
            )
        except subprocess.TimeoutExpired:
            raise Lost(f"{self._settings['host']} has not answered for {ANSWER_SECONDS:.0f} s") from None
        if self._ssh.poll() is not None or done.returncode == 255:
            raise Lost(f"the connection to {self._settings['host']} is lost: {in_short(done.stderr)}")
        return done.stdout

    def look(self) -> Seen:
        """Read the server's address and the password."""
        return parse_look(self._ask(look_command(self._settings, self._control)), self._settings["role"])

    def forward(self, place: Place) -> None:
        """Forward our port to this address."""
        self._ask(forward_command(self._settings, self._control, self._port, place))

    def end(self) -> None:
        """End the connection, and everything that goes over it."""
        self._ssh.terminate()
        try:
            self._ssh.wait(5)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()


def in_short(text: str) -> str:
    """Return the last line of ssh's output."""
    return (text.strip().splitlines() or ["no error message"])[-1]


def follow(settings: dict[str, Any], connection: Connection) -> NoReturn:
    """Forward to the server until it moves or the connection fails, which raises Lost."""
    connection.wait_until_there()
    passfile = os.path.join(settings["folder"], "pgpass")
    place, known, waited = None, "", False
    while True:
        seen = connection.look()
        if seen.password and seen.password != known:
            write_private(passfile, f"{seen.password}\n")
            say(f"the password of {settings['role']} is in {passfile}" if not known else "it has a new password")
            known = seen.password
        if place and seen.place != place:
            raise Lost(f"the server has left {place.host} port {place.port}")
        if seen.place and not place:
            connection.forward(seen.place)
            place = seen.place
            say(f"forwards to {place.host} port {place.port}")
        elif not place and not waited:
            waited = True
            say("no server is running; waiting for one")
        time.sleep(settings["poll"])


def keep_on(settings: dict[str, Any], port: int, folder: str) -> NoReturn:
    """Connect repeatedly, with growing pauses after failures."""
    pause = FIRST_PAUSE
    while True:
        began = time.monotonic()
        connection = Connection(settings, port, os.path.join(folder, "ssh"))
        try:
            follow(settings, connection)
        except Lost as error:
            say(str(error))
        finally:
            connection.end()
        # A connection that has lasted for a while does not count as a failure.
        pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
        time.sleep(pause * random.uniform(0.5, 1))


def stop(signum: int, _frame: object) -> NoReturn:
    """Exit by an exception, so that everything is cleaned up."""
    signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(0)


def main() -> None:
    """Run the tunnel until a signal ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    # A socket's path is limited to about 100 bytes, so it cannot be in a folder chosen by the user.
    folder = tempfile.mkdtemp(prefix="hpc_db-tunnel-")
    try:
        write_service(given.settings, given.port)
        keep_on(given.settings, given.port, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
