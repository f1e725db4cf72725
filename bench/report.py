#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the results of bench/storage.py into a page: a table between two marks, and a plot in a file of its own."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

FROM, TO = "<!-- bench/{} writes from here -->\n", "<!-- to here -->\n"
COLUMNS = (
    "workers", "storage", "trials/s", "of the manual's", "ask, ms", "tell, ms", "connections", "got in", "died"
)


def table(results: list[dict[str, Any]]) -> str:
    """Return one row per measurement."""
    manual = {result["workers"]: result["rate"] for result in results if result["way"] == "manual"}
    rows = [COLUMNS, ["---:" if name != "storage" else "---" for name in COLUMNS]]
    for result in results:
        base = manual.get(result["workers"])
        rows.append([
            f"{result['workers']:,}", result["way"], f"{result['rate']:.1f}",
            f"{result['rate'] / base:.2f}" if base else "–", latency(result["ask"]), latency(result["tell"]),
            "–" if result["connections"] is None else f"{result['connections']:,}",
            f"{result['in']:,}" + (f" in {result['in_seconds']:.1f} s" if result["in"] else ""), f"{result['died']:,}",
        ])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def latency(taken: dict[str, float] | None) -> str:
    return f"{taken['median']:.0f} / {taken['p99']:.0f}" if taken else "–"


def setting(machine: dict[str, Any]) -> str:
    """Return the conditions of the measurement."""
    pooler, proxy = (machine["settings"][name] for name in ("pooler", "proxy"))
    return (
        f"Measured on {machine['cores']} cores with {machine['gib']} GiB of memory and {machine['file_system']}, which"
        f" workers and servers shared: Optuna {machine['optuna']}, Python {machine['python']}, PostgreSQL"
        f" {machine['postgresql'].split()[0]} with `shared_buffers = {machine['shared_buffers']}`; `max_connections` is"
        f" 100 by the manual and {machine['max_connections']} here, TLS is off there and {machine['tls']} here;"
        f" PgBouncer has {pooler} connections, the proxy {proxy}. Workers are threads with a storage of their own in"
        f" {machine['processes']} processes.\n"
    )


def errors(results: list[dict[str, Any]]) -> str:
    """Return the most frequent errors of the workers that failed."""
    lines = [
        f"- {result['workers']:,} workers, {result['way']}: {count:,} × `{text.replace('`', '')}`\n"
        for result in results for text, count in result["errors"][:1]
    ]
    return "\nWhat most of those that died said:\n\n" + "".join(lines) if lines else ""


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the rates, the share of successful workers, and the latencies."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "hpc_db", "font.size": 9})
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
    titles = ("trials per second", "workers that got in and lived, %", "tell, median, ms")
    for way in dict.fromkeys(result["way"] for result in results):
        own = [result for result in results if result["way"] == way]
        for axis, values in zip(axes, (
            [(result["workers"], result["rate"]) for result in own],
            [(result["workers"], 100 * (result["in"] - result["died_inside"]) / result["workers"]) for result in own],
            [(result["workers"], result["tell"]["median"]) for result in own if result["tell"]],
        )):
            axis.plot(*zip(*values), marker="o", markersize=3, label=way)
    for axis, title in zip(axes, titles):
        axis.set(xscale="log", xlabel="workers", title=title)
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def write_page(path: Path, program: str, text: str) -> None:
    """Write a program's text between its marks on a page."""
    begins = FROM.format(program)
    page, found = re.subn(
        f"{re.escape(begins)}.*?{TO}", lambda _marks: f"{begins}\n{text}{TO}", path.read_text(), flags=re.DOTALL
    )
    if not found:
        raise SystemExit(f"{path} has no line {begins.strip()}")
    path.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="result file of bench/storage.py")
    parser.add_argument("page", type=Path, help="the page with the marks; the plot gets its name")
    arguments = parser.parse_args()
    content = json.loads(arguments.figures.read_text())
    results = content["results"]
    image = arguments.page.with_suffix(".svg")
    plot(results, image)
    text = "\n".join([
        setting(content["machine"]), f"![Trials per second, workers that got in, and latency]({image.name})\n",
        table(results) + errors(results), "",
    ])
    write_page(arguments.page, "report.py", text)


if __name__ == "__main__":
    main()
