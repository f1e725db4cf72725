# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server in the workers' jobs: each job runs one candidate, which can take over the server (server_placement).

A few candidates wait actively, each in a place run/candidate.N. The others sleep, and look for a free place from time
to time. A place is free if its candidate has left it, or no longer renews it. It does not protect anything: if two
candidates have the same place, or all places are empty, the lease still allows one server only.
"""

import contextlib
import hashlib
import json
import os
import select
import socket
import struct
import time
import uuid
from typing import Dict, List, Optional, Tuple  # noqa: F401 - some in type comments

from . import files, handover, processes
from .layout import Layout
from .lease import Held, Lease
from .postgres import Failed
from .scheduler import time_left
from .schedulers import SCHEDULERS
from .settings import read_settings

# Seconds between two checks whether the lease is free; each reads one file.
PAUSE = 1.0
# How many places all sleeping candidates together look at per second, and the shortest sleep.
LOOKS_PER_SECOND = 2.0
SHORTEST_SLEEP = 2.0
# Seconds that a candidate leaves to each other one whose job ends later; and one that probably cannot serve, to all.
STAGGER_SECONDS = 1.25 * PAUSE
UNFIT_SECONDS = 10.0
# After so many jobs in a row in which the server could not start, no other one tries.
MOST_FAILURES = 3
# Seconds until the next attempt in the same job, for each failure before.
RETRY_SECONDS = 30.0
# Seconds until a server job that has refused to hand over is asked again.
REFUSED_SECONDS = 60.0
# Seconds between two checks of a serving candidate whether the server is wanted.
LOOK_SECONDS = 2.0
# The lower priority of the server's processes: those of the worker come first.
NICENESS = 10
# Seconds between two checks whether the server is wanted while it is not.
UNWANTED_SECONDS = 5.0
# What follows in run/state.json, for waiting workers: any worker's job, or a server job that is submitted.
FOLLOWS = {"id": "", "told": "the next worker's job starts it", "placement": "workers"}
JOB_FOLLOWS = {"id": "", "told": "the server job starts it"}


def may_start(layout: Layout) -> bool:
    """Return whether a worker's job may start the server: it was not stopped, and has not failed too often."""
    wanted = files.read_json(layout.wanted) or {}
    failed = (files.read_json(layout.state) or {}).get("failures") or []
    return bool(wanted.get("wanted")) and len(failed) < MOST_FAILURES


class Over(Exception):
    """The candidate has nothing left to do; the message says why."""


class Left(Exception):
    """The serving candidate should leave the server to others; the message says why."""

    def __init__(self, why: str, planned: bool) -> None:
        Exception.__init__(self, why)
        self.planned = planned


class Door:
    """A private socket on this node that only one candidate of a job can open. A knock asks it to leave."""

    def __init__(self, root: str, job: str) -> None:
        name = "%d %s %s" % (os.geteuid(), os.path.realpath(root), job)
        self._address = "\0hpc_db " + hashlib.sha256(name.encode()).hexdigest()
        self._socket = None  # type: Optional[socket.socket]
        self._knocked = []  # type: List[socket.socket]

    def open(self) -> bool:
        """Open the door; return False if another candidate of this job has opened it."""
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            opened.bind(self._address)
            opened.listen(16)
        except OSError:
            opened.close()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, contextlib.suppress(OSError):
                other.connect(self._address)
                return not _is_own(other)  # else another user's program is in the way
            return True
        self._socket = opened
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for a knock; return whether there was one. Whoever has knocked is told when this process ends."""
        if self._socket is None:
            time.sleep(seconds)
            return False
        if select.select([self._socket], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                visitor = self._socket.accept()[0]
                visitor.settimeout(1.0)
                self._knocked += [visitor] if _is_own(visitor) and visitor.recv(1) else []
        return bool(self._knocked)

    def knock(self, patience: float) -> bool:
        """Ask the candidate of this job to leave; return whether it has ended within ``patience`` seconds."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
            visitor.settimeout(patience)
            try:
                visitor.connect(self._address)
                visitor.sendall(b"!")
                return visitor.recv(1) == b""
            except socket.timeout:
                return False
            except OSError:
                return True  # there is none


def _is_own(connection: socket.socket) -> bool:
    """Return whether the other end is a process of this user."""
    size = struct.calcsize("3i")
    _pid, user, _group = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user == os.geteuid()


class Places:
    """The places of the active candidates. Each file is rewritten in place, since hosts cache absent files."""

    def __init__(self, layout: Layout, count: int, ttl: float) -> None:
        #: The number of our place; 0 if we have none.
        self.mine = 0
        self._layout = layout
        self._count = count
        self._ttl = ttl
        self._who = uuid.uuid4().hex
        self._beat = 0
        self._due = 0.0
        self._next = 0
        #: The file server's clock is ahead of our monotonic one by at least this.
        self._ahead = float("-inf")

    def take(self, content: dict, everywhere: bool = False) -> bool:
        """Look at the next place, or at all, and take a free one; return whether we have one."""
        if self._ahead == float("-inf"):
            with contextlib.suppress(OSError):
                files.write_state(self._layout.clock, {})
                self._ahead = os.stat(self._layout.clock).st_mtime - time.monotonic()
        for _each in range(self._count if everywhere else 1):
            self._next = self._next % self._count + 1
            if not self.read(self._next):
                self.mine, self._due = self._next, 0.0
                return self.renew(content, True)
        return False

    def renew(self, content: dict, is_new: bool = False) -> bool:
        """Renew our place if that is due; return False if another candidate has taken it."""
        now = time.monotonic()
        if now < self._due:
            return True
        if not is_new and self.read(self.mine).get("who", self._who) != self._who:
            self.mine = 0
            return False
        # A new place is checked soon, since another candidate may have taken it at the same time.
        self._due = now + (1.5 * PAUSE if is_new else self._ttl / 6)
        self._beat += 1
        self._write(dict(content, who=self._who, beat=self._beat, place=self.mine))
        return True

    def leave(self) -> None:
        """Leave our place to another candidate."""
        if self.mine:
            self._write({})
        self.mine = 0

    def others(self) -> List[dict]:
        """Return the other active candidates."""
        found = [self.read(number) for number in range(1, self._count + 1) if number != self.mine]
        return [each for each in found if each]

    def is_first(self) -> bool:
        """Return whether no candidate that can serve is in a place before ours."""
        return not any(self.read(number).get("unfit") == "" for number in range(1, self.mine))

    def read(self, number: int) -> dict:
        """Return the candidate in a place; empty if the place is free."""
        try:
            with open(self._layout.place(number)) as stream:
                changed = os.fstat(stream.fileno()).st_mtime
                try:
                    found = json.load(stream)
                except ValueError:
                    found = {"who": "being written"}
        except OSError:
            return {}
        if not isinstance(found, dict) or not found.get("who"):
            return {}
        # Clocks differ, so the file's age is measured by the file server's own clock, as far as we know it.
        now = time.monotonic()
        self._ahead = max(self._ahead, changed - now)
        return found if now + self._ahead - changed <= self._ttl else {}

    def _write(self, content: dict) -> None:
        with contextlib.suppress(OSError):  # a full disk; the lease decides anyway
            files.write_state(self._layout.place(self.mine), content)


class Candidate:
    """The candidate of one worker's job. ``beside`` is the PID of the worker's script, if that ends before the job."""

    def __init__(self, settings: dict, job: str, beside: int = 0) -> None:
        self._failures = 0
        self._settings = settings
        self._layout = Layout(settings["root"])
        self._job = job
        self._beside = beside
        self._started = processes.start_time(beside) if beside else None
        self._door = Door(settings["root"], job)
        self._places = Places(self._layout, settings["candidates"], settings["lease_ttl"])
        #: The end of the job in seconds since 1970, if it is known.
        self._ends = None  # type: Optional[float]
        self._unfit = None  # type: Optional[str]
        self._retry = 0.0
        self._wanted = False
        self._look_due = 0.0
        self._refused_until = 0.0
        self._slept = False

    @property
    def parameters(self) -> Dict[str, str]:
        """PostgreSQL's parameters that differ from its configuration file."""
        return {"shared_buffers": self._settings["workers_shared_buffers"]}

    def open(self) -> bool:
        """Return whether this is the only candidate of its job on this node."""
        return not SCHEDULERS[self._settings["scheduler"]].job_variable or self._door.open()

    def acquire(self, lease: Lease) -> None:
        """Wait until we hold the lease; raise Over if that can no longer happen."""
        successor = handover.Successor(self._layout, self._job)
        free_since = None  # type: Optional[float]
        while True:
            self._check_worker()
            if time.monotonic() < self._retry or not self._has_place():
                self._sleep(max(SHORTEST_SLEEP, self._settings["workers"] / LOOKS_PER_SECOND))
                continue
            now = time.monotonic()
            if now >= self._look_due:
                self._look_due = now + self._settings["lease_ttl"] / 6
                self._look_at_settings(lease)
            if lease.may_be_free():
                free_since = now if free_since is None else free_since
                if not self._may_start():
                    self._sleep(UNWANTED_SECONDS)
                    continue
                if now - free_since >= self._delay():
                    try:
                        taken = lease.try_acquire()
                    except (Held, OSError):
                        taken, free_since = False, None
                    if taken:
                        with contextlib.suppress(OSError):
                            successor.tell_taken()
                        self._places.leave()
                        return
            else:
                free_since = None
                self._ask(lease, successor)
            self._sleep(PAUSE)

    def check(self) -> bool:
        """While serving: raise Left if others should serve, or Over if the worker has ended.

        Return whether requests are to be read now, too.
        """
        self._check_worker()
        now = time.monotonic()
        if now < self._look_due:
            return False
        self._look_due = now + LOOK_SECONDS
        if not self.is_wanted():
            raise Left("stopped by the playbook stop.yml", False)
        if self._is_ending() and any(self._ends_later(other) for other in self._able()):
            raise Left("the walltime of job %s ends soon" % self._job, True)
        self._failures = 0
        return True

    def is_followed(self) -> bool:
        """Return whether another job can serve at once."""
        return bool(self._able())

    def failures(self) -> List[str]:
        """Return the jobs that could not run the server since it last ran."""
        return list((files.read_json(self._layout.state) or {}).get("failures") or [])

    def postpone(self) -> None:
        """Leave the next attempts to other jobs, since the server could not run in this one."""
        self._places.leave()
        self._failures += 1
        self._retry = time.monotonic() + RETRY_SECONDS * self._failures

    def is_wanted(self) -> bool:
        """Return whether the workers' jobs may start the server, as far as the file can be read."""
        self._wanted = bool((files.read_json(self._layout.wanted) or {}).get("wanted", self._wanted))
        return self._wanted

    def _has_place(self) -> bool:
        """Return whether we have a place, taking a free one. Near the end of the job, others have priority."""
        if self._is_ending() and self._places.others():
            self._places.leave()
            return False
        if self._places.mine:
            return self._places.renew(self._content())
        everywhere, self._slept = not self._slept, True
        if not self._places.take({"job": self._job, "host": socket.gethostname()}, everywhere):
            return False
        self._slept = False
        # Only active candidates ask the scheduler.
        left = time_left(self._settings, self._job)
        self._ends = None if left is None else time.time() + left
        self._check_ready()
        return True

    def _check_ready(self) -> None:
        """Check whether this host can serve, with the settings of now."""
        with contextlib.suppress(OSError):
            self._settings = read_settings(self._settings["root"])
        self._unfit = ""
        try:
            handover.check_ready(self._settings, self.parameters)
        except (Failed, OSError) as error:
            self._unfit = str(error)
            files.log("job %s on %s cannot serve: %s" % (self._job, socket.gethostname(), error))
        self._places.renew(self._content(), True)

    def _content(self) -> dict:
        return {"job": self._job, "host": socket.gethostname(), "ends": self._ends, "unfit": self._unfit}

    def _delay(self) -> float:
        """Return the seconds that we leave the free lease to others: the later its job ends, the rarer are moves."""
        mine = (self._ends or float("inf"), -self._places.mine)
        better = [each for each in self._able() if (each.get("ends") or float("inf"), -each["place"]) > mine]
        return STAGGER_SECONDS * len(better) + (UNFIT_SECONDS if self._unfit else 0.0)

    def _is_ending(self) -> bool:
        return self._ends is not None and time.time() > self._ends - self._settings["stop_notice"]

    def _able(self) -> List[dict]:
        """Return the active candidates of other jobs that can serve."""
        return [each for each in self._places.others() if each.get("unfit") == "" and each.get("job") != self._job]

    def _ends_later(self, other: dict) -> bool:
        ends = other.get("ends")
        return ends is None or ends > (self._ends or 0) + self._settings["stop_notice"]

    def _may_start(self) -> bool:
        return self.is_wanted() and len(self.failures()) < MOST_FAILURES

    def _look_at_settings(self, lease: Lease) -> None:
        """Notice what the playbook has changed; raise Over if the server has moved to a job of its own."""
        before = self._settings
        with contextlib.suppress(OSError):
            self._settings = read_settings(before["root"])
        last = lease.last()
        in_job = last.get("kind") == self._settings["scheduler"] and last.get("placement") != "workers"
        if self._settings["placement"] == "job" and in_job:
            raise Over("the server has a job of its own")
        if self._settings != before:
            self._check_ready()

    def _ask(self, lease: Lease, successor: handover.Successor) -> None:
        """Ask a server job to hand over, if the server no longer belongs there."""
        holder = lease.watched()
        if not holder or holder.get("placement") == "workers" or holder.get("kind") != self._settings["scheduler"]:
            return
        if time.monotonic() < self._refused_until or self._settings["placement"] != "workers":
            return
        if self._unfit or not self._places.is_first():
            return
        try:
            successor.ask(holder)
        except handover.Refused as refused:
            files.log("job %s: %s" % (self._job, refused))
            self._refused_until = time.monotonic() + REFUSED_SECONDS
        except OSError as error:
            files.log("job %s cannot ask for the lease: %s" % (self._job, error))

    def _check_worker(self) -> None:
        if self._beside and (self._started is None or processes.start_time(self._beside) != self._started):
            raise Over("the worker has ended")
        if self._door.wait(0):
            raise Over("the worker's script has ended")

    def _sleep(self, seconds: float) -> None:
        """Sleep, but notice the end of the worker."""
        limit = time.monotonic() + seconds
        while True:
            self._check_worker()
            left = limit - time.monotonic()
            if left <= 0 or self._door.wait(min(left, PAUSE) if self._beside else left):
                return

    def leave(self) -> None:
        """Leave our place."""
        self._places.leave()
