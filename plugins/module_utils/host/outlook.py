# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Predict the outage at the end of the server job, for the playbooks."""

import time
from typing import Any, Callable, Dict, List, Optional

from . import events, files
from .layout import Layout

# Number of past outages in the message.
LAST = 3


def look(layout: Layout, job: Optional[dict]) -> str:
    """Return the warning for the running job of an instance."""
    state = files.read_json(layout.state)
    return warning(job, state, lambda: events.account(events.read(layout.root))["outages"], time.time())


def warning(
    job: Optional[dict], state: Optional[dict], outages: Callable[[], List[Dict[str, Any]]], now: float
) -> str:
    """Return one line about the outage at the end of a server job; empty if none is expected.

    ``job`` is the running job of the queue, ``state`` the content of run/state.json, and ``outages`` returns those in
    ``events.account``.
    """
    left = job.get("time_left") if job else None
    follows = (state or {}).get("follows")
    if not job or left is None or not follows or not follows.get("late"):
        return ""
    ends = now + left
    words = "from %s (end of job %s) until job %s starts, which %s" % (
        clock(ends), job["id"], follows["id"], follows["late"])
    expected = follows.get("expected")
    if expected and expected > ends:
        words += "; the scheduler expects that at %s, after %s" % (clock(expected), span(expected - ends))
    # The begin and the end are times of two hosts.
    last = [max(each["ended"] - each["began"], 0) for each in outages() if each["ended"]][-LAST:]
    if last:
        words += "; the last outages took %s" % ", ".join(span(seconds) for seconds in last)
    return words


def clock(seconds: float) -> str:
    """Return a time in the cluster's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def span(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 120:
        return "%.0f s" % seconds
    return "%.0f min" % (seconds / 60) if seconds < 7200 else "%.1f h" % (seconds / 3600)
