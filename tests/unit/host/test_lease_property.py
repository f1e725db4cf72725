# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lease under any order of events: contenders are frozen, killed, cut off and released at every step.

A contender with the lease opens the data directory, starts and stops as slowly as the others like, and its job's state
comes from a scheduler that answers correctly, wrongly, late or not at all. The failure to find is two contenders that
have the data directory open at once.
The examples are the same in every run. HPC_DB_EXAMPLES=5000 tries as many new ones, and prints how to repeat a
failure.
"""

import itertools
import os
import shutil
import tempfile
import threading
import time
import types
from contextlib import ExitStack
from unittest import mock

import pytest
from hpc_db_host import files, processes
from hpc_db_host import lease as lease_module
from hpc_db_host.keeper import Keeper
from hpc_db_host.lease import Held, Lease, Lost
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

TTL = 90.0
# For a holder that no scheduler knows.
SILENCE = 5 * TTL
# Calls that other hosts can see, or that see the actions of others: a contender may stop for ever before each of them.
VISIBLE = ("link", "listdir", "open", "rename", "stat", "unlink")
# Steps that a contender makes before another's turn; the last value stands for all steps.
STEPS = st.integers(0, 10) | st.just(100)
EXAMPLES = int(os.environ.get("HPC_DB_EXAMPLES", "0"))


class Killed(BaseException):
    """The contender's process is dead: its cleanup code does not run."""


class Contender:
    """A supervisor that proceeds only when told to, one visible step at a time."""

    def __init__(self, world, place, pid, job, offset, silence):
        self.world, self.place, self.pid, self.start = world, place, pid, f"started as {job}"
        self.alive, self.idle, self.leaving = True, True, False
        self.holds = False  # the contender's belief
        self.opened = self.stopping = False  # the data directory's state, which may outlast the lease
        self.acquired = self.renewed = self.beat = 0.0  # in true time, which no contender sees
        self.awake = 0.0  # the time of its last turn, whatever it did in it
        self._go, self._halted = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._halted.acquire()
        world.current = self
        self.job, self.silence, self.offset = job, silence, offset
        self.returns = False  # it asks for the lease again after its release, since no successor took it
        self.contend()

    def contend(self):
        """Begin as the program does: with a lease of its own making."""
        world = self.world
        holder = {"host": self.place, "pid": self.pid, "job": self.job, "kind": "slurm", "silence": self.silence}
        self.lease = Lease(world.folder, holder, world.has_ended, TTL, lambda: world.now + self.offset)
        self.keeper = Keeper(self.lease)

    def __repr__(self):
        return f"{self.job} on {self.place}"

    def begin(self, call):
        """Call into the lease, and stop before the first visible step."""
        self.idle, self._outcome, self.world.current, self._begun = False, None, self, self.world.now
        threading.Thread(target=self._run, args=(call,), daemon=True).start()
        self._halted.acquire()
        self._look_for_end()

    def work(self, steps):
        """Renew, or try to acquire, and halt after some steps."""
        self.begin(self.keep if self.holds else self.lease.try_acquire)
        self.go_on(steps)

    def keep(self):
        """Take the keeper's turn, whatever the program itself does meanwhile."""
        self.keeper.beat()

    def open(self):
        """Open the data directory, if the lease is still ours. Both happen in one step."""
        self.keeper.renew()
        self.opened = True

    def lose(self):
        """End postgres at once."""
        self.opened = False

    def release(self):
        self.opened = False  # it has stopped, however long that took
        self.keeper.release()

    def go_on(self, steps):
        for _step in range(steps):
            if self.idle:
                break
            self.world.current = self
            self._go.release()
            self._halted.acquire()
            self._look_for_end()

    def halt(self):
        """Wait for our next turn. Runs in the contender's thread, as does ``_run``."""
        self._halted.release()
        self._go.acquire()
        if not self.alive:
            raise Killed

    def kill(self):
        self.alive = self.holds = self.leaving = self.opened = False
        while not self.idle:
            self.go_on(1)

    def _run(self, call):
        try:
            self._outcome = call()
        except BaseException as error:
            self._outcome = error
        self._call, self._ended = call, True
        self._halted.release()

    _ended = False

    def _look_for_end(self):
        if not self._ended:
            return
        self._ended, self.idle = False, True
        outcome, name = self._outcome, self._call.__name__
        if isinstance(outcome, Lost) or self.holds and self.keeper.lost:
            self.holds, self.leaving = False, True
        elif isinstance(outcome, BaseException) and not isinstance(outcome, (Held, Killed)):
            raise outcome
        elif name == "try_acquire" and outcome is True:
            self.holds, self.acquired, self.awake = True, self.world.now, self._begun
        if name == "release":
            self.leaving, self.alive = False, self.returns  # it has ended cleanly, or serves on
            if self.returns:
                self.returns = self.stopping = False
                self.contend()
        if self.holds:
            self.renewed = self.beat
        if self.holds or self.opened:
            self.awake = self._begun


class World(RuleBasedStateMachine):
    """Hosts with clocks of their own, one file system, and a scheduler that may report a job as ended too early."""

    kind = Contender

    @initialize(offsets=st.tuples(*[st.sampled_from([0.0, 5.0, 1e6])] * 3), steps=st.integers(0, 10))
    def begin(self, offsets, steps):
        self.offsets = dict(zip(["c1", "c2", "c3"], offsets))
        self.now, self.wall, self.jobs = 1000.0, 1.8e9, itertools.count(1)
        self.contenders, self.called_ended, self.answer, self.current = [], set(), "right", None
        self.folder = tempfile.mkdtemp(prefix="lease-")
        self.patches = ExitStack()
        gated = types.SimpleNamespace(**vars(os))
        for name in VISIBLE:
            setattr(gated, name, self.gate(getattr(os, name)))
        gated.path = types.SimpleNamespace(**dict(vars(os.path), exists=self.gate(os.path.exists)))
        gated.fsync = lambda descriptor: None
        for module in (lease_module, files):
            self.patches.enter_context(mock.patch.object(module, "os", gated))
            self.patches.enter_context(mock.patch.object(module, "open", self.gate(open), create=True))
        self.patches.enter_context(mock.patch.object(processes, "this_host", lambda: self.current.place))
        self.patches.enter_context(mock.patch.object(processes, "start_time", self.start_time))
        self.patches.enter_context(mock.patch.object(processes, "kill_below", lambda _pid: self.current.lose()))
        self.patches.enter_context(mock.patch.object(time, "time", lambda: self.wall))
        self.arrive("c1", TTL)
        self.arrive("c2", TTL)
        self.watch(renewing=True, given_up=False)
        self.watch(renewing=False, given_up=steps > 0)
        holder, other = self.contenders
        self.interrupt(other, holder, steps)

    def gate(self, function):
        def call(*arguments, **keywords):
            contender = self.current
            contender.halt()
            if function is os.rename and "hb." in arguments[1]:
                contender.beat = self.now
            return function(*arguments, **keywords)

        return call

    def start_time(self, pid):
        """A host knows only its own processes; PIDs are reused."""
        here = [each for each in [*self.contenders, self.current] if each.place == self.current.place]
        return next((each.start for each in here if each.alive and each.pid == pid), None)

    def has_ended(self, holder):
        job = holder.get("job")
        right = job in self.called_ended or not any(each.alive for each in self.contenders if each.job == job)
        known = job is not None  # otherwise its file could not be read
        ended = known and {"right": right, "nothing": False, "ended": True}[self.answer]
        self.current.halt()  # the answer is late, and may be wrong by now
        return ended

    @rule(answer=st.sampled_from(["right", "nothing", "ended"]))
    def change_scheduler(self, answer):
        """Choose a scheduler that is correct, gives no answer, or reports every job as ended."""
        self.answer = answer

    def between_calls(self):
        return [each for each in self.contenders if each.alive and each.idle and not each.leaving]

    def within_calls(self):
        return [each for each in self.contenders if not each.idle]

    def leavers(self):
        return [each for each in self.contenders if each.idle and (each.holds or each.leaving)]

    @precondition(lambda self: sum(each.alive for each in self.contenders) < 3)
    @rule(place=st.sampled_from(["c1", "c2", "c3"]), silence=st.sampled_from([TTL, TTL, SILENCE]))
    def arrive(self, place, silence):
        taken = {each.pid for each in self.contenders if each.alive and each.place == place}
        pid = next(pid for pid in itertools.count(100) if pid not in taken)
        offset = self.offsets.get(place, 0.0)
        self.contenders.append(self.kind(self, place, pid, str(next(self.jobs)), offset, silence))

    def starters(self):
        return [each for each in self.between_calls() if each.holds and not each.opened and not each.stopping]

    @precondition(lambda self: self.starters())
    @rule(data=st.data(), steps=STEPS)
    def start(self, data, steps):
        """Open the data directory: at once, or long after the lease was taken."""
        contender = data.draw(st.sampled_from(self.starters()))
        contender.begin(contender.open)
        contender.go_on(steps)

    @precondition(lambda self: any(each.opened for each in self.between_calls()))
    @rule(data=st.data())
    def stop_slowly(self, data):
        """Begin to stop. The data directory stays open until ``leave``, and turns go on."""
        data.draw(st.sampled_from([each for each in self.between_calls() if each.opened])).stopping = True

    @precondition(lambda self: self.between_calls())
    @rule(data=st.data(), steps=STEPS)
    def work(self, data, steps):
        data.draw(st.sampled_from(self.between_calls())).work(steps)

    @precondition(lambda self: len(self.between_calls()) > 1 and any(each.holds for each in self.contenders))
    @rule(data=st.data(), steps=st.integers(1, 10), overdue=st.booleans())
    def work_interrupted(self, data, steps, overdue):
        """Two contenders overlap: one halts until the other has finished. Most useful when a takeover is due."""
        if overdue:
            self.watch(renewing=False, given_up=True)
        first, second = data.draw(st.permutations(self.between_calls()))[:2]
        self.interrupt(first, second, steps)

    def interrupt(self, first, second, steps):
        first.work(steps)
        second.work(100)
        first.go_on(100)

    @precondition(lambda self: self.within_calls())
    @rule(data=st.data(), steps=STEPS)
    def go_on(self, data, steps):
        data.draw(st.sampled_from(self.within_calls())).go_on(steps)

    @precondition(lambda self: self.leavers())
    @rule(data=st.data(), steps=STEPS, returns=st.booleans())
    def leave(self, data, steps, returns):
        """Stop cleanly, on request or because the lease was lost: postgres has ended before.

        After a hand-over that no successor has taken, the contender returns.
        """
        contender = data.draw(st.sampled_from(self.leavers()))
        contender.returns = returns and contender.holds
        contender.holds, contender.leaving = False, True
        contender.begin(contender.release)
        contender.go_on(steps)

    @precondition(lambda self: sum(each.alive for each in self.contenders) > 2)
    @rule(data=st.data())
    def kill(self, data):
        data.draw(st.sampled_from([each for each in self.contenders if each.alive])).kill()

    @rule(seconds=st.sampled_from([1.0, TTL / 6 + 1, TTL / 2 + 1, TTL + 1]), wall=st.sampled_from([0.0, 1e9, 4e9]))
    def wait(self, seconds, wall):
        """Freeze all contenders, and set the wall clock."""
        self.now += seconds
        self.wall = wall

    @rule(renewing=st.booleans(), given_up=st.booleans(), starting=st.booleans())
    def watch(self, renewing, given_up, starting=False):
        """The contenders between two calls run for longer than the TTL; holders do, or are frozen, or cut off.

        The scheduler has not noticed a death yet, or it reports all jobs as ended, even those that run and renew.
        """
        for _turn in range(3):
            for each in self.between_calls():
                if renewing or not each.holds:
                    each.work(100)
                if starting and each in self.starters():
                    each.begin(each.open)
                    each.go_on(100)
            self.now += TTL / 3 + 1
        if given_up:
            self.called_ended.update(each.job for each in self.contenders)

    @invariant()
    def nobody_takes_over_from_one_who_lives(self):
        """A holder that has renewed within the TTL is not replaced; a replaced holder never renews again."""
        holders = sorted((each for each in self.contenders if each.holds), key=lambda each: each.lease.epoch)
        for older, newer in itertools.combinations(holders, 2):
            assert older.lease.epoch < newer.lease.epoch
            assert older.renewed + older.silence < newer.acquired, f"{newer} has taken over from {older}"

    @invariant()
    def one_data_directory_is_open_once(self):
        """The exception is a program frozen for so long that others had to take it for dead."""
        opened = sorted((each for each in self.contenders if each.opened), key=lambda each: each.lease.epoch)
        for older, newer in itertools.combinations(opened, 2):
            # A turn renews the lease if the last renewal is a sixth of the TTL ago.
            assert older.awake - TTL / 6 + older.silence < newer.acquired, f"both {older} and {newer} have it open"

    def teardown(self):
        """Once all contenders are known to be dead, the next one can start after the TTL."""
        try:
            for each in self.contenders:
                each.kill()
                self.called_ended.add(each.job)
            self.answer = "right"
            self.arrive("c4", TTL)
            last = self.contenders[-1]
            for _look in range(2):
                if not last.holds:
                    last.begin(last.lease.try_acquire)
                    last.go_on(100)
                    self.now += SILENCE + 1
            assert last.holds
        finally:
            self.patches.close()
            shutil.rmtree(self.folder)


TestLease = World.TestCase
TestLease.settings = settings(
    max_examples=EXAMPLES or 200, stateful_step_count=40, derandomize=not EXAMPLES, print_blob=True, database=None,
    deadline=None, suppress_health_check=list(HealthCheck),
)


class Forgetful(Contender):
    """Does not renew while it stops."""

    def keep(self):
        if not self.stopping:
            self.keeper.beat()


class Hasty(Contender):
    """Neither renews before it starts postgres, nor checks who holds the lease."""

    def keep(self):
        if self.opened:
            self.keeper.beat()

    def open(self):
        self.opened = True


class Gentle(Contender):
    """Stops postgres without haste when the lease is lost."""

    def lose(self):
        self.stopping = True


@pytest.mark.parametrize("kind", [Forgetful, Hasty, Gentle])
def test_property_finds_a_program_with_a_fault(kind):
    """Each class has a fault that the supervisor once had."""
    world = type("World", (World,), {"kind": kind})
    quickly = settings(TestLease.settings, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)

    with pytest.raises(AssertionError, match="both . on c. and . on c. have it open"):
        run_state_machine_as_test(world, settings=quickly)
