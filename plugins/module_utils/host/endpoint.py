# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The endpoint: the server's current address, for people and programs.

This collection reads ``run/endpoint.json``. libpq reads the instance's section in ``~/.pg_service.conf`` at every
connect, so a URL with the service's name follows the server. With PgBouncer there is a second section for it, named
after the instance with the suffix ``-pooled``, which no instance's name can have.

The server is live if an endpoint exists, names a job, and that job runs: ``serving_job``. A failed node leaves its
endpoint behind. To remove it, call this in <root>/host:

    python3 -m hpc_db_host.endpoint look JOB        print whether jobs of this name have left an endpoint, as JSON
    python3 -m hpc_db_host.endpoint withdraw JOB    the same, and withdraw it
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from typing import Dict, List, Optional, Tuple  # noqa: F401 - some in type comments

from . import files
from .break_lease import HERE, contender
from .layout import Layout
from .lease import can_be_asked
from .settings import complete

LOCK_STALE_SECONDS = 30.0
# Short, since the scheduler waits for our job to end; the next server also removes the endpoint.
LEAVING_SECONDS = 5.0
# For a user at a terminal; enough to break a lock that a failed node has left.
PATIENCE_SECONDS = 45.0
POOLED = "-pooled"


def publish(run: str, service_file: str, endpoint: dict, service: dict, pooled: Optional[dict] = None) -> None:
    """Publish the endpoint. ``service`` and ``pooled`` hold the libpq parameters except host and port."""
    name, pooler = endpoint["instance"], endpoint.get("pooler")
    try:
        edit_services(service_file, {
            name: dict(service, host=endpoint["host"], port=endpoint["port"]),
            name + POOLED: dict(pooled or service, **pooler) if pooler else {},
        })
    finally:  # independently: they may be on different file systems
        files.write_state(os.path.join(run, "endpoint.json"), endpoint)


def withdraw(run: str, service_file: str, instance: str, patience: float = LEAVING_SECONDS) -> None:
    """Withdraw the endpoint. The file stays, since hosts may cache for a minute that it does not exist."""
    path = os.path.join(run, "endpoint.json")
    try:
        if os.path.exists(path):
            files.write_state(path, {})
    except OSError:  # a quota on a file system that copies on write
        files.remove(path)
    finally:
        edit_services(service_file, {instance: {}, instance + POOLED: {}}, patience)


def read_endpoint(layout: Layout) -> Optional[dict]:
    """Return the last published endpoint, with ``tls`` true by default; None if it is withdrawn or unreadable.

    It may have been left behind by a job that was killed: ask ``serving_job``.
    """
    endpoint = files.read_json(layout.endpoint)
    return dict({"tls": True}, **endpoint) if endpoint else None


def serving_job(endpoint: Optional[dict], jobs: List[dict]) -> Optional[dict]:
    """Return the job whose server is live at ``endpoint``; None if the server is not live.

    The server is live if the endpoint exists, names a job, and that job runs. ``jobs`` are the server jobs in the
    queue, as dicts with ``id`` and ``state``. Read the endpoint before the queue: a job that ends in between is then
    missing from ``jobs``.
    """
    named = endpoint.get("job") if endpoint else None
    return next((job for job in jobs if named and job["id"] == named and job["state"] == "RUNNING"), None)


def forget_successor(layout: Layout) -> None:
    """Record that no server job is queued, so that waiting workers give up after the max outage."""
    state = files.read_json(layout.state) or {}
    if state.get("follows"):
        files.write_state(layout.state, dict(state, follows=None))


def edit_services(path: str, sections: Dict[str, dict], patience: float = 2 * LOCK_STALE_SECONDS) -> None:
    """Set these sections of a libpq service file, or remove those without parameters; keep everything else."""
    path = os.path.realpath(path)
    with FileLock(path + ".lock", patience):
        try:
            # Other lines of the user may have any encoding and any line ends: keep every byte.
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
                text = stream.read()
            mode = os.stat(path).st_mode & 0o777
        except FileNotFoundError:
            text, mode = "", 0o600
        edited = text
        for name in sorted(sections):
            edited = replace_section(edited, name, sections[name])
        if edited != text:
            files.write_atomically(path, edited, mode)


def replace_section(text: str, name: str, parameters: dict) -> str:
    """Return ``text`` with just ``parameters`` in the section ``name``; without the section if there are none."""
    kept = []  # type: List[str]
    inside = False
    for line in text.splitlines(True):
        # libpq's rule: a line that begins with a bracket is a heading, regardless of the rest.
        heading = re.match(r"\s*\[([^\]]*)", line)
        if heading:
            inside = heading.group(1) == name
        # Keep comments: they may belong to the next section.
        if not inside or re.match(r"\s*(#|$)", line):
            kept.append(line)
    while parameters and kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"
    if parameters:
        kept.append("[%s]\n" % name)
        kept.extend("%s=%s\n" % item for item in sorted(parameters.items()))
    return "".join(kept)


class FileLock:
    """A lock without flock: creating the directory acquires it. A lock that does not change for too long is broken."""

    def __init__(self, path: str, patience: float = 2 * LOCK_STALE_SECONDS) -> None:
        self.path = path
        self.patience = patience
        self._made = None  # type: Optional[Tuple[int, int]]

    def __enter__(self) -> None:
        limit = time.monotonic() + self.patience
        seen, since = None, time.monotonic()
        while True:
            try:
                os.mkdir(self.path, 0o700)
                self._made = _made(self.path)
                return
            except FileExistsError:
                now = time.monotonic()
                made = _made(self.path)
                if made != seen:
                    seen, since = made, now
                elif now - since > LOCK_STALE_SECONDS:
                    # Only one process at a time: otherwise a slow one could remove the next holder's lock.
                    with FileLock(self.path + ".breaking", self.patience):
                        self._remove(made)
                if now > limit:
                    raise TimeoutError("%s is locked by another process" % self.path) from None
                time.sleep(0.05)

    def __exit__(self, *_unused: object) -> None:
        self._remove(self._made)

    def _remove(self, made: "Optional[Tuple[int, int]]") -> None:
        """Remove the lock if it is still the one identified by ``made``, and not another holder's."""
        if made and _made(self.path) == made:
            with contextlib.suppress(OSError):  # if it stays, the next process breaks it
                os.rmdir(self.path)


def _made(path: str) -> "Optional[Tuple[int, int]]":
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def service_file(settings: dict) -> str:
    """Return the path of libpq's service file."""
    return os.path.expanduser(settings["service_file"])


def is_there(run: str, path: str, instance: str) -> bool:
    """Return whether an endpoint is published, in either file."""
    if files.read_json(os.path.join(run, "endpoint.json")):
        return True
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except FileNotFoundError:
        return False
    return any(replace_section(text, name, {}) != text for name in (instance, instance + POOLED))


def main() -> int:
    """Run the command line's verb and print the result as JSON."""
    parser = argparse.ArgumentParser(
        prog="hpc_db_host.endpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("look", "withdraw"))
    parser.add_argument("job")
    asked = parser.parse_args()
    os.umask(0o077)
    settings, run = complete(files.read_json(HERE.settings) or {}), HERE.run
    try:
        found = settings.get("job_name") == asked.job and is_there(run, service_file(settings), settings["instance"])
        holder = contender(run).holder() if found else None
        if holder and not can_be_asked(holder, settings["cluster"]):
            found = False  # a server elsewhere, unknown to the scheduler here
        if found and asked.verb == "withdraw":
            withdraw(run, service_file(settings), settings["instance"], PATIENCE_SECONDS)
        if asked.verb == "withdraw" and settings.get("job_name") == asked.job:
            forget_successor(HERE)
    except OSError as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
