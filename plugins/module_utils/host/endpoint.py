# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The endpoint: where the server is now, for people and programs.

``run/endpoint.json`` is for this collection; the instance's section in ``~/.pg_service.conf`` is for
libpq, which reads it at every connect: so a URL that names the service follows the server. Where PgBouncer runs
beside it, the section with ``-pooled`` after the instance's name leads there; no instance can be called so.

For one that nobody took back, as its node died, call it in <root>/host:

    python3 -m hpc_db_host.endpoint look JOB        print whether jobs of this name have left an endpoint, as JSON
    python3 -m hpc_db_host.endpoint withdraw JOB    the same, and take it back
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
from .lease import can_be_asked
from .settings import complete

LOCK_STALE_SECONDS = 30.0
# On the way out somebody waits for our node: whoever serves next takes the endpoint back, too.
LEAVING_SECONDS = 5.0
# For somebody who waits at a terminal; a lock that a dead node has left is broken in that time.
PATIENCE_SECONDS = 45.0
POOLED = "-pooled"


def publish(run: str, service_file: str, endpoint: dict, service: dict, pooled: Optional[dict] = None) -> None:
    """Tell everybody where the server is. ``service`` and ``pooled`` hold the libpq parameters beside host and port."""
    name, pooler = endpoint["instance"], endpoint.get("pooler")
    try:
        edit_services(service_file, {
            name: dict(service, host=endpoint["host"], port=endpoint["port"]),
            name + POOLED: dict(pooled or service, **pooler) if pooler else {},
        })
    finally:  # each by itself: they may be on different file systems
        files.write_json(os.path.join(run, "endpoint.json"), endpoint)


def withdraw(run: str, service_file: str, instance: str, patience: float = LEAVING_SECONDS) -> None:
    """Take back what ``publish`` said."""
    try:
        files.remove(os.path.join(run, "endpoint.json"))
    finally:
        edit_services(service_file, {instance: {}, instance + POOLED: {}}, patience)


def edit_service(path: str, name: str, parameters: dict) -> None:
    """Set the section ``name`` of a libpq service file, or remove it; everything else stays as it is."""
    edit_services(path, {name: parameters})


def edit_services(path: str, sections: Dict[str, dict], patience: float = 2 * LOCK_STALE_SECONDS) -> None:
    """Set each of these sections, or remove those without parameters; everything else stays as it is."""
    path = os.path.realpath(path)
    with FileLock(path + ".lock", patience):
        try:
            # Other people's lines may be of any encoding and any system: they are kept byte by byte.
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
    """Return ``text`` with the section ``name`` holding just ``parameters``; without it if there are none."""
    kept = []  # type: List[str]
    inside = False
    for line in text.splitlines(True):
        # As libpq has it: a line that begins with a bracket is a heading, whatever comes after.
        heading = re.match(r"\s*\[([^\]]*)", line)
        if heading:
            inside = heading.group(1) == name
        # A comment may be about the next section, and is nobody's parameter.
        if not inside or re.match(r"\s*(#|$)", line):
            kept.append(line)
    while parameters and kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"
    if parameters:
        kept.append("[%s]\n" % name)
        kept.extend("%s=%s\n" % item for item in sorted(parameters.items()))
    return "".join(kept)


class FileLock:
    """A lock that needs no flock: who creates the directory has it. A lock that stood still is broken."""

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
                    # One at a time, so that nobody removes the lock that a faster one has taken meanwhile.
                    with FileLock(self.path + ".breaking", self.patience):
                        self._remove(made)
                if now > limit:
                    raise TimeoutError("%s is locked by another process" % self.path) from None
                time.sleep(0.05)

    def __exit__(self, *_unused: object) -> None:
        self._remove(self._made)

    def _remove(self, made: "Optional[Tuple[int, int]]") -> None:
        """Remove the lock if it is still the one that was made then, and not somebody else's."""
        if made and _made(self.path) == made:
            with contextlib.suppress(OSError):  # one that stays stands still, and is broken by the next one
                os.rmdir(self.path)


def _made(path: str) -> "Optional[Tuple[int, int]]":
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def service_file(settings: dict) -> str:
    """Return the path of the file that libpq reads."""
    return os.path.expanduser(settings["service_file"])


def is_there(run: str, path: str, instance: str) -> bool:
    """Tell whether anything says where the server is."""
    if os.path.exists(os.path.join(run, "endpoint.json")):
        return True
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except FileNotFoundError:
        return False
    return any(replace_section(text, name, {}) != text for name in (instance, instance + POOLED))


def main() -> int:
    """Do what the command line says."""
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
            found = False  # that of a server elsewhere, of which the scheduler here knows nothing
        if found and asked.verb == "withdraw":
            withdraw(run, service_file(settings), settings["instance"], PATIENCE_SECONDS)
    except OSError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
