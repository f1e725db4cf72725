# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease: who may run postgres on the data directory.

``run/lease.N`` names the holder of epoch N; the highest N is the owner. ``hb.N`` is its heartbeat,
``released.N`` says that it stopped cleanly. Built on link(2) and rename(2), which every cluster file
system keeps atomic; flock is per client, or off, on several of them. Once taken, a lease is renewed and
released without space or inodes, which a quota may have used up.
"""

import contextlib
import errno
import os
import re
import socket
import time
import uuid
from typing import Callable, Optional

from . import files, processes

# NFS clients may show a file up to 60 s late (acregmax); a heartbeat must be missed for longer.
DEFAULT_TTL = 90.0
# What a contender needs for a moment only was left by one that was killed, if it is as old as this.
LEFTOVER_SECONDS = 3600.0
# How link(2) is refused where there are no hard links: vfat, exFAT, some FUSE and SMB mounts.
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Held(Exception):
    """Somebody else has the lease, and nothing says that they are gone."""

    def __init__(self, holder: dict, hint: str = "") -> None:
        self.holder = holder
        Exception.__init__(self, "the data directory is held by %s%s" % (describe(holder), hint))


class Unusable(Exception):
    """No lease can be taken on this file system; the message names the setting."""


class Lost(Exception):
    """The lease was taken over by another holder: stop at once."""


def describe(holder: dict) -> str:
    """Name a holder in one line: what it is, where, and since when."""
    if not holder:
        return "somebody whose lease file cannot be read"
    what = "job %s" % holder["job"] if holder.get("job") else "a short-lived server"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.get("since", 0)))
    return "%s on %s (PID %s) since %s" % (what, holder.get("host", "?"), holder.get("pid", "?"), since)


def can_be_asked(holder: dict, cluster: str) -> bool:
    """Tell whether anything here, and not only the user, can know that this holder has ended."""
    if holder.get("kind") == "bootstrap" and not holder.get("allocation"):
        return True  # its long silence tells
    if holder.get("cluster") != cluster:
        return False  # another scheduler's
    return holder.get("kind") != "local" or _is_here(holder)


def _is_here(holder: dict) -> bool:
    """Tell whether a holder is, or was before a reboot, on this machine."""
    if holder.get("host") == socket.gethostname():
        return True
    return any(word in processes.this_machine() for word in holder.get("machine") or [])


class Lease:
    """One contender's view of the lease in ``folder``.

    ``holder`` says who we are (host, pid, job, kind), and in ``silence`` for how many seconds the heartbeat
    has to stand still before others may take over, if that is longer than the TTL. ``ended`` is asked about the
    present holder when it is on another host: True if the scheduler says that its job has ended, False if not or
    unknown. It is asked about ``{}`` if nothing is known.
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

    def try_acquire(self) -> bool:
        """Take the lease if it is free; raise Held if it is not. False: another contender was faster."""
        newest = self._newest()
        beat = self._beat(newest)
        if newest and not self._is_free(newest):
            raise Held(self._read(self._newest()) or {})
        if not self._link(newest + 1):
            return False
        # A holder that slept may have renewed before it could see our link: then it goes on, and we do not.
        if self._beat(newest) != beat:
            files.remove(self._path("lease.%d" % (newest + 1)))
            return False
        self.epoch = newest + 1
        try:
            self.renew()
        except OSError:
            files.remove(self._path("lease.%d" % self.epoch))  # a holder whose heart never beats
            self.epoch = 0
            raise
        with contextlib.suppress(OSError):
            self._clean_up()
        return True

    def _link(self, epoch: int) -> bool:
        """Enter ourselves as the holder of a new epoch; False if another contender has, or had."""
        aside = self._path("contender.%s" % uuid.uuid4().hex)  # other hosts have our PID, too
        path = self._path("lease.%d" % epoch)
        refused = None  # type: Optional[OSError]
        files.write_json(aside, self._holder)
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
        except OSError as error:
            refused = error
        try:
            # Over NFS a link may be made and reported as failed: the link count tells.
            won = os.stat(aside).st_nlink == 2
        except FileNotFoundError:
            return False  # we slept so long that it was cleaned up
        files.remove(aside)
        if not won:
            self._check_links(refused, path)
        return won and self._newest() == epoch  # not so if we slept while others came and went

    def _check_links(self, refused: Optional[OSError], path: str) -> None:
        """Raise what has refused our link, if that is not another contender."""
        if refused and refused.errno not in NO_HARD_LINKS:
            raise refused
        uncounted = not refused and self._holder == files.read_json(path)
        if uncounted:
            files.remove(path)  # it names us, and nobody would ever know that we do not have it
        if refused or uncounted:
            raise Unusable(
                "instance_root: %s is on a file system without hard links%s; choose a folder on another one"
                % (os.path.dirname(self.folder), " (%s)" % refused.strerror if refused else "")
            )

    def acquire(self, patience: float, waiting: Callable[[Exception], None], pause: float = 1.0) -> None:
        """Take the lease, waiting up to ``patience`` seconds for whatever is in the way; raise that after them."""
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
        """Show that we live; raise Lost if somebody has taken over."""
        begun = self._clock()
        self._beats += 1
        self._write_beat()
        if not self.is_ours():
            raise Lost("the lease was taken by %s" % describe(self._read(self._newest()) or {}))
        self._renewed = begun

    def _write_beat(self) -> None:
        """Change the heartbeat, by one of three ways: whatever a reader sees of it, it has changed."""
        path = self._path("hb.%d" % self.epoch)
        text = "%-19d\n" % self._beats  # never longer than what it replaces
        try:
            files.write_atomically(path, text)
        except OSError:
            try:
                files.overwrite(path, text)
            except OSError:
                os.utime(path)  # some file systems refuse even that to who is over quota, since they copy on write

    def renew_if_due(self) -> None:
        """Renew six times within the TTL. Raise Lost, too, when that fails until others may take over."""
        still = self._clock() - self._renewed
        if still < self.ttl / 6:
            return
        try:
            self.renew()
        except OSError as error:
            if still >= self.ttl / 2:
                raise Lost("the lease was not renewed for %d s: %s" % (still, error)) from None

    def is_late(self) -> bool:
        """Tell whether half of the time is over after which others may take over. Reads no file."""
        return self._clock() - self._renewed >= self.ttl / 2

    def is_ours(self) -> bool:
        """Tell whether nobody has taken over since we acquired the lease."""
        return 0 < self.epoch == self._newest()

    def release(self) -> None:
        """Say that the data directory was left cleanly."""
        path = self._path("released.%d" % self.epoch)
        try:
            files.write_atomically(path, "")
        except OSError:
            os.rename(self._path("hb.%d" % self.epoch), path)  # takes no inode

    def holder(self) -> Optional[dict]:
        """Return who holds the lease now, nothing of whom may be known; None if it is free to take."""
        newest = self._newest()
        return None if not newest or self._is_released(newest) else self._read(newest) or {}

    def still(self) -> Optional[float]:
        """Return how many seconds ago the holder's heart beat, by our clock and its file's; None if never."""
        try:
            return max(0.0, time.time() - os.stat(self._path("hb.%d" % self._newest())).st_mtime)
        except OSError:
            return None

    def beat(self) -> str:
        """Return what changes with each heartbeat of the holder; "" if there is none."""
        return self._beat(self._newest())

    def _is_free(self, epoch: int) -> bool:
        holder = self._read(epoch) or {}
        if self._is_released(epoch):
            return True
        if holder.get("place") == self._holder["place"]:
            return processes.start_time(holder["pid"]) != holder["start"]
        # Still before and after the question, which takes a while and is not asked every second.
        silence = self.silence(holder)
        return self._stands_still(epoch, silence) and self._ended(holder) and self._stands_still(epoch, silence)

    def silence(self, holder: dict) -> float:
        """Return for how long the heartbeat must stand still; the holder may have another TTL than we have."""
        mine, its = self._holder, holder.get("place", "")
        if holder.get("host") == mine.get("host") and its.split(" ")[0] != mine["place"].split(" ")[0]:
            return self.ttl  # from before a reboot of this host
        return max(self.ttl, float(holder.get("silence", 0)))

    def _stands_still(self, epoch: int, seconds: float) -> bool:
        """Tell whether the heartbeat has not moved for so long, on our own clock: clocks differ."""
        beat = self._beat(epoch)
        if (epoch, beat) != self._seen[:2]:
            self._seen = (epoch, beat, self._clock())
        return self._clock() - self._seen[2] > seconds

    def _beat(self, epoch: int) -> str:
        """Return what changes with each heartbeat, be it cut off or half written."""
        try:
            with open(self._path("hb.%d" % epoch), "rb") as stream:
                return "%r %d" % (stream.read(), os.fstat(stream.fileno()).st_mtime_ns)
        except OSError:
            return ""

    def _is_released(self, epoch: int) -> bool:
        return os.path.exists(self._path("released.%d" % epoch))

    def _newest(self) -> int:
        epochs = [re.match(r"lease\.(\d+)$", name) for name in os.listdir(self.folder)]
        return max([int(match.group(1)) for match in epochs if match] or [0])

    def _read(self, epoch: int) -> Optional[dict]:
        return files.read_json(self._path("lease.%d" % epoch))

    def _clean_up(self) -> None:
        """Remove the files of epochs before the last one, and what contenders that were killed left behind."""
        for name in os.listdir(self.folder):
            match = re.match(r"(?:lease|hb|released)\.(\d+)$", name)
            if match and int(match.group(1)) < self.epoch - 1 or self._is_leftover(name):
                files.remove(self._path(name))

    def _is_leftover(self, name: str) -> bool:
        if not re.match(r"contender\.|\.(?:contender|hb|released)\.", name):
            return False
        try:
            # By the file system's clock, not ours. One with a second link is a lease.
            found, beat = os.lstat(self._path(name)), os.lstat(self._path("hb.%d" % self.epoch))
        except FileNotFoundError:
            return False
        return found.st_nlink == 1 and beat.st_mtime - found.st_mtime > LEFTOVER_SECONDS

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)
