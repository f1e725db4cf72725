# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease: only its holder may run postgres on the data directory.

``run/lease.N`` names the holder of epoch N; the highest N is the current one. ``hb.N`` is its heartbeat;
``released.N``, or the heartbeat "released", means that it stopped cleanly. The implementation uses link(2) and
rename(2), which are atomic on every cluster file system; flock works only per client, or not at all, on several of
them. Once taken, a lease can be renewed and released without free space or inodes, which a quota may have used up.
"""

import contextlib
import errno
import os
import re
import socket
import time
import uuid
from typing import Callable, Optional, Tuple  # noqa: F401 - Tuple in a type comment

from . import files, processes

# NFS clients may see a change of a file up to 60 s late (acregmax); the TTL must be longer.
DEFAULT_TTL = 90.0
# A contender's temporary files exist only for a moment; if they are older than this, the contender was killed.
LEFTOVER_SECONDS = 3600.0
# The text of the last heartbeat, after the data directory was left.
RELEASED = "released"
# Errors of link(2) on file systems without hard links: vfat, exFAT, some FUSE and SMB mounts.
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Held(Exception):
    """Another holder has the lease, and is not known to have ended."""

    def __init__(self, holder: dict, hint: str = "") -> None:
        self.holder = holder
        Exception.__init__(self, "the data directory is held by %s%s" % (describe(holder), hint))


class Unusable(Exception):
    """The file system does not support leases; the message names the setting."""


class Lost(Exception):
    """Another holder has the lease, or may take it over: stop at once."""


def describe(holder: dict) -> str:
    """Return one line about a holder: its kind, place and start time."""
    if not holder:
        return "an unknown holder, whose lease file cannot be read"
    what = "job %s" % holder["job"] if holder.get("job") else "a temporary server"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.get("since", 0)))
    return "%s on %s (PID %s) since %s" % (what, holder.get("host", "?"), holder.get("pid", "?"), since)


def can_be_asked(holder: dict, cluster: str) -> bool:
    """Return whether this program, and not only the user, can find out that a holder has ended."""
    if holder.get("kind") == "bootstrap" and not holder.get("allocation"):
        return True  # its long silence decides
    if holder.get("cluster") != cluster:
        return False  # another scheduler's job
    return holder.get("kind") != "local" or _is_here(holder)


def _is_here(holder: dict) -> bool:
    """Return whether a holder runs on this machine, or ran here before a reboot."""
    if holder.get("host") == socket.gethostname():
        return True
    return any(word in processes.this_machine() for word in holder.get("machine") or [])


class Lease:
    """One contender's view of the lease in ``folder``.

    ``holder`` describes us (host, pid, job, kind); its ``silence`` is the time in seconds without a heartbeat after
    which others may take over, if that is longer than the TTL. ``ended`` is called with the current holder if that is
    on another host, or with ``{}`` if nothing is known about it. It returns True if the scheduler reports that the
    holder's job has ended; False if not, or if that is unknown.
    """

    def __init__(
        self,
        folder: str,
        holder: dict,
        ended: Callable[[dict], bool],
        ttl: float = DEFAULT_TTL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.ttl = ttl
        self.epoch = 0
        #: The holder before us; empty if there was none.
        self.previous = {}  # type: dict
        self._clock = clock
        self._ended = ended
        self._holder = dict({"silence": ttl}, **holder)
        self._holder.update(
            place=processes.this_host(), machine=processes.this_machine(),
            start=processes.start_time(holder["pid"]), since=time.time(),
        )
        self._beats = 0
        self._renewed = clock()
        self._seen = (0, "", clock())
        self._known = (0, {})  # type: Tuple[int, dict]

    def try_acquire(self) -> bool:
        """Take the lease if it is free, else raise Held. Return False if another contender was faster."""
        newest = self._newest()
        beat = self._beat(newest)
        if newest and not self._is_free(newest):
            raise Held(self._read(self._newest()) or {})
        if not self._link(newest + 1):
            return False
        # A holder that was frozen may have renewed before it could see our link: then it keeps the lease.
        if self._beat(newest) != beat:
            files.remove(self._path("lease.%d" % (newest + 1)))
            return False
        self.epoch, self.previous = newest + 1, self._read(newest) or {}
        try:
            self.renew()
        except OSError:
            files.remove(self._path("lease.%d" % self.epoch))  # else a holder without any heartbeat
            self.epoch = 0
            raise
        with contextlib.suppress(OSError):
            self._clean_up()
        return True

    def _link(self, epoch: int) -> bool:
        """Try to become the holder of a new epoch; return False if another contender is or was."""
        aside = self._path("contender.%s" % uuid.uuid4().hex)  # a PID is not unique across hosts
        path = self._path("lease.%d" % epoch)
        refused = None  # type: Optional[OSError]
        counted = aside
        files.write_json(aside, self._holder)
        try:
            os.link(aside, path)
            counted = path  # its attributes are new, those of the other name may be cached
        except FileExistsError:
            pass
        except OSError as error:
            refused = error
        try:
            # On NFS, link(2) may report an error although it succeeded: check the link count.
            won = os.stat(counted).st_nlink == 2
        except FileNotFoundError:
            return False  # we were frozen so long that others removed the file
        files.remove(aside)
        if not won:
            self._check_links(refused, path)
        return won and self._newest() == epoch  # false if we were frozen while others held the lease

    def _check_links(self, refused: Optional[OSError], path: str) -> None:
        """Raise the reason why our link failed, unless it is another contender."""
        if refused and refused.errno not in NO_HARD_LINKS:
            raise refused
        uncounted = not refused and self._holder == files.read_json(path)
        if uncounted:
            files.remove(path)  # it names us, so others would take us for the holder
        if refused or uncounted:
            raise Unusable(
                "instance_root: %s is on a file system without hard links%s; choose a folder on another one"
                % (os.path.dirname(self.folder), " (%s)" % refused.strerror if refused else "")
            )

    def acquire(self, patience: float, waiting: Callable[[Exception], None], pause: float = 1.0) -> None:
        """Take the lease, waiting up to ``patience`` seconds; then raise Held, or the error that prevents it."""
        limit = self._clock() + patience
        while True:
            try:
                if self.try_acquire():
                    return
                refused = Held(self.holder() or {})  # type: Exception
            except (Held, OSError) as error:
                refused = error
            if self._clock() >= limit:
                raise refused
            waiting(refused)
            time.sleep(pause)

    def renew(self) -> None:
        """Write a heartbeat; raise Lost if another holder has taken over."""
        begun = self._clock()
        self._beats += 1
        self._write_beat()
        if not self.is_ours():
            raise Lost("the lease was taken by %s" % describe(self._read(self._newest()) or {}))
        self._renewed = begun

    def _write_beat(self) -> None:
        """Change the heartbeat file in one of three ways; readers notice any change, also a partial one."""
        path = self._path("hb.%d" % self.epoch)
        text = "%-19d\n" % self._beats  # always the same length
        try:
            files.write_atomically(path, text)
        except OSError:
            try:
                files.overwrite(path, text)
            except OSError:
                os.utime(path)  # copy-on-write file systems may refuse even overwriting over quota

    def renew_if_due(self) -> None:
        """Renew six times within the TTL. Raise Lost also if renewals have failed for half of the TTL."""
        still = self._clock() - self._renewed
        if still < self.ttl / 6:
            return
        try:
            self.renew()
        except OSError as error:
            if still >= self.ttl / 2:
                raise Lost("the lease was not renewed for %d s: %s" % (still, error)) from None

    def is_late(self) -> bool:
        """Return whether the last renewal is half of the TTL ago. Reads no file."""
        return self._clock() - self._renewed >= self.ttl / 2

    def is_ours(self) -> bool:
        """Return whether we hold the lease, and no other holder has taken over."""
        return 0 < self.epoch == self._newest()

    def release(self) -> None:
        """Record that the data directory was left cleanly, so that others may take the lease at once.

        The heartbeat says so, too: other hosts may cache for a minute that the file ``released.N`` does not exist.
        """
        with contextlib.suppress(OSError):
            files.overwrite(self._path("hb.%d" % self.epoch), RELEASED.ljust(19) + "\n")
        path = self._path("released.%d" % self.epoch)
        try:
            files.write_atomically(path, "")
        except OSError:
            os.rename(self._path("hb.%d" % self.epoch), path)  # needs no inode

    def holder(self) -> Optional[dict]:
        """Return the current holder, {} if nothing is known about it; None if the lease is free."""
        newest = self._newest()
        return None if not newest or self._is_released(newest) else self._read(newest) or {}

    def last(self) -> dict:
        """Return the current or last holder; empty if there was none."""
        return self._read(self._newest()) or {}

    def watched(self) -> dict:
        """Return the holder that ``may_be_free`` has found, without reading a file; empty if there is none."""
        return self._known[1] if self._known[0] == self._seen[0] else {}

    def still(self) -> Optional[float]:
        """Return the seconds since the holder's last heartbeat, by our clock and the file's time; None if never."""
        try:
            return max(0.0, time.time() - os.stat(self._path("hb.%d" % self._newest())).st_mtime)
        except OSError:
            return None

    def beat(self) -> str:
        """Return a text that changes with each heartbeat of the holder; "" if there is no heartbeat."""
        return self._beat(self._newest())

    def is_silent(self, seconds: float) -> bool:
        """Return whether we have watched the holder for this long without a heartbeat."""
        return self._stands_still(self._newest(), seconds)

    def may_be_free(self) -> bool:
        """Return whether try_acquire may succeed. Usually reads one file, so that it can be called every second."""
        may = self._may_be_free(self._seen[0])
        if may:
            self._stands_still(self._newest(), 0)  # watch the newest holder from now on
        return may

    def _may_be_free(self, epoch: int) -> bool:
        beat = self._beat(epoch) if epoch else ""
        if not beat or RELEASED in beat:
            return True
        if self._known[0] != epoch or not self._known[1]:
            self._known = (epoch, self._read(epoch) or {})
        holder = self._known[1]
        if holder.get("place") == self._holder["place"]:
            return processes.start_time(holder["pid"]) != holder["start"]
        return not holder or self._stands_still(epoch, self.silence(holder), beat)

    def _is_free(self, epoch: int) -> bool:
        holder = self._read(epoch) or {}
        if self._is_released(epoch):
            return True
        if holder.get("place") == self._holder["place"]:
            return processes.start_time(holder["pid"]) != holder["start"]
        # Check before and after the query, which takes a while. Checking first also avoids a query every second.
        silence = self.silence(holder)
        return self._stands_still(epoch, silence) and self._ended(holder) and self._stands_still(epoch, silence)

    def silence(self, holder: dict) -> float:
        """Return the seconds without a heartbeat after which a takeover is allowed; the holder's TTL may differ."""
        mine, its = self._holder, holder.get("place", "")
        if holder.get("host") == mine.get("host") and its.split(" ")[0] != mine["place"].split(" ")[0]:
            return self.ttl  # from before a reboot of this host
        return max(self.ttl, float(holder.get("silence", 0)))

    def _stands_still(self, epoch: int, seconds: float, beat: Optional[str] = None) -> bool:
        """Return whether there was no heartbeat for this long, measured by our own clock, since clocks differ."""
        beat = self._beat(epoch) if beat is None else beat
        if (epoch, beat) != self._seen[:2]:
            self._seen = (epoch, beat, self._clock())
        return self._clock() - self._seen[2] > seconds

    def _beat(self, epoch: int) -> str:
        """Return a text that changes with each heartbeat, also if the file is truncated or half written."""
        try:
            with open(self._path("hb.%d" % epoch), "rb") as stream:
                return "%r %d" % (stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
        except OSError:
            return ""

    def _is_released(self, epoch: int) -> bool:
        if os.path.exists(self._path("released.%d" % epoch)):
            return True
        try:
            with open(self._path("hb.%d" % epoch), "rb") as stream:
                return stream.read().startswith(RELEASED.encode())
        except OSError:
            return False

    def _newest(self) -> int:
        epochs = [re.match(r"lease\.(\d+)$", name) for name in os.listdir(self.folder)]
        return max([int(match.group(1)) for match in epochs if match] or [0])

    def _read(self, epoch: int) -> Optional[dict]:
        return files.read_json(self._path("lease.%d" % epoch))

    def _clean_up(self) -> None:
        """Remove the files of epochs before the previous one, and leftovers of contenders that were killed."""
        for name in os.listdir(self.folder):
            match = re.match(r"(?:lease|hb|released)\.(\d+)$", name)
            if match and int(match.group(1)) < self.epoch - 1 or self._is_leftover(name):
                files.remove(self._path(name))

    def _is_leftover(self, name: str) -> bool:
        if not re.match(r"contender\.|\.(?:contender|hb|released)\.", name):
            return False
        try:
            # Compare by the file system's clock, not ours. A file with a second link is a lease.
            found, beat = os.lstat(self._path(name)), os.lstat(self._path("hb.%d" % self.epoch))
        except FileNotFoundError:
            return False
        return found.st_nlink == 1 and beat.st_mtime - found.st_mtime > LEFTOVER_SECONDS

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)
