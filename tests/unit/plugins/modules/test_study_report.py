# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""study_report without Optuna and plotly; tests/integration has them, and a browser."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _figures, _report
from ansible_collections.mala.hpc_db.plugins.modules import study_report
from ansible_collections.mala.hpc_db.plugins.modules.study_report import Refused, ensure_report

JOB = {"id": "7", "name": "hpc_db", "state": "RUNNING", "node": "c1", "reason": "", "time_left": 90000,
       "time_limit": 259200}
LOG = {"since": 100, "serving": True, "outages": [], "troubles": []}
SERVER = {"version": "17.2", "databases": [{"name": "mala", "size": 8000000}], "studies": [], "connections": {
    "used": 2, "max": 80, "clients": [{"host": "c2", "user": "study", "count": 2}], "idle_in_transaction": [],
    "orphaned": [],
}}
STATUS = {
    "instance": "hpc_db", "cluster": "mini", "url": "postgresql://", "read": 1000, "job": JOB,
    "endpoint": {"host": "c1", "port": 5432, "since": 500.0}, "state": {"state": "serving", "reason": "it <b>does"},
    "disk": {"total": 10 * 1024**3, "free": 5 * 1024**3}, "server": SERVER, "log": LOG,
}
HOSTILE = '</script><img src=x onerror="alert(1)">'


def study(*trials, directions=("minimize",)):
    return {"database": "mala", "name": HOSTILE, "directions": list(directions), "metrics": None,
            "attributes": {HOSTILE: [HOSTILE]}, "distributions": [], "trials": list(trials)}


def trial(number, value=None, state="COMPLETE", start=0, complete=1, **held):
    return {"number": number, "state": state, "start": start, "complete": complete, "params": {}, "intermediate": [],
            "values": None if value is None else [value], "attributes": {}, "constraints": {}, **held}


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "render", page)
    return {"path": str(tmp_path / "report.html"), "trials": str(tmp_path / "trials"), "status": STATUS}


def page(status, held, digest="0" * 64):
    return _report.page(status, held, None, [[] for _each in held["studies"]], digest, "")


@pytest.mark.parametrize("check_mode", [False, True])
def test_written_only_if_something_has_changed(check_mode, params, tmp_path):
    first = ensure_report(params, check_mode)
    held = {**SERVER, "databases": [], "connections": {**SERVER["connections"], "used": 3}}
    later = {**STATUS, "read": 2000, "disk": None, "job": {**JOB, "time_left": 1}, "server": held}
    again = ensure_report({**params, "status": later}, check_mode)

    assert (first["changed"], again["changed"]) == (True, check_mode)
    assert (tmp_path / "report.html").exists() is not check_mode
    if not check_mode:
        assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600
        moved = {**STATUS, "endpoint": {**STATUS["endpoint"], "host": "c2"}}
        assert ensure_report({**params, "status": moved}, check_mode)["changed"]


@pytest.mark.parametrize("path, content, said", [
    ("report.html", "<html>thesis", "exists and is not a report; move it away, or choose another report_file"),
    ("", None, "Is a directory"),
    ("none/report.html", None, "No such file or directory; choose another report_file"),
])
def test_what_cannot_be_written_is_told(path, content, said, params, tmp_path):
    if content:
        (tmp_path / path).write_text(content)

    with pytest.raises(Refused, match=said):
        ensure_report({**params, "path": str(tmp_path / path)}, False)

    assert not content or (tmp_path / path).read_text() == content


def test_trials_that_are_broken_are_named(params, tmp_path):
    (tmp_path / "trials").write_bytes(gzip.compress(b"{")[:-4])

    with pytest.raises(Refused, match="^trials: .* cannot be read"):
        ensure_report(params, False)


def test_names_and_attributes_are_text():
    shown = page(STATUS, {"studies": [study(trial(0, state="FAIL"))], "problems": [HOSTILE]})

    assert HOSTILE not in shown and "it <b>does" not in shown
    assert shown.count("&lt;/script&gt;&lt;img src=x onerror=") == 5  # name twice, attribute and value, problem
    assert HOSTILE not in _figures.as_script(json.dumps([HOSTILE]))
    assert json.loads(_figures.as_script(json.dumps([HOSTILE]))) == [HOSTILE]


@pytest.mark.parametrize("changes, lines", [
    ({}, ["7 RUNNING c1", "1 d 01:00:00 of 3 d 00:00:00", "2 of 80", "2 of study from c2", "mala, 7.6 MiB",
          "5.0 GiB free of 10.0 GiB", "There was no outage.", "The studies were read from the running server."]),
    ({"job": None, "server": None}, ["none in the queue: the server is not running", "none: the server accepts no",
                                     "The server is not running: a temporary server has read the studies."]),
    ({"server": None}, ["The server is not running yet: the studies are those of the last report, if any."]),
    ({"log": {**LOG, "since": None}}, ["There are no events of a server job yet."]),
    ({"log": {**LOG, "outages": [{"began": 100, "ended": 161, "certain": True, "reason": "stopped by SIGTERM"},
                                 {"began": 200, "ended": 260, "certain": False, "reason": ""},
                                 {"began": 300, "ended": None, "certain": True, "reason": "x"}]}},
     ["00:01:01</td><td>away</td><td>stopped by SIG", "00:03:20 UTC or later", "at most 00:01:00", "no message",
      "still going on</td><td>00:11:40"]),
])
def test_status(changes, lines):
    shown = page({**STATUS, **changes}, {"studies": [], "problems": []})

    assert [line for line in lines if line not in shown] == []
    assert "No studies are known." in shown


def test_what_is_odd_is_named_beside_the_rest():
    held = {"studies": [{**study(trial(0, state="FAIL")), "odd": ["trial 0 has x = 2.0"]}], "problems": []}

    shown = page(STATUS, held)

    assert '<p class="bad">trial 0 has x = 2.0</p>' in shown and "1 trial: 1 fail" in shown


def test_study_that_cannot_be_shown_costs_itself_only():
    broken = {**study(trial(0, state="FAIL")), "attributes": {"a": object()}}

    shown = page(STATUS, {"studies": [broken, study(trial(0, state="FAIL"))], "problems": []})

    assert "This study cannot be shown: TypeError: Object of type object" in shown
    assert shown.count("No trial is complete with a finite value") == 1


def test_complete_trial_without_a_value_is_none_to_compare():
    assert _figures.complete_trials(study(trial(0), trial(1, 1.0))) == [trial(1, 1.0)]
    whole = trial(2, values=[1.0, 2.0])
    assert _figures.best_first(study(trial(0), trial(1, 1.0), whole, directions=["minimize"] * 2), 1) == [whole]


def test_trials_keep_their_numbers_where_one_is_missing(monkeypatch):
    drawn = SimpleNamespace(data=[SimpleNamespace(x=[0, 1], y=[3.0, 1.0])])
    plots = SimpleNamespace(plot_optimization_history=lambda study, target, target_name: drawn)
    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(visualization=plots))
    monkeypatch.setattr(_figures, "rebuild", lambda exported, trials: [each["number"] for each in trials])

    _figures.history(study(trial(0, 3.0), trial(1), trial(3, 1.0)), 0)

    assert drawn.data[0].x == [0, 3]


def test_best_trials_come_first():
    trials = [trial(0, 3.0), trial(1, 1.0, constraints={"0": 1}), trial(2, 2.0), trial(3, float("-inf")),
              trial(4, state="RUNNING")]

    assert [each["number"] for each in _figures.best_first(study(*trials))] == [2, 0, 1]
    assert [each["number"] for each in _figures.best_first(study(*trials, directions=["maximize"]))] == [0, 2, 1]


def test_running_trials():
    trials = [trial(0, start=0, complete=10), trial(1, start=5, complete=None, state="RUNNING"),
              trial(2, start=None, complete=None, state="WAITING"), trial(3, start=10, complete=9)]

    assert _figures.running_steps(trials, 20) == [(0, 1), (5, 2), (10, 1), (20, 1)]
    assert _figures.running_steps([], 20) == []


@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED", "FAIL", "WAITING"])
def test_trial_that_has_ended_never_counts_as_running(state):
    assert _figures.running_steps([trial(0, state=state, start=0, complete=None)], 20) == []


@pytest.mark.parametrize("number, most", [(0, 5), (3, 5), (5, 5), (6, 5), (1000, 7)])
def test_thinning_keeps_the_ends_and_the_peaks(number, most):
    steps = [(when, 9 if when == number // 2 else 1) for when in range(number)]

    few, high = _figures.evenly(steps, most), _figures.highest(steps, most)

    assert len(few) == min(number, most) and len(high) <= max(most, 1) + 1
    assert few[:1] + few[-1:] == steps[:1] + steps[-1:]
    assert max(high, default=None, key=lambda step: step[1]) == max(steps, default=None, key=lambda step: step[1])


def test_each_new_best_value_is_kept():
    points = list(enumerate([5, 6, 4, 4, 7, 3]))

    assert _figures.new_best(points, study(), 0) == {2, 5}
    assert _figures.new_best(points, study(directions=["maximize"]), 0) == {1, 4}
