# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor: it holds the lease, runs postgres, and publishes the endpoint.

    python3 -m hpc_db_host serve --root ROOT       in the server job
    python3 -m hpc_db_host candidate --root ROOT   in a worker's job: serve whenever no other job does
    python3 -m hpc_db_host leave --root ROOT       end the candidate of this job
    python3 -m hpc_db_host bootstrap --root ROOT   a temporary server on a socket, without a job
    python3 -m hpc_db_host upgrade --root ROOT --settings FILE   move to another major version; prints a summary
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Iterator, List, Optional, Sequence  # noqa: F401 - List in a type comment

from . import endpoint, events, files, handover, local_job, scheduler
from .candidate import FOLLOWS, JOB_FOLLOWS, MOST_FAILURES, NICENESS, Candidate, Door, Left, Over
from .dumps import Dumps
from .engines import Engine, engines_of  # noqa: F401 - Engine in a type comment
from .health import Health, space
from .keeper import Keeper
from .layout import Layout
from .lease import Held, Lease, Lost, Unusable, can_be_asked
from .postgres import Failed, Postgres, check_programs
from .scheduler import Queue
from .settings import read_settings
from .threads import STOP_SIGNALS, Repeat, signals_waiting
from .upgrade import Upgrade

SERVING = "it accepts writes"
# Crashes of postgres that are further apart than this are unrelated.
DEATHS_COUNT_SECONDS = 600.0
# Maximum seconds between a crash and the restart; doubled from 1 after each crash. Workers wait meanwhile.
LONGEST_PAUSE = 4.0
# Maximum seconds between two checks whether the successor is still in the queue, before and after it may begin.
FOLLOW_SECONDS = 900.0
FOLLOW_OFTEN_SECONDS = 60.0
# Tolerance: the scheduler counts in minutes, from a start before this program's.
EARLY_SECONDS = 90.0
# Seconds that a successor has to take the lease that was released for it.
TAKE_SECONDS = 15.0
# Seconds between two queries whether the holder's job has ended.
ASK_SECONDS = 3.0
# Seconds to wait for the scheduler while the job ends.
LAST_LOOK_SECONDS = 5.0
# Maximum seconds for a dump while the job is being ended: a scheduler kills it after half a minute.
LAST_DUMP_SECONDS = 8.0
# The exit code after which candidate.sh starts a candidate again, like that after a kill.
RESTART = 137
# The signals that end a candidate. The others are a user's, for all steps of a job.
CANDIDATE_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Maximum seconds until a candidate has left its job.
LEAVE_SECONDS = 120.0
# Added to a message if the scheduler and the holder contradict each other.
CUT_OFF = "; its job has ended, but its heartbeat continues: its node may be cut off"
# Added to a message if only the user can know whether the holder has ended.
ASK_THE_USER = "; this host cannot check whether it has ended: if it has, run the playbook break_lease.yml"
# Seconds until the next attempt to publish the endpoint.
PUBLISH_SECONDS = 5.0

# How many TTLs a temporary server must be without a heartbeat before it is replaced. No scheduler knows whether it has
# ended, and its program may be frozen for minutes, by a login node that swaps or a file system that fails over.
SILENT_TTLS = 5

# A temporary server runs on a login node, where it must use less memory than on a compute node.
BOOTSTRAP_PARAMETERS = {"shared_buffers": "32MB", "max_connections": "20", "max_wal_size": "256MB"}


class Stop(Exception):
    """The program was asked to stop; the message says by what."""

    def __init__(
        self, why: str, planned: bool = False, successor: Optional[dict] = None, again: bool = False
    ) -> None:
        Exception.__init__(self, why)
        self.planned = planned
        #: The request of the job that takes over, while both run.
        self.successor = successor
        #: Whether a candidate waits for its next turn.
        self.again = again or bool(successor)


# The first request to stop. The signal handler raises it anywhere in the code, where another exception may replace it,
# such as an error from closing a file. So it is kept here, and has priority over everything except a lost lease.
_told_to_stop = []  # type: List[Stop]


class Host:
    """The supervisor of one instance directory."""

    def __init__(self, root: str, bootstrap: bool, candidate: Optional[Candidate] = None) -> None:
        self.settings = read_settings(root)
        self.layout = Layout(root)
        self.bootstrap = bootstrap
        self._candidate = candidate
        self._allocation = scheduler.own_job(self.settings["scheduler"])
        self.job = "" if bootstrap else self._allocation or str(os.getpid())
        self._begun = time.monotonic()
        self._told = ""
        self._told_follows = None  # type: Optional[dict]
        self._changed = 0.0
        self._followed = ""
        self._alone = ""
        self._trouble = ""
        self._unpublished = ""
        self._publish_due = 0.0
        self._undone = []  # type: List[str]
        self._clean = True
        #: Whether a successor has not taken the lease that was released for it.
        self._returns = False
        #: Whether a server of this job has accepted writes.
        self._has_served = False
        self._ask_due = 0.0
        #: Why this host cannot serve; empty if it can, None if that is not checked.
        self._unfit = None  # type: Optional[str]
        self._dumps = None  # type: Optional[Dumps]
        self._engines = []  # type: List[Engine]
        self._lease = None  # type: Optional[Lease]
        self._queue = None  # type: Optional[Queue]
        self._predecessor = None  # type: Optional[handover.Predecessor]
        self._successor = None  # type: Optional[handover.Successor]
        #: Whether the server is to run in the workers' jobs, and which of them could not start it since it last ran.
        self._belongs_to_workers = self.settings["placement"] == "workers" and not bootstrap
        self._failures = []  # type: List[str]
        #: Whether no other worker's job may start the server.
        self._is_stopped = False
        if self.settings["chain"] and not bootstrap and not candidate:
            self._queue = Queue(self.settings, self.job)
        if not bootstrap and not candidate:
            self._successor = handover.Successor(self.layout, self.job)

    def serve(self, patience: float, lifetime: Optional[float]) -> None:
        """Serve until asked to stop, or for ``lifetime`` seconds; raise the reason for the end."""
        if not self._candidate:
            self._address()  # report a host name that cannot be resolved before anything starts
        try:
            self._serve_in_turns(patience, lifetime)
        finally:
            ignore_signals()
            with contextlib.suppress(OSError, ValueError):
                files.remove(self.layout.stop_request(self.job))

    def _serve_in_turns(self, patience: float, lifetime: Optional[float]) -> None:
        """Serve; continue if a successor asks for the lease but does not take it."""
        left = None  # type: Optional[Stop]
        while True:
            try:
                with self._leased(patience) as keeper:
                    left, self._returns = None, False
                    self._keep_serving(keeper, lifetime)
            except Stop as stopped:
                if not (stopped.successor and self._clean) or self._is_taken(stopped.successor):
                    raise
                left, self._returns = stopped, True
                self._lease, self._successor, patience = None, None, self.settings["lease_ttl"]
                self._trouble = ", but job %s on %s did not take over" % (
                    stopped.successor["job"], stopped.successor["host"])
                del _told_to_stop[:]
            except Held as held:
                raise (left or held) from None  # after a hand-over, the successor was late

    def _is_taken(self, request: dict) -> bool:
        """Wait for a successor; return whether it has taken the released lease."""
        limit = time.monotonic() + TAKE_SECONDS
        while time.monotonic() < limit:
            time.sleep(0.5)
            if _told_to_stop[1:]:  # also asked to stop by a signal
                return True
            with contextlib.suppress(OSError):
                if self._predecessor and self._predecessor.is_taken(request):
                    return True
                if self._lease and not self._lease.is_ours():
                    return True
        return False

    def upgrade(self, patience: float, following: str, back: bool) -> dict:
        """Move to the settings in the file ``following``, with another major version; return the summary."""
        with self._leased(patience) as keeper:
            return Upgrade(self.settings, following, keeper).run(back)

    @contextlib.contextmanager
    def _leased(self, patience: float) -> Iterator[Keeper]:
        """Hold the lease during the block; release it after a clean end."""
        ttl = self.settings["lease_ttl"]
        holder = {
            "host": socket.gethostname(), "pid": os.getpid(), "job": self.job, "kind": self._kind(),
            "cluster": self.settings["cluster"], "scheduler": self.settings["scheduler"],
            "allocation": self._allocation, "silence": ttl * (SILENT_TTLS if self.bootstrap else 1),
        }
        if self._candidate:
            holder.update(placement="workers", run=own_run())
        lease = Lease(self.layout.run, holder, self._is_known_to_have_ended, ttl)
        self.tell("starting", "requesting the lease")
        try:
            if self._candidate:
                self._candidate.acquire(lease)
            else:
                self._acquire(lease, patience)
            self._lease = lease
            self._succeed(lease.previous)
        except BaseException:
            if lease.epoch:  # a signal came after we had taken it
                with contextlib.suppress(OSError):
                    lease.release()
            raise
        with Keeper(lease) as keeper:
            try:
                # The previous holder may have moved the studies to another data directory.
                self.settings = read_settings(self.settings["root"])
                if self._candidate:
                    self._begin_beside_worker(self._candidate)
                yield keeper
            except BaseException as ended:
                if not (isinstance(ended, Stop) and ended.successor):  # else this job may have to serve on
                    ignore_signals()
                keeper.check()  # without the lease, do not release it or change the queue
                if self._candidate:
                    if isinstance(ended, (Failed, OSError)):
                        self._failures = sorted({*self._failures, self.job})
                        self.tell("failed", str(ended))
                    self.forget_local_job()
                if self._clean:  # else the next holder waits until the scheduler reports our end
                    with signals_waiting():
                        self._release(keeper)
                if isinstance(ended, Failed):
                    self._end_chain()
                raise
            self._release(keeper)

    def _begin_beside_worker(self, candidate: Candidate) -> None:
        """Become the server of the instance, after this process was one of many candidates."""
        with contextlib.suppress(OSError):
            log_to(self.layout.job_log)
        if self._kind() == "local":
            with self._only_told("cannot record this process as the server's"):
                local_job.record(self.settings["job_name"], os.getpid())
        self._failures = candidate.failures()
        self._is_stopped = not candidate.is_wanted()
        if self._is_stopped:
            raise Stop("stopped by the playbook stop.yml", again=True)

    def _succeed(self, previous: dict) -> None:
        """Begin as the successor of the previous holder."""
        if self._successor:
            with contextlib.suppress(OSError):
                self._successor.tell_taken()
        if not self._queue or previous.get("kind") != self._kind() or previous["job"] == self.job:
            return
        self._queue.predecessor = previous["job"]
        with contextlib.suppress(OSError, ValueError):
            files.remove(self.layout.stop_request(previous["job"]))  # left if that job was killed

    def _release(self, keeper: Keeper) -> None:
        with self._only_told("cannot release the lease"):
            keeper.release()

    @contextlib.contextmanager
    def _only_told(self, what: str) -> Iterator[None]:
        """Log an error during the shutdown without replacing the reason for the shutdown."""
        try:
            yield
        except (Lost, Stop):
            raise
        except Exception as error:
            self._undone.append("%s: %s" % (what, error))
            files.log(self._undone[-1])

    def _acquire(self, lease: Lease, patience: float) -> None:
        """Wait for the lease: up to ``patience`` seconds, or longer if no other job may be left to serve.

        That is so if the holder's node seems to be cut off: the scheduler has given it up and started us, but postgres
        still runs there, and ends at the latest when the node is reachable again. It is also so if the holder's
        heartbeat has stopped: its node may have failed, which the scheduler notices minutes later.
        """
        def wait(refused: Exception) -> None:
            if self._returns and isinstance(refused, Held):
                raise refused  # the successor was late
            silent = hint
            if asks and isinstance(refused, Held) and self._may_ask(refused.holder):
                self._ask(refused.holder)
            if isinstance(refused, Held) and not hint:
                silent = silence(refused.holder, lease.silence(refused.holder), self._can_be_asked(refused.holder))
            self.tell("starting", "waiting: %s%s" % (in_words(refused), silent))

        hint, asks = "", True
        pause = 0.25 if self._queue else 1.0
        is_job = not self.bootstrap and bool(scheduler.own_job(self._kind()))
        while True:
            try:
                return lease.acquire(patience, wait, pause)
            except handover.Refused as refused:
                holder = lease.holder() or {}
                if not (is_job and self._has_ended(holder)):
                    if self._unfit:
                        raise Failed("cannot take over: %s; %s" % (self._unfit, refused)) from None
                    raise Held(holder, "; %s" % refused) from None
                hint, asks = CUT_OFF, False
                self._follow()
            except Held as held:
                asks = True  # again
                if self._returns:
                    raise
                if is_job and self._has_ended(held.holder):
                    hint = CUT_OFF
                elif is_job and self._may_ask(held.holder) and lease.is_silent(self.settings["lease_ttl"] / 2):
                    hint = "; its heartbeat has stopped, but its job has not ended: its node may have failed"
                elif self._successor and self._successor.is_accepted:
                    continue  # its last dump takes long
                else:
                    # the holder may still run, or we are not a job of the scheduler
                    raise Held(held.holder, "" if self._can_be_asked(held.holder) else ASK_THE_USER) from None
                self._follow()  # our walltime may end before that
            except OSError as error:
                if not is_job or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise Failed(in_words(error)) from None
                self._follow()  # else no job would be left when there is space again
                time.sleep(1.0)

    def _may_ask(self, holder: dict) -> bool:
        """Return whether the holder is another job of this chain, which hands over."""
        if not self._queue and holder.get("placement") != "workers":
            return False
        return self._successor is not None and holder.get("kind") == self._kind() and self._can_be_asked(
            holder) and holder.get("job") not in ("", self.job)

    def _ask(self, holder: dict) -> None:
        """Ask the holder for the lease, or tell it why this host cannot serve; raise Refused if it keeps the lease."""
        if not self._successor:
            return
        if self._unfit is None:
            self._unfit = ""
            try:
                handover.check_ready(self.settings)
            except (Failed, OSError) as error:
                self._unfit = str(error)
        if self._queue:
            self._queue.predecessor = holder["job"]
        with contextlib.suppress(OSError):
            self._successor.ask(holder, self._unfit)

    def _keep_serving(self, keeper: Keeper, lifetime: Optional[float]) -> None:
        """Run postgres, and restart it after a crash. The restarts are limited, since the cause may be permanent."""
        limit = 0 if self.bootstrap else self.settings["restarts"]
        deaths = []  # type: List[float]
        check_programs(self.settings)
        if self._candidate:
            self._address()
        with contextlib.ExitStack() as beside:
            if self._queue:
                beside.enter_context(Repeat(0.0, self._follow_once_served))
            while True:
                try:
                    self._serve_once(keeper, lifetime)
                except (Failed, OSError) as died:
                    keeper.check()
                    if _told_to_stop:
                        raise _told_to_stop[0] from None
                    now = time.monotonic()
                    deaths = [death for death in deaths if now - death < DEATHS_COUNT_SECONDS] + [now]
                    if len(deaths) > limit:
                        raise Failed(str(died)) from None
                    pause = min(2.0 ** (len(deaths) - 1), LONGEST_PAUSE)
                    self.tell("starting", "postgres restarts: %s" % died, "restart", str(died))
                    self._sleep(keeper, pause)
                full = space(self.settings["data"])
                while full:
                    # Recovery also writes: without space, postgres would only crash again.
                    self.tell("unhealthy", full)
                    self._sleep(keeper, 2.0)
                    full = space(self.settings["data"])

    def _sleep(self, keeper: Keeper, seconds: float) -> None:
        """Sleep; raise Lost if the lease is lost meanwhile."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            self._check(keeper)
            time.sleep(0.5)

    def _check(self, keeper: Keeper) -> None:
        """Raise Lost without the lease, and Stop if others should serve."""
        keeper.check()
        if self._candidate:
            self._check_candidate(self._candidate)

    def _serve_once(self, keeper: Keeper, lifetime: Optional[float]) -> None:
        """Run postgres until it ends or has to stop; raise the reason. No process of postgres is left afterwards."""
        postgres = None
        try:
            self.tell("starting", "postgres is starting", "start")
            parameters = BOOTSTRAP_PARAMETERS if self.bootstrap else {}
            if self._candidate:
                parameters = self._candidate.parameters
            postgres = Postgres(self.settings, not self.bootstrap, keeper, parameters)
            postgres.start()
            with self._only_told("cannot remove the previous holder's endpoint"):
                self._withdraw()
            postgres.wait_for_write(self.settings["start_patience"], lambda: self._check(keeper))
            if not self.bootstrap:
                with self._only_told("cannot renew the workers' heartbeats"):
                    postgres.renew_heartbeats(self.settings["databases"])
                self._engines = engines_of(self.settings, postgres, self._address())
            self._publish(postgres)
            self._failures = []
            self.tell("serving", SERVING)
            self._watch(postgres, keeper, lifetime)
        except Stop as stop:
            if stop.planned and postgres:
                why = str(stop) if self._candidate else "the walltime ends soon"
                self._prepare_to_move(postgres, keeper, why, "walltime", self.settings["stop_notice"] / 4)
            elif self._candidate and not stop.again and postgres:
                self._prepare_to_move(postgres, keeper, str(stop), "walltime", LAST_DUMP_SECONDS)
            raise
        finally:
            with signals_waiting():
                self._leave(postgres)

    def _prepare_to_move(self, postgres: Postgres, keeper: Keeper, why: str, event: str, patience: float) -> None:
        """Make a dump and a checkpoint before a planned stop, so that it is quick; workers continue meanwhile.

        The server may move between the workers' jobs every few minutes, which needs no dump each time.
        """
        self.tell("stopping", why, event)
        only_moves = self._candidate is not None and self._candidate.is_followed()
        if self._dumps and not (only_moves and self._dumps.are_recent()):
            with self._only_told("cannot dump the studies"):
                self._dumps.now(patience, keeper.check)
        with self._only_told("cannot make a checkpoint"):
            postgres.query("CHECKPOINT", 15)

    def _leave(self, postgres: Optional[Postgres]) -> None:
        """Drain the connections and stop postgres, even if the endpoint cannot be removed."""
        self._clean = False  # until postgres has ended cleanly
        self._undone = []
        ours = False
        try:
            self.tell("stopping", "postgres is stopping")
            with self._only_told("the endpoint is not withdrawn"):
                ours = self._lease is not None and self._lease.is_ours()  # else the endpoint belongs to the next holder
                if ours:
                    self._withdraw()
            if ours and postgres:
                drain(postgres, self.settings["drain_seconds"])
        finally:
            for engine in self._engines:
                with self._only_told("cannot stop %s" % engine.name):
                    engine.stop()
            self._clean = postgres is None or postgres.stop(self.settings["stop_patience"])
            # No process is left. The scheduler reports the end of a server job, but a worker's job continues.
            self._clean |= self._candidate is not None

    def _end_chain(self) -> None:
        """Cancel the successors: they would fail as well, one after the other, for ever."""
        if self._queue:
            with self._only_told("cannot cancel the successors"):
                self._queue.cancel_successors()

    def tell(self, state: str, reason: str, event: str = "", cause: str = "") -> None:
        """Log a change of state, record it as an event, and write it to state.json if the lease is ours.

        The file also describes the next server job, for waiting workers. A temporary server only logs the change.
        """
        if self._candidate and not self._lease:
            return  # one of many that wait
        follows = self._queue.successor if self._queue else None
        if self._belongs_to_workers or self._candidate:
            goes_on = not self._is_stopped and len(self._failures) < MOST_FAILURES
            follows = (FOLLOWS if self._belongs_to_workers else JOB_FOLLOWS) if goes_on else None
        elif self._queue and not follows and state == "starting":
            follows = {"id": self.job, "told": "job %s is starting on %s" % (self.job, socket.gethostname())}
        is_new = state + reason != self._told
        if not is_new and follows == self._told_follows:
            return
        self._told, self._told_follows = state + reason, follows
        now = time.time()
        if is_new:
            self._changed = now
            files.log("%s %s: %s" % (time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now)), state, reason))
        if self.bootstrap:
            return
        content = {"state": state, "reason": reason, "job": self.job, "host": socket.gethostname()}
        try:
            if is_new:
                events.append(self.settings["root"], dict(content, time=now, event=event, cause=cause))
        except (OSError, ValueError) as error:
            files.log("cannot write events.jsonl: %s" % error)
        try:
            if self._lease and self._lease.is_ours():
                lease = {"epoch": self._lease.epoch, "ttl": self._lease.ttl}
                found = dict(content, since=self._changed, follows=follows, lease=lease, failures=self._failures)
                files.write_state(self.layout.state, found)
        except (OSError, ValueError) as error:
            files.log("cannot write state.json: %s" % error)

    def tell_end(self, state: str, reason: object) -> None:
        """Report the reason for the end, the errors during the shutdown, and the next server job."""
        self._belongs_elsewhere()
        if self._queue and self._lease:
            self._queue.look(LAST_LOOK_SECONDS)
        elif self._queue:
            self._tell_who_follows(self._queue)
        if self._candidate and not self._lease and state == "failed":
            files.log("%s: %s" % (state, reason))
        self.tell(state, "; ".join([str(reason)] + self._undone))

    def _tell_who_follows(self, queue: Queue) -> None:
        """If workers wait for this job, which never had the lease, tell them for which job to wait now."""
        said = files.read_json(self.layout.state) or {}
        waited = (said.get("follows") or {}).get("id")
        # Another job may be serving. Without an id, the playbook has written it before the first job.
        if self._belongs_to_workers:
            return
        if waited == "" or waited == self.job and said.get("state") in ("ended", "failed"):
            with self._only_told("cannot write state.json"):
                queue.look(LAST_LOOK_SECONDS)
                files.write_state(self.layout.state, dict(said, follows=queue.successor))

    def _watch(self, postgres: Postgres, keeper: Keeper, lifetime: Optional[float]) -> None:
        ends = float("inf") if lifetime is None else time.monotonic() + lifetime
        # This file requests a stop where the scheduler can only kill us. Create it now: hosts may cache its absence.
        wish = self.layout.stop_request(self.job)
        candidate, is_due = self._candidate, True
        if not self.bootstrap and not candidate and not os.path.exists(wish):
            with self._only_told("cannot create %s" % wish):
                files.write_state(wish, {"stop": False})
        with contextlib.ExitStack() as beside:
            health = Health(self.settings, postgres)
            if not self.bootstrap:
                beside.enter_context(health)
                self._dumps = Dumps(self.settings, postgres)
                beside.callback(self._dumps.cancel)
            if not self.bootstrap:
                self._predecessor = handover.Predecessor(self.layout, self.job)
                self._has_served = True
            while True:
                time.sleep(0.5)  # ended early by a signal, which raises Stop
                keeper.check()
                if _told_to_stop:
                    raise _told_to_stop[0]
                returncode = postgres.returncode()
                if returncode is not None:
                    raise Failed("postgres exited unexpectedly with code %d" % returncode)
                if time.monotonic() > ends:
                    stop("its lifetime has expired")
                if candidate:
                    is_due = self._check_candidate(candidate)
                elif (files.read_json(wish) or {}).get("stop"):
                    ignore_signals()
                    stop("stopped by %s" % wish)
                if self._predecessor and is_due:
                    self._hand_over(self._predecessor, postgres, keeper)
                if self._dumps:
                    self._dumps.poll()
                    self._poll_engines(postgres)
                    wrong = health.reason or self._unpublished or self._dumps.told or self._engines_told()
                    self.tell(*("unhealthy", wrong) if wrong else ("serving", SERVING + self._alone + self._trouble))

    def _check_candidate(self, candidate: Candidate) -> bool:
        """Raise Stop if the worker has ended, or another job should serve; return whether requests are due."""
        try:
            return candidate.check()
        except Left as left:
            self._is_stopped = not left.planned
            stop(str(left), planned=left.planned, again=True)
        except Over as over:
            stop(str(over), planned=True)
        return False

    def _hand_over(self, predecessor: handover.Predecessor, postgres: Postgres, keeper: Keeper) -> None:
        """Raise Stop if a successor asks for the lease, and still asks when everything is prepared."""
        request = predecessor.poll()
        if not request:
            return
        name = "job %s on %s" % (request["job"], request["host"])
        refusal = ""
        earliest, age = self._queue.earliest if self._queue else None, time.monotonic() - self._begun
        if self._belongs_elsewhere():
            earliest = 0.0
        if request["refusal"]:
            self._trouble = ", but %s cannot take over: %s" % (name, request["refusal"])
            refusal = "job %s continues to serve" % self.job
        elif earliest is None or age < earliest - EARLY_SECONDS:
            after = "at its end" if earliest is None else "%d s after its start; %d s have passed" % (earliest, age)
            refusal = "job %s hands over %s" % (self.job, after)
        with self._only_told("cannot answer %s" % name):
            predecessor.answer(request, "refused" if refusal else "accepted", refusal)
        if refusal:
            return
        self._trouble = ""
        if self._queue:
            self._queue.takes_over(request["job"], request["host"])
        self._prepare_to_move(
            postgres, keeper, "%s takes over" % name, "handover", self.settings["stop_notice"] / 4)
        if predecessor.still_asks(request):
            stop("%s takes over" % name, successor=request)

    def _belongs_elsewhere(self) -> bool:
        """Return whether the playbook has moved the server from jobs of its own to the workers' jobs, or back."""
        with contextlib.suppress(OSError):
            self._belongs_to_workers = read_settings(self.settings["root"])["placement"] == "workers"
        return self._belongs_to_workers != bool(self._candidate)

    def _poll_engines(self, postgres: Postgres) -> None:
        """Poll the sidecars; publish the endpoint again if their ports have changed, or if the last attempt failed."""
        before = [engine.port for engine in self._engines]
        for engine in self._engines:
            engine.poll()
        due = self._unpublished and time.monotonic() >= self._publish_due
        if due or [engine.port for engine in self._engines] != before:
            self._publish(postgres)

    def _engines_told(self) -> str:
        return "; ".join(engine.reason for engine in self._engines if engine.reason)

    def _follow_once_served(self) -> float:
        return self._follow() if self._has_served else 0.5

    def _follow(self) -> float:
        """Ensure that a successor is queued; return the seconds until the next check."""
        queue = self._queue
        if not queue:
            return FOLLOW_SECONDS
        pause = FOLLOW_SECONDS
        if self._belongs_elsewhere():
            queue.successor = None
            return FOLLOW_OFTEN_SECONDS
        try:
            followed = queue.ensure_successor()
            self._alone = ", but " + queue.trouble if queue.trouble else ""
            if queue.earliest is not None:  # then the successor may begin, and end without taking over
                pause = max(min(queue.earliest - (time.monotonic() - self._begun), pause), FOLLOW_OFTEN_SECONDS)
            if queue.successor and queue.successor["state"] != "PENDING":
                pause = FOLLOW_OFTEN_SECONDS
        except (OSError, subprocess.TimeoutExpired) as error:
            followed, pause = "cannot queue a successor: %s" % error, FOLLOW_OFTEN_SECONDS
            self._alone = ", but " + followed
        if followed != self._followed:
            self._followed = followed
            files.log(followed)
        return pause

    def _publish(self, postgres: Postgres) -> None:
        where = {
            "instance": self.settings["instance"], "cluster": self.settings["cluster"],
            "host": self._address(postgres),
            "port": postgres.port, "socket": postgres.socket, "job": self.job, "since": time.time(),
            "tls": "sslmode" in self.settings["service"], "placement": "workers" if self._candidate else "job",
        }
        if self.bootstrap:
            where.update(host=socket.gethostname(), pid=os.getpid())
            files.write_json(self.layout.temporary_server, where)
        else:
            address = self._address()
            where.update({
                engine.name: {"host": address, "port": engine.port} for engine in self._engines if engine.port
            })
            pooled = self.settings["pooler"].get("service")
            try:
                endpoint.publish(self.layout.run, self._service_file(), where, self.settings["service"], pooled)
                self._unpublished = ""
            except OSError as error:  # postgres still serves the connected workers
                self._unpublished = "cannot publish the endpoint: %s" % error
                self._publish_due = time.monotonic() + PUBLISH_SECONDS

    def _withdraw(self) -> None:
        if self.bootstrap:
            files.remove(self.layout.temporary_server)
        endpoint.withdraw(self.layout.run, self._service_file(), self.settings["instance"])

    def _address(self, postgres: Optional[Postgres] = None) -> str:
        """Return the host for clients of ``postgres`` or, without it, of the sidecars.

        The default is this host's name.
        """
        wanted = self.settings["advertise"]
        if wanted == "socket":
            return postgres.socket if postgres else "localhost"
        name = wanted or socket.gethostname()
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            raise Failed(
                "the host name %s cannot be resolved: set server_address to one that every node can resolve" % name
            ) from None
        return name

    def still_holds(self) -> bool:
        """Return whether the lease names this process, or may do so."""
        try:
            return self._lease is not None and self._lease.is_ours() and self._lease.holder() is not None
        except OSError:
            return True

    def forget_local_job(self) -> None:
        """Record that this process no longer is the server's job."""
        if self._candidate and self._kind() == "local" and self._lease:
            with self._only_told("cannot record the end of the server"):
                local_job.forget(os.getpid())

    def _service_file(self) -> str:
        return endpoint.service_file(self.settings)

    def _kind(self) -> str:
        return "bootstrap" if self.bootstrap else self.settings["scheduler"]

    def _is_known_to_have_ended(self, holder: dict) -> bool:
        """Return whether a holder has ended; ask the scheduler only every few seconds, for we may wait for minutes."""
        if time.monotonic() < self._ask_due:
            return False
        ended = self._has_ended(holder)
        self._ask_due = time.monotonic() + (0.0 if ended else ASK_SECONDS)
        return ended

    def _has_ended(self, holder: dict) -> bool:
        """Return whether a holder on another host, or from before a reboot, has ended, as far as can be known."""
        kind, job = holder.get("kind", ""), holder.get("job", "")
        if kind == "bootstrap":  # inside some other job, or in none
            kind, job = holder.get("scheduler", ""), holder.get("allocation", "")
            if not job or job == self._allocation:
                return True  # no scheduler can be asked; its long silence decides
        if not self._can_be_asked(holder):
            return False
        if kind == "local":
            return True  # from before a reboot of this machine
        # If our own job was requeued, its first run has ended.
        if holder.get("placement") == "workers":
            mine = job == self.job and holder.get("run") != own_run()
            return mine or scheduler.run_has_ended(kind, self.settings["bin_dir"], job, str(holder.get("run", "0")))
        if job == self.job:
            return True
        return scheduler.job_has_ended(kind, self.settings["bin_dir"], job)

    def _can_be_asked(self, holder: dict) -> bool:
        return can_be_asked(holder, self.settings["cluster"])


def in_words(refused: Exception) -> str:
    """Return why the lease could not be taken."""
    if isinstance(refused, OSError):
        full = " (no space, or no inodes)" if refused.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return "the lease cannot be taken: %s%s" % (refused, full)
    return str(refused)


def silence(holder: dict, seconds: float, can_be_asked: bool) -> str:
    """Return how long others have to wait for a holder whose host has failed; empty if unknown."""
    if holder.get("kind") == "bootstrap":
        told = "; if it was killed, it can be replaced at once on its host, elsewhere after %g s without a heartbeat"
        return told % seconds
    if can_be_asked and holder.get("kind") != "local":
        return "; if it has died, it is replaced after %g s without a heartbeat, once its job has ended" % seconds
    return ""


def drain(postgres: Postgres, seconds: float) -> None:
    """Wait for running transactions; log those that are cut."""
    try:
        cut = postgres.drain(seconds)
        told = "transactions terminated after %d s: %d" % (seconds, cut) if cut else ""
    except (Failed, OSError, ValueError) as failed:
        told = "cannot wait for running transactions: %s" % failed
    if told:
        files.log(told)


def stop(why: str, planned: bool = False, successor: Optional[dict] = None, again: bool = False) -> None:
    """Raise Stop, and keep it in case another exception replaces it."""
    _told_to_stop.append(Stop(why, planned, successor, again))
    raise _told_to_stop[-1]


def on_signal(number: int, _frame: object) -> None:
    """Turn a signal into Stop; USR1, which comes some time before the walltime, means a planned stop."""
    planned = number == signal.SIGUSR1
    if planned:
        signal.signal(number, signal.SIG_IGN)  # later signals are more urgent
    else:
        ignore_signals()
    stop("stopped by %s" % signal.Signals(number).name, planned)


def ignore_signals() -> None:
    """Ignore further stop signals: the program is already stopping."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def listen_to_signals(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
    """Raise Stop at one of these signals; forget earlier ones."""
    del _told_to_stop[:]
    for number in numbers:
        signal.signal(number, on_signal)


def own_run() -> str:
    """Return how often this job was started before, which distinguishes the runs of a job that was queued again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def log_to(path: str) -> None:
    """Append all later output of this process to a file."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.close(opened)


def run_candidate(root: str, beside: int) -> int:
    """Run the candidate of a worker's job until the worker ends; return 0.

    Return RESTART if the lease still names this process, though it no longer serves: only its end frees the lease.
    """
    settings = read_settings(root)
    job = scheduler.own_job(settings["scheduler"]) or str(os.getpid())
    candidate = Candidate(settings, job, beside)
    if not candidate.open():
        return 0
    os.nice(NICENESS)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            listen_to_signals(CANDIDATE_SIGNALS)
            host = Host(root, False, candidate)
            try:
                host.serve(0.0, None)
            except Stop as told:
                host.tell_end("ended", told)
                if not told.again:
                    return 0
            except Lost as lost:
                host.tell_end("failed", lost)
                return RESTART
            except (Failed, Held, Unusable, OSError) as failed:
                host.tell_end("failed", failed)
                candidate.postpone()
            if host.still_holds():
                return RESTART
    except (Over, Stop):
        return 0
    finally:
        candidate.leave()


def detach(log: str) -> None:
    """Continue in a new session, which outlives the connection that started us; the parent prints our PID."""
    child = os.fork()
    if child:
        sys.stdout.write("%d\n" % child)
        sys.stdout.flush()
        os._exit(0)
    os.setsid()
    for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY), (2, log, os.O_WRONLY)):
        opened = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, stream)
        os.close(opened)


def main() -> int:
    """Run the program; return 0 after a requested stop, 3 if the lease is held, 1 after another failure."""
    parser = argparse.ArgumentParser(prog="hpc_db_host", description=__doc__)
    parser.add_argument("what", choices=("serve", "candidate", "leave", "bootstrap", "upgrade"))
    parser.add_argument("--root", required=True, help="the instance directory")
    parser.add_argument("--lifetime", type=float, help="lifetime in seconds; by default unlimited")
    parser.add_argument("--lease-patience", type=float, default=0.0, help="seconds to wait for the lease")
    parser.add_argument("--detach", metavar="LOG", help="run in the background, print the PID, and log to LOG")
    parser.add_argument("--settings", metavar="FILE", help="settings file of the new major version")
    parser.add_argument("--back", action="store_true", help="go back even if the kept studies are older")
    parser.add_argument("--beside", metavar="PID", type=int, default=0, help="end a candidate with this process")
    arguments = parser.parse_args()
    os.umask(0o077)
    listen_to_signals()
    if arguments.what == "leave":
        job = scheduler.own_job(read_settings(arguments.root)["scheduler"])
        return int(not Door(arguments.root, job).knock(LEAVE_SECONDS))
    try:
        if arguments.what == "candidate":
            return run_candidate(arguments.root, arguments.beside)
        host = Host(arguments.root, arguments.what != "serve")
    except FileNotFoundError as failed:
        parser.exit(1, "%s\n" % failed)
    if arguments.detach:
        detach(arguments.detach)
    try:
        if arguments.what == "upgrade":
            answer = host.upgrade(arguments.lease_patience, arguments.settings, arguments.back)
            sys.stdout.write(json.dumps(answer) + "\n")
        else:
            host.serve(arguments.lease_patience, arguments.lifetime)
    except Stop as told:
        host.tell_end("ended", told)
        return int(arguments.what == "upgrade")
    except Held as held:
        host.tell_end("failed", held)
        return 3
    except (Failed, Lost, Unusable, OSError) as failed:
        host.tell_end("failed", failed)
        return 1
    return 0


def leave(code: int) -> None:
    """Exit with this code. Python would use another one if the log's last bytes cannot be written to a full disk."""
    try:
        sys.stderr.flush()
    except OSError:
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    leave(main())
