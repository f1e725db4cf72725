# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""What the instance directory says about a server that is away: whether another job follows, and when.

The server job writes this to run/state.json, also as it ends; so no worker has to ask the scheduler.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time

# Seconds between two reads of the file, which thousands of workers read at the same time.
LOOK_SECONDS = 5.0
POOLED = "-pooled"


class Outlook:
    """Whether a server follows; the directory of a ``service`` is found when it is needed, and then remembered."""

    def __init__(self, root: str = "", service: str = "") -> None:
        self._root = root
        self._service = service
        self._due = 0.0
        self._follows = ""

    def learn(self) -> None:
        """Find the instance directory while the service entry exists, which the server job removes as it ends."""
        if not self._root and self._service:
            self._root = root_of(self._service)

    def follows(self) -> str:
        """Return what follows, such as ``queued as job 4711 since 10:32, Priority``; empty if nothing is known."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LOOK_SECONDS
            self.learn()
            found = read_follows(self._root)
            self._follows = self._follows if found is None else found
        return self._follows


def read_follows(root: str) -> str | None:
    """Return what follows the server of an instance; empty if nothing does, None if the file cannot be read now."""
    if not root:
        return ""
    try:
        with open(os.path.join(root, "run", "state.json"), encoding="utf-8") as stream:
            return str((json.load(stream).get("follows") or {}).get("told", ""))
    except ValueError:  # it is just rewritten
        return None
    except (OSError, AttributeError):
        return ""


def root_of(service: str) -> str:
    """Return the instance directory of a libpq service: of the password file in its entry, else at the default path."""
    name = service[:-len(POOLED)] if service.endswith(POOLED) else service
    default = os.environ.get("HPC_DB_ROOT") or os.path.expanduser(f"~/hpc_db/{name}")
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
