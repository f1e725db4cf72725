# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The server's history: log/events.jsonl has one JSON object per line.

    time      seconds since 1970
    job, host the job that wrote the record, and its host
    state     starting, serving, unhealthy, stopping, ended or failed
    event     "start" of PostgreSQL, "restart" after a crash, "walltime" (a stop shortly before it), "handover" (a stop
              requested by a successor), else empty
    reason    one line for people
    cause     for a restart: why PostgreSQL ended
"""

import contextlib
import json
import os
from typing import Any, Dict, Iterable, List, Optional

from .layout import Layout

# Enough for several months of hand-overs. A larger file is renamed, and replaces the previous older file.
MOST_BYTES = 4 * 1024 * 1024
OLDER = ".1"


def append(root: str, record: Dict[str, Any]) -> None:
    """Add a record; raise OSError if that fails."""
    path = Layout(root).events
    with contextlib.suppress(OSError):
        if os.path.getsize(path) > MOST_BYTES:
            os.rename(path, path + OLDER)
    with open(path, "ab+") as stream:
        # A full disk may have truncated the last line.
        whole = stream.tell() == 0 or _last_byte(stream) == b"\n"
        stream.write(b"" if whole else b"\n")
        stream.write(json.dumps(record, sort_keys=True).encode() + b"\n")


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1)


def read(root: str) -> List[Dict[str, Any]]:
    """Return the records, oldest first; skip invalid lines."""
    found = []
    for path in (Layout(root).events + OLDER, Layout(root).events):
        try:
            with open(path, "rb") as stream:
                lines = stream.read().split(b"\n")
        except OSError:
            continue
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line.decode())
                if isinstance(record, dict) and {"time", "state"} <= set(record):
                    found.append(record)
    return found


def account(records: Iterable[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the time of the first record, whether the server is running, its outages, and its unhealthy periods.

    An outage has ``began``, ``ended`` (None if it goes on), ``certain`` and ``reason``. A server that is killed writes
    no record: then the outage began at an unknown time after its last record, and is not ``certain``.
    """
    since: Optional[int] = None
    last, serving, notice, job = 0, False, "", None
    outages: List[Dict[str, Any]] = []
    troubles: List[Dict[str, Any]] = []
    for record in records:
        when, state, event = int(record["time"]), record["state"], record.get("event", "")
        reason = record.get("reason", "")
        since = when if since is None else since
        away = not serving and outages and outages[-1]["ended"] is None
        ill = troubles and troubles[-1]["ended"] is None
        if ill and state != "unhealthy":
            troubles[-1]["ended"] = when
        if state == "serving":
            if away:
                outages[-1]["ended"] = when
            serving, notice, job = True, "", record.get("job")
        elif state == "unhealthy" and serving and not (ill and troubles[-1]["reason"] == reason):
            if ill:
                troubles[-1]["ended"] = when
            troubles.append({"began": when, "ended": None, "certain": True, "reason": reason})
        elif event in ("walltime", "handover"):
            notice = reason
        elif state == "stopping" and serving:
            outages.append({"began": when, "ended": None, "certain": True, "reason": notice})
            serving = False
        elif event == "start" and serving:
            outages.append({"began": last, "ended": None, "certain": False, "reason": ""})
            serving = False
        elif away and not outages[-1]["reason"] and record.get("job") == job:
            # Ignore records of other jobs that try to get the lease meanwhile.
            if event == "restart" or state in ("ended", "failed"):
                outages[-1]["reason"] = record.get("cause") or reason
        last = when
    return {"since": since, "serving": serving, "outages": outages, "troubles": troubles}
