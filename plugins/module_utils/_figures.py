# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plots of the studies exported by the module study_trials, made with optuna.visualization and plotly.

Both are imported only where they are used, because the workstation's Ansible has neither.
"""

from __future__ import annotations

import datetime
import html
import json
import math
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any, Callable, NamedTuple

# Amounts that a browser draws smoothly; a line of parallel coordinates costs more than a point.
MOST_POINTS = 5000
MOST_LINES = 500
MOST_CURVES = 100
MOST_STEPS = 100000  # of all curves together
# Optuna copies the whole study once for each parameter whose importance it computes.
MOST_COMPARED = 2000
MOST_PARAMETERS = 12

STATES = {"COMPLETE": "#2a7f62", "PRUNED": "#d08c1d", "FAIL": "#b3373c"}
COLOURS = ["#2f6db3", "#c4682b", "#3d8f5f", "#8a5aa8", "#b3373c", "#5f6b76"]
OUTAGE = "#b3373c"


class Figure(NamedTuple):
    """A plot in plotly.js's format, and a note for the reader."""

    title: str
    content: str
    note: str


def literal(text: str) -> str:
    """Return a text escaped for plotly, which interprets texts as HTML."""
    return html.escape(text, quote=False)


def stamp(seconds: float) -> str:
    """Return a time in plotly's format, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")


# --- studies


def literal_distribution(text: str) -> Any:
    """Return a distribution whose choices plotly shows literally; a choice that is a list becomes its text."""
    from optuna import distributions

    distribution = distributions.json_to_distribution(text)
    if not isinstance(distribution, distributions.CategoricalDistribution):
        return distribution
    choices = [json.dumps(each) if isinstance(each, (dict, list)) else each for each in distribution.choices]
    return distributions.CategoricalDistribution([literal(each) if isinstance(each, str) else each for each in choices])


def rebuild(exported: dict[str, Any], trials: Iterable[dict[str, Any]]) -> Any:
    """Return an in-memory study with these trials of the exported one; their new numbers are their positions."""
    import optuna

    distributions = [literal_distribution(text) for text in exported["distributions"]]
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(directions=exported["directions"], storage=storage)
    study_id = storage.get_study_id_from_name(study.study_name)
    # Not Study.add_trials, which refuses some values that Optuna itself stores, such as an enqueued value out of range.
    for trial in trials:
        storage.create_new_trial(study_id, rebuild_trial(trial, distributions))
    return study


def rebuild_trial(exported: dict[str, Any], distributions: list[Any]) -> Any:
    """Return a trial as an object of Optuna."""
    import optuna

    state = optuna.trial.TrialState[exported["state"]]
    held = {literal(name): (distributions[index], value) for name, (index, value) in exported["params"].items()}
    start, complete = (
        None if seconds is None else datetime.datetime.fromtimestamp(seconds)
        for seconds in (exported["start"], exported["complete"])
    )
    trial = optuna.trial.FrozenTrial(
        number=exported["number"], trial_id=exported["number"], state=state, value=None,
        values=exported["values"] if state == optuna.trial.TrialState.COMPLETE else None,
        datetime_start=start, datetime_complete=complete,
        params={name: distribution.to_external_repr(value) for name, (distribution, value) in held.items()},
        distributions={name: distribution for name, (distribution, _value) in held.items()},
        user_attrs={}, system_attrs={}, intermediate_values=dict(exported["intermediate"]),
    )
    for name, value in exported["constraints"].items():
        trial.set_constraint(name, value)
    return trial


def whole_trials(exported: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all trials except complete ones without all values."""
    count = len(exported["directions"])
    return [each for each in exported["trials"] if each["state"] != "COMPLETE" or len(each["values"] or ()) == count]


def complete_trials(exported: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the complete trials with finite values."""
    complete = [trial for trial in whole_trials(exported) if trial["state"] == "COMPLETE"]
    return [trial for trial in complete if all(map(math.isfinite, trial["values"]))]


def is_feasible(trial: dict[str, Any]) -> bool:
    """Return whether a trial satisfies all constraints."""
    return all(value <= 0 for value in trial["constraints"].values())


def best_first(exported: dict[str, Any], objective: int = 0) -> list[dict[str, Any]]:
    """Return the complete trials from best to worst; those that violate a constraint come last."""
    sign = 1 if exported["directions"][objective] == "minimize" else -1
    found = complete_trials(exported)
    return sorted(found, key=lambda trial: (not is_feasible(trial), sign * trial["values"][objective]))


def objectives(exported: dict[str, Any]) -> list[str]:
    """Return the objectives' names."""
    several = len(exported["directions"]) > 1
    named = isinstance(exported["metrics"], list) and len(exported["metrics"]) == len(exported["directions"])
    names = exported["metrics"] if named else [f"objective {number}" for number in range(len(exported["directions"]))]
    return [literal(str(name)) for name in names] if several or named else ["objective value"]


def evenly(items: list, most: int) -> list:
    """Return at most ``most`` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


# --- the plots


def figures_of(exported: dict[str, Any]) -> list[Figure]:
    """Return the plots of a study; a plot that cannot be drawn has the reason as its note."""
    if not exported["trials"]:
        return []
    wanted: list[tuple[str, Callable[[], tuple[Any, str]]]] = [
        ("Trials over time", partial(trials_over_time, exported)),
    ]
    if complete_trials(exported):
        several = len(exported["directions"]) > 1
        for number, name in enumerate(objectives(exported)):
            of = f" of {html.unescape(name)}" if several else ""
            wanted += [
                (f"Optimisation history{of}", partial(history, exported, number)),
                (f"Parameter importances{of}", partial(importances, exported, number)),
            ]
        wanted.append(("Parallel coordinates", partial(parallel_coordinates, exported)))
        if len(exported["directions"]) in (2, 3):
            wanted.append(("Pareto front", partial(pareto_front, exported)))
    if any(trial["intermediate"] for trial in exported["trials"]):
        wanted.append(("Intermediate values", partial(intermediate_values, exported)))
    return [draw(title, plot) for title, plot in wanted]


def draw(title: str, plot: Callable[[], tuple[Any, str]]) -> Figure:
    """Return a plot. An error in one plot must not lose the report."""
    try:
        figure, note = plot()
    except Exception as error:  # any error of Optuna and plotly
        return Figure(title, "", f"This cannot be drawn: {type(error).__name__}: {error}")
    figure.update_layout(title=None, template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 50})
    return Figure(title, figure.to_json(), note)


def trials_over_time(exported: dict[str, Any]) -> tuple[Any, str]:
    """Plot the number of ended trials over time, by state."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    thinned = False
    for state, colour in STATES.items():
        held = [trial["complete"] for trial in exported["trials"] if trial["state"] == state]
        ended = sorted(when for when in held if when is not None)
        points = evenly(list(enumerate(ended, 1)), MOST_POINTS)
        thinned = thinned or len(points) < len(ended)
        figure.add_scatter(
            x=[stamp(when) for _count, when in points], y=[count for count, _when in points], name=state.lower(),
            mode="lines+markers" if len(points) < 50 else "lines", line={"shape": "hv", "color": colour},
        )
    figure.update_layout(xaxis_title="UTC", yaxis_title="trials that have ended", showlegend=True)
    return figure, f"Of each state {MOST_POINTS} steps are drawn, evenly spaced." if thinned else ""


def history(exported: dict[str, Any], objective: int) -> tuple[Any, str]:
    """Plot the values of the trials, and the best value so far."""
    import optuna

    name = objectives(exported)[objective]
    trials = whole_trials(exported)
    study = rebuild(exported, trials)
    target = (lambda trial: trial.values[objective]) if len(exported["directions"]) > 1 else None
    figure = optuna.visualization.plot_optimization_history(study, target=target, target_name=name)
    notes = []
    for trace in figure.data:
        # if trials are missing, the positions of the others are not their numbers
        points = [(trials[place]["number"], y) for place, y in zip(trace.x, trace.y)]
        if len(points) > MOST_POINTS:
            notes.append(f"{MOST_POINTS} of {len(points)} points are drawn, evenly spaced, and each new best value.")
            kept = {points[0][0], *(x for x, _y in evenly(points, MOST_POINTS)), *new_best(points, exported, objective)}
            points = [point for point in points if point[0] in kept]
        trace.x, trace.y = [x for x, _y in points], [y for _x, y in points]
    infinite = sum(trial["state"] == "COMPLETE" for trial in trials) - len(complete_trials(exported))
    notes += [f"Complete trials with an infinite value, which are not drawn: {infinite}."] if infinite else []
    return figure, " ".join(dict.fromkeys(notes))


def new_best(points: list[tuple], exported: dict[str, Any], objective: int) -> set:
    """Return the positions at which the best value changes."""
    best = min if exported["directions"][objective] == "minimize" else max
    until = list(accumulate((y for _x, y in points), best))
    return {points[index][0] for index in range(1, len(points)) if until[index] != until[index - 1]}


def importances(exported: dict[str, Any], objective: int) -> tuple[Any, str]:
    """Plot each parameter's importance for the best tenth of the trials."""
    import optuna

    sign = 1 if exported["directions"][objective] == "minimize" else -1
    several = len(exported["directions"]) > 1
    ranked = best_first(exported, objective)
    chosen = evenly(ranked, MOST_COMPARED)
    figure = optuna.visualization.plot_param_importances(
        rebuild(exported, chosen), evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
        target=(lambda trial: sign * trial.values[objective]) if several else None,
        target_name=objectives(exported)[objective],
    )
    note = "By PED-ANOVA: the influence of each parameter on whether a trial is among the best tenth."
    if len(chosen) < len(ranked):
        note += f" {len(chosen)} of {len(ranked)} trials are compared, evenly from the best to the worst."
    return figure, note


def parallel_coordinates(exported: dict[str, Any]) -> tuple[Any, str]:
    """Plot one line per trial."""
    import optuna

    ranked = best_first(exported)
    chosen = evenly(ranked, MOST_LINES)
    used = Counter(literal(name) for trial in chosen for name in trial["params"])
    names = [name for name, _count in used.most_common(MOST_PARAMETERS)]
    # Later lines are drawn on top.
    figure = optuna.visualization.plot_parallel_coordinate(
        rebuild(exported, chosen[::-1]), params=names or None,
        target_name=objectives(exported)[0],
    )
    notes = [f"{len(chosen)} of {len(ranked)} trials are drawn, evenly from the best to the worst."]
    if len(chosen) == len(ranked):
        notes = []
    if len(used) > len(names):
        notes.append(f"Of {len(used)} parameters the {len(names)} that most trials have are shown.")
    return figure, " ".join(notes)


def pareto_front(exported: dict[str, Any]) -> tuple[Any, str]:
    """Plot the Pareto-optimal trials among all others."""
    import optuna

    complete = complete_trials(exported)
    chosen = evenly(complete, MOST_POINTS)
    note = f"{len(chosen)} of {len(complete)} trials are drawn, evenly spaced."
    figure = optuna.visualization.plot_pareto_front(rebuild(exported, chosen), target_names=objectives(exported))
    figure.update_traces(hoverinfo="x+y", hovertemplate=None)
    return figure, note if len(chosen) < len(complete) else ""


def intermediate_values(exported: dict[str, Any]) -> tuple[Any, str]:
    """Plot the intermediate values of the trials."""
    import optuna

    reported = [trial for trial in exported["trials"] if trial["intermediate"]]
    chosen = evenly(reported, MOST_CURVES)
    figure = optuna.visualization.plot_intermediate_values(rebuild(exported, chosen))
    most = MOST_STEPS // len(chosen)
    notes = [f"{len(chosen)} of {len(reported)} trials are drawn, evenly spaced."]
    if len(chosen) == len(reported):
        notes = []
    for trace, trial in zip(figure.data, chosen):
        trace.name = f"Trial{trial['number']}"
        points = list(zip(trace.x, trace.y))
        if len(points) > most:
            notes.append(f"Of a trial {most} steps are drawn, evenly spaced.")
            trace.x, trace.y = zip(*evenly(points, most))
    figure.update_layout(showlegend=False)
    return figure, " ".join(dict.fromkeys(notes))


# --- workers and outages


def running_over_time(studies: list[dict[str, Any]], log: dict[str, Any], until: float) -> Figure:
    """Plot the number of running trials and the outages; a running trial extends to the last known moment."""
    from plotly import graph_objects

    def plot() -> tuple[Any, str]:
        figure = graph_objects.Figure()
        notes = []
        most = 0
        for study, colour in zip(studies, COLOURS * len(studies)):
            steps = running_steps(study["trials"], until)
            if len(steps) > MOST_POINTS:
                notes.append(f"Of a study's {len(steps)} steps {MOST_POINTS} are drawn, each the highest of several.")
            points = highest(steps, MOST_POINTS)
            most = max([most, *(number for _when, number in points)])
            name = literal(f"{study['database']}/{study['name']}")
            figure.add_scatter(
                x=[stamp(when) for when, _number in points], y=[number for _when, number in points], name=name,
                mode="lines", line={"shape": "hv", "color": colour},
            )
        for outage in log["outages"]:
            ends = stamp(until if outage["ended"] is None else outage["ended"])
            figure.add_vrect(x0=stamp(outage["began"]), x1=ends, fillcolor=OUTAGE, opacity=0.25, line_width=1,
                             line_color=OUTAGE)
        figure.update_layout(xaxis_title="UTC", yaxis_title="running trials", showlegend=True)
        figure.update_yaxes(rangemode="tozero", dtick=1 if most < 10 else None)
        notes.append("From the times of the trials. Outages of the server are red.")
        return figure, " ".join(dict.fromkeys(notes))

    return draw("Running trials, and outages", plot)


def running_steps(trials: list[dict[str, Any]], until: float) -> list[tuple[float, int]]:
    """Return the times when the number of running trials changes, and the number; skip trials with an unknown end."""
    changes: Counter[float] = Counter()
    for trial in trials:
        runs, ended = trial["state"] == "RUNNING", trial["complete"]
        if trial["start"] is not None and (runs or ended is not None):
            changes[trial["start"]] += 1
            if not runs:
                changes[max(trial["start"], ended)] -= 1
    times = sorted(changes)
    steps = list(zip(times, accumulate(changes[when] for when in times)))
    return [*steps, (until, steps[-1][1])] if steps and steps[-1][0] < until else steps


def highest(steps: list[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """Return at most ``most`` steps and the last one, each the highest within its group of neighbours."""
    size = math.ceil(len(steps) / most)
    if size <= 1:
        return steps
    groups = (steps[start:start + size] for start in range(0, len(steps) - 1, size))
    return [*(max(group, key=lambda step: step[1]) for group in groups), steps[-1]]


def plotly_script() -> str:
    """Return the source of plotly.js."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def as_script(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return (value if isinstance(value, str) else json.dumps(value)).replace("<", "\\u003c")
