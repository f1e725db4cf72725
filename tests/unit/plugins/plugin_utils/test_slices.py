# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The output while a module waits, on a clock that only moves during that."""

from ansible_collections.mala.hpc_db.plugins.plugin_utils.slices import run_in_slices


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


def run(*texts):
    """Run a module that waits for these, 5 s each; return the result, the lines and the arguments of each call."""
    clock, lines, resumed, left = Clock(), [], [], list(texts)

    def call(resume):
        resumed.append(resume)
        if not left:
            return {"changed": True}
        clock.now += 5
        return {"waiting": left.pop(0), "resume": {"pid": 7}}

    return run_in_slices(call, lines.append, clock), lines, resumed


def test_what_takes_no_time_is_run_once_and_says_nothing():
    assert run() == ({"changed": True}, [], [{}])


def test_next_slice_is_told_where_the_last_one_ended():
    assert run("a", "a")[2] == [{}, {"pid": 7, "waited": 5.0}, {"pid": 7, "waited": 10.0}]


def test_changes_are_said_at_once_and_the_same_every_30_seconds():
    assert run(*"aaaaaaab")[1] == ["a (5 s)", "a (35 s)", "b (40 s)"]
