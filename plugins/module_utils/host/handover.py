# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hand-over from a running server job, the predecessor, to a running successor.

The successor checks that it can serve, asks for the lease in run/request.json, and repeats this every second. The
predecessor accepts in run/answer.json, makes a dump, stops PostgreSQL, and releases the lease. If the successor cannot
serve, or no longer asks, the predecessor continues to serve.

Both files exist before they are read, and are rewritten in place: a host may cache the absence of a file for a minute.
"""

import contextlib
import os
import re
import socket
import subprocess
import time
import uuid
from typing import Dict, List, Optional, Tuple  # noqa: F401 - Tuple in a type comment

from . import files
from .health import space
from .layout import Layout
from .postgres import Failed, check_programs, program_environment
from .schedulers.base import megabytes
from .settings import BASE_MB

# Seconds between two requests.
ASK_SECONDS = 1.0
# A request that was not repeated for this long is void. A busy file server may delay one for seconds.
FRESH_SECONDS = 10.0


class Refused(Exception):
    """The predecessor does not hand over; the message says why."""


class Predecessor:
    """The predecessor's side; ``job`` is its id."""

    def __init__(self, layout: Layout, job: str) -> None:
        self._layout = layout
        self._job = job
        self._seen = ("", -1, 0.0)  # type: Tuple[str, int, float]
        self._heard = False
        for path in (layout.request, layout.answer):
            with contextlib.suppress(OSError):  # a full disk; then a successor is noticed later
                if not os.path.exists(path):
                    files.write_state(path, {})

    def poll(self) -> Optional[dict]:
        """Return the request of a successor that still asks; None if there is none.

        ``job`` and ``host`` are the successor's. ``refusal`` says why it cannot serve; it is empty if it can.
        """
        request = files.read_json(self._layout.request) or {}
        if request.get("to") != self._job:
            return None
        who, beat, now = str(request.get("who")), int(request.get("beat", 0)), time.monotonic()
        if (who, beat) != self._seen[:2]:
            # A request counts once it is repeated: a single one may be left from a dead job.
            self._heard = bool(request.get("refusal")) or who == self._seen[0]
            self._seen = (who, beat, now)
        return request if self._heard and now - self._seen[2] <= FRESH_SECONDS else None

    def still_asks(self, request: dict) -> bool:
        """Wait for the next repetition of a request, among those of other jobs; return whether it came."""
        latest = request["beat"]
        found = files.read_json(self._layout.request) or {}
        if found.get("who") == request["who"]:
            latest = found["beat"]  # written meanwhile, perhaps before the successor died
        limit = time.monotonic() + FRESH_SECONDS
        while time.monotonic() < limit:
            found = files.read_json(self._layout.request) or {}
            if found.get("who") == request["who"] and found["beat"] > latest:
                return True
            time.sleep(0.1)
        self._seen, self._heard = (request["who"], latest, limit), False
        return False

    def is_taken(self, request: dict) -> bool:
        """Return whether the successor says that it has taken the lease."""
        found = files.read_json(self._layout.request) or {}
        return found.get("who") == request["who"] and bool(found.get("taken"))

    def answer(self, request: dict, answer: str, reason: str = "") -> None:
        """Answer a request: ``accepted`` or ``refused``."""
        content = {"from": self._job, "to": request.get("who"), "answer": answer, "reason": reason}
        files.write_state(self._layout.answer, content)


class Successor:
    """The successor's side; ``job`` is its id."""

    def __init__(self, layout: Layout, job: str) -> None:
        self._layout = layout
        self._job = job
        self._who = uuid.uuid4().hex
        self._beat = 0
        self._due = 0.0
        self._request = {}  # type: dict
        #: Whether the predecessor is handing over.
        self.is_accepted = False

    def ask(self, holder: dict, refusal: str = "") -> None:
        """Ask the holder for the lease, or tell it why this job cannot serve; raise Refused if it does not hand over.

        Does nothing if the last request is recent.
        """
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + ASK_SECONDS
        self._beat += 1
        self._request = {
            "to": holder.get("job"), "who": self._who, "job": self._job, "host": socket.gethostname(),
            "beat": self._beat, "refusal": refusal,
        }
        files.write_state(self._layout.request, self._request)
        answer = files.read_json(self._layout.answer) or {}
        found = answer.get("answer") if answer.get("to") == self._who else ""
        self.is_accepted = found == "accepted"
        if found == "refused":
            raise Refused(answer["reason"])

    def tell_taken(self) -> None:
        """Tell the predecessor that this job has the lease: its host may cache the list of leases for a minute."""
        if self._request:
            files.write_state(self._layout.request, dict(self._request, taken=True))


def check_ready(settings: dict, parameters: Optional[Dict[str, str]] = None) -> None:
    """Raise Failed or OSError if this host cannot serve; changes nothing.

    ``parameters`` are those of PostgreSQL that override its configuration file.
    """
    check_programs(settings)
    layout = Layout(settings["root"])
    readable = [os.path.join(settings["data"], "global", "pg_control"), settings["config"], layout.hba]
    if "sslmode" in settings["service"]:
        readable += [layout.certificate, layout.key]
    for path in readable:
        with open(path, "rb") as stream:
            if not stream.read(1):
                raise Failed("%s is empty" % path)
    full = space(settings["data"])
    if full:
        raise Failed(full)
    needed, free = shared_memory(settings, parameters) + BASE_MB, free_memory()
    if free is not None and free < needed:
        raise Failed("PostgreSQL needs %d MB of memory, but %d MB are free" % (needed, free))


def shared_memory(settings: dict, parameters: Optional[Dict[str, str]] = None) -> int:
    """Return PostgreSQL's shared_buffers in MB; 0 if unknown."""
    command = [
        os.path.join(settings["bindir"], "postgres"), "-C", "shared_buffers", "-D", settings["data"],
        "-c", "config_file=%s" % settings["config"],
    ]
    for name, value in (parameters or {}).items():
        command += ["-c", "%s=%s" % (name, value)]
    try:
        done = subprocess.run(
            command, env=program_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=60, check=False,
        )
    except subprocess.TimeoutExpired:
        return 0
    return megabytes(done.stdout.decode("utf-8", "replace"), 8)  # a bare number is in blocks of 8 kB


def free_memory() -> Optional[int]:
    """Return the memory in MB that this process may still get from the machine and its control groups, if known."""
    limits = [*_available(), *_group_limits()]
    return min(limits) // 1024**2 if limits else None


def _available() -> List[int]:
    try:
        with open("/proc/meminfo") as stream:
            return [int(kb) * 1024 for kb in re.findall(r"^MemAvailable: +(\d+) kB$", stream.read(), re.MULTILINE)]
    except OSError:
        return []


def _group_limits() -> List[int]:
    """Return the limits in bytes of this process's control groups, of both versions."""
    found = []
    try:
        with open("/proc/self/cgroup") as stream:
            lines = stream.read().splitlines()
    except OSError:
        return []
    for line in lines:
        _number, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else (
            "/sys/fs/cgroup", "memory.max")
        while True:
            try:
                with open(base + group.rstrip("/") + "/" + name) as stream:
                    text = stream.read().strip()
                found += [int(text)] if text.isdigit() else []
            except OSError:
                pass
            if group in ("", "/"):
                break
            group = os.path.dirname(group)
    return found
