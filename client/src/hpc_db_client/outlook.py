# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Read whether a server job is queued or running while the server is away.

The server job updates run/state.json, also when it ends, so workers need not query the scheduler. The role workers
copies this file beside wait.py: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time

# Seconds between two reads of the file, which thousands of workers read at the same time.
LOOK_SECONDS = 5.0
# A server is dead after so many lease timeouts without a heartbeat; hosts may cache one for a minute.
SILENT_TTLS = 3
POOLED = "-pooled"


class Outlook:
    """The next server job. The directory of a ``service`` is looked up once."""

    def __init__(self, root: str = "", service: str = "") -> None:
        self._root = root
        self._service = service
        #: Whether a worker's job, possibly this one, brings the server up, and not a job in the queue.
        self.is_in_workers = False
        self._due = 0.0
        self._next = ""
        self._beat = ""
        self._since = 0.0

    def learn(self) -> None:
        """Find the instance directory now: the server job removes the service entry when it ends."""
        if not self._root and self._service:
            self._root = root_of(self._service)

    def next_job(self) -> str:
        """Return the state of the next server job, such as ``queued as job 4711 since 10:32, Priority``.

        Empty if none is known, or if the server is running: then it is only this worker that cannot reach it.
        """
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LOOK_SECONDS
            self.learn()
            self._next = self._read(now)
        return self._next

    def _read(self, now: float) -> str:
        if not self._root:
            return ""
        try:
            with open(os.path.join(self._root, "run", "state.json"), encoding="utf-8") as stream:
                said = json.load(stream)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError):  # it is being rewritten, or the file system does not answer
            return self._next
        if not isinstance(said, dict) or said.get("state") == "serving" and self._is_alive(said.get("lease"), now):
            return ""
        follows = said.get("follows") or {}
        self.is_in_workers = follows.get("placement") == "workers"
        return str(follows.get("told", ""))

    def _is_alive(self, lease: dict | None, now: float) -> bool:
        """Return whether the server's heartbeat continues, as far as it was watched: a killed job leaves its state."""
        if not lease:
            return False
        beat = ""
        with contextlib.suppress(OSError, ValueError):
            path = os.path.join(self._root, "run", f"hb.{lease['epoch']}")
            with open(path, encoding="utf-8") as stream:
                beat = f"{stream.read()} {os.fstat(stream.fileno()).st_mtime_ns}"
        if beat != self._beat:
            self._beat, self._since = beat, now
        return now - self._since <= SILENT_TTLS * float(lease["ttl"])


def root_of(service: str) -> str:
    """Return the instance directory of a libpq service: the one of the password file in its entry, else the default."""
    name = service[:-len(POOLED)] if service.endswith(POOLED) else service
    default = os.path.expanduser(f"~/hpc_db/{name}")
    if os.environ.get("HPC_DB_INSTANCE") == name:  # in a job of the role workers
        default = os.environ["HPC_DB_ROOT"]
    path = os.environ.get("PGSERVICEFILE") or os.path.expanduser("~/.pg_service.conf")
    inside = False
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            heading = re.match(r"\s*\[([^\]]*)", line)
            if heading:
                inside = heading.group(1) == service
            elif inside and line.startswith("passfile="):
                return os.path.dirname(os.path.dirname(line.partition("=")[2].strip()))
    return default if os.path.isdir(os.path.join(default, "run")) else ""
