#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure hpc_db.yml for growing numbers of studies, databases, instances and workers. Writes a page's table.

Measures a run from nothing, a run with one more item in each instance, and a run without changes. Uses the test cluster
if run by root, so that the shares of workstation and login node are separate; otherwise this machine.

    bench/growth.py docs/figures/performance.md
    bench/growth.py --quick --place local
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from provision import CACHE, PLACES, Figures, Place, bury_children_of_others, machine, measure, places, shown
from report import write_page

NEW, MORE, AGAIN = STEPS = ("from nothing", "one more", "nothing to do")
STUDIES, DATABASES, INSTANCES, WORKERS = "studies", "databases", "instances", "workers"
Counts = dict[str, tuple[int, ...]]
QUICK: Counts = {STUDIES: (1, 10), DATABASES: (1, 2), INSTANCES: (1, 2), WORKERS: (10, 100)}
WHOLE: Counts = {STUDIES: (1, 10, 100), DATABASES: (1, 10), INSTANCES: (1, 4, 8), WORKERS: (10, 100, 1000)}
# Main costs of each additional item.
BOUNDS = {
    STUDIES: "one process makes them one after another, through Optuna, with a few commits each",
    DATABASES: "a step of `community.postgresql` each; the server copies a template, and Optuna makes the tables",
    INSTANCES: (
        "a process of Ansible's for each step of each instance, on the workstation's cores, in as many `forks` as"
        " `ansible.cfg` says (8); the login node's share, on the same cores here, is each cluster's own in life"
    ),
    WORKERS: "two lines of the configuration, so a run costs the same for any number",
}


class Case(NamedTuple):
    """A number of items: the settings of each instance at first, and with one more item.

    Without ``before`` it continues with the instance of the previous case.
    """

    unit: str
    number: int
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def studies(number: int) -> list[dict[str, Any]]:
    return [{"name": f"study{each}"} for each in range(number)]


def databases(number: int) -> dict[str, Any]:
    return {"databases_studies": [{"name": f"studies{each}", "studies": studies(1)} for each in range(number)]}


def in_one_database(number: int) -> dict[str, Any]:
    return {"databases_studies": [{"name": "studies", "studies": studies(number)}]}


def cases(counts: Counts) -> list[Case]:
    """Return the cases to measure. The case of one study also is the one of one database and of one instance."""
    one = in_one_database(1)
    # Enough memory for the highest number of workers, so that no warning appears.
    memory = {"instance_memory": "16G"}
    return [
        *(Case(STUDIES, n, [in_one_database(n)], [in_one_database(n + 1)]) for n in reversed(counts[STUDIES])),
        *(Case(WORKERS, n, [], [{**one, **memory, "databases_workers": n}]) for n in counts[WORKERS]),
        *(Case(DATABASES, n, [databases(n)], [databases(n + 1)]) for n in counts[DATABASES] if n > 1),
        *(Case(INSTANCES, n, n * [one], n * [in_one_database(2)]) for n in counts[INSTANCES] if n > 1),
    ]


def measure_case(place: Place, case: Case) -> dict[str, Figures]:
    """Measure each step of a case."""
    figures = {}
    if case.before:
        place.clear()
        place.describe(*case.before)
        figures[NEW] = play(place)
    place.describe(*case.after)
    figures[MORE], figures[AGAIN] = play(place), play(place)
    for step, figure in figures.items():
        print(f"{case.number:5} {case.unit:9} {step:13} {figure.wall:7.2f} s  {figure.cpu:6.2f} s of CPU"
              f"  {figure[2:]}", flush=True)
    return figures


def play(place: Place) -> Figures:
    return measure(place, place.play(["hpc_db.yml"]), HPC_DB_PROFILE=os.devnull)


def sizes(place: Place) -> dict[str, str]:
    """Return the sizes in PostgreSQL's configuration."""
    lines = place.shell("cat hpc_db/bench/conf/postgresql-*.conf").splitlines()
    settings = dict(line.split(" = ", 1) for line in lines if " = " in line)
    return {name: settings[name].strip("'") for name in ("max_connections", "shared_buffers", "work_mem")}


def round_of(place: Place, wanted: list[Case]) -> list[dict[str, Any]]:
    """Measure all cases once, after a first run that fills the disk cache."""
    results = []
    place.describe({})
    play(place)
    for case in wanted:
        figures = {step: figure._asdict() for step, figure in measure_case(place, case).items()}
        more = {"sizes": sizes(place)} if case.unit == WORKERS else {}
        results.append({"unit": case.unit, "number": case.number, "figures": figures, **more})
    place.clear()
    # The case with one item is the same for all of these units.
    one = next(result for result in results if result["number"] == 1)
    return results + [{**one, "unit": unit} for unit in (DATABASES, INSTANCES)]


# --- the page


def median(rounds: list[list[dict[str, Any]]], unit: str, count: int, step: str, figure: str) -> float | None:
    values = [
        result["figures"][step][figure] for each in rounds for result in each
        if (result["unit"], result["number"]) == (unit, count) and step in result["figures"]
    ]
    return None if not values or None in values else statistics.median(values)


def text_of(rounds: list[list[dict[str, Any]]], counts: Counts, place: str, where: str) -> str:
    """Return the tables as Markdown."""
    often = f"Medians of {len(rounds)}" if len(rounds) > 1 else "Once"
    return "\n".join([
        f"{often}, at {place}, on {where}. In each cell: seconds, then CPU seconds on the workstation"
        f"{' + on the login node' if place != PLACES[0] else ', which is all of it'}.\n",
        figures_table(rounds, counts), units_table(rounds, counts), workers_table(rounds[-1]),
    ])


def figures_table(rounds: list[list[dict[str, Any]]], counts: Counts) -> str:
    lines: list[tuple[str, ...]] = [("what there is", *STEPS), ("---", "---:", "---:", "---:")]
    for unit, numbers in counts.items():
        for count in numbers:
            cells = [
                cell([median(rounds, unit, count, step, figure) for figure in ("wall", "cpu", "cpu_there")], 1)
                for step in STEPS
            ]
            lines.append((f"{unit}: {count:,}", *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(values: list[float | None], digits: int) -> str:
    wall, here, there = values
    if wall is None:
        return "–"
    return f"{shown(wall, digits)} ({shown(here, digits)}{'' if there is None else f' + {shown(there, digits)}'})"


def units_table(rounds: list[list[dict[str, Any]]], counts: Counts) -> str:
    """Return the cost per unit: the difference between the largest and the smallest case, divided by their distance."""
    lines: list[tuple[str, ...]] = [
        ("one more of", *STEPS, "what bounds it"), ("---", "---:", "---:", "---:", "---"),
    ]
    for unit, numbers in counts.items():
        cells = []
        for step in STEPS:
            few, many = (
                [median(rounds, unit, count, step, figure) for figure in ("wall", "cpu", "cpu_there")]
                for count in (numbers[0], numbers[-1])
            )
            a_unit = [
                None if last is None or first is None else (last - first) / (numbers[-1] - numbers[0])
                for first, last in zip(few, many)
            ]
            cells.append(cell(a_unit, 3))
        lines.append((unit, *cells, BOUNDS[unit]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def workers_table(results: list[dict[str, Any]]) -> str:
    found = [result for result in results if result["unit"] == WORKERS]
    names = list(found[0]["sizes"])
    lines = [("`databases_workers`", *(f"`{name}`" for name in names)), ("---:", *("---:" for _name in names))]
    lines += [(f"{result['number']:,}", *result["sizes"].values()) for result in found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page to update; by default the table is printed")
    parser.add_argument("--place", choices=PLACES, default=PLACES[0] if os.geteuid() else PLACES[1],
                        help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="number of measurements (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small test run")
    arguments = parser.parse_args()
    counts = QUICK if arguments.quick else WHOLE
    bury_children_of_others()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpc-db-bench-")))
        (place,) = stack.enter_context(places([arguments.place], folder))
        rounds = [round_of(place, cases(counts)) for _round in range(arguments.repeats)]
    (CACHE / "growth.json").write_text(json.dumps(rounds, indent=1) + "\n")
    text = text_of(rounds, counts, arguments.place, machine())
    if arguments.page:
        write_page(arguments.page, "growth.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
