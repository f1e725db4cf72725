# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report as one HTML file: all data from databases is escaped, and the file loads nothing from the network."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable
from html import escape as escape_html
from typing import Any

from ansible_collections.mala.hpc_db.plugins.module_utils._figures import Figure, as_script, best_first
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable

MOST_BEST = 5
LONGEST_TEXT = 200

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #20262c; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccd3da; padding-bottom: .2em; }
h3 { margin-bottom: .2em; } h1, h2, h3, td { overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .15em 1.2em .15em 0; }
thead th { border-bottom: 1px solid #ccd3da; } tbody th { font-weight: normal; color: #5f6b76; }
.plot { height: 420px; } .note { color: #5f6b76; margin: .2em 0; } .bad { color: #b3373c; }
"""
# A plot is drawn shortly before it scrolls into view, because many plots take long; before printing, all are drawn.
SCRIPT = """
const draw = place => {
  if (place.dataset.drawn) return;
  place.dataset.drawn = 'yes';
  const figure = JSON.parse(document.getElementById(place.id + '-data').textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false});
};
const places = document.querySelectorAll('.plot');
const seen = new IntersectionObserver(
  entries => entries.filter(entry => entry.isIntersecting).forEach(entry => draw(entry.target)),
  {rootMargin: '600px'});
places.forEach(place => seen.observe(place));
window.addEventListener('beforeprint', () => places.forEach(draw));
"""
# The nonce blocks scripts in names of studies; plotly.js needs unsafe-eval, since it compiles some of its code.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; form-action 'none'; base-uri 'none'"
)


def escape(text: str) -> str:
    """Return HTML that shows the text, with unprintable characters escaped."""
    return escape_html(printable(text))


def when(seconds: float | None) -> str:
    """Return a time in readable form."""
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def span(seconds: float) -> str:
    """Return a duration in readable form."""
    whole = max(0, int(seconds))
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def size(number: float) -> str:
    """Return a number of bytes in readable form."""
    power = min(int(math.log(max(number, 1), 1024)), 4)
    return f"{number / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def shown(value: Any) -> str:
    """Return a value as text, shortened if it is long."""
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def table(rows: Iterable[tuple], head: tuple = ()) -> str:
    """Return a table; without a head the first column contains the row names."""
    cell = "".join
    lines = [
        cell(f"<th>{escape(str(each))}</th>" if not head and not number else f"<td>{escape(str(each))}</td>"
             for number, each in enumerate(row))
        for row in rows
    ]
    top = f"<thead><tr>{cell(f'<th>{escape(each)}</th>' for each in head)}</tr></thead>" if head else ""
    return f"<table>{top}<tbody>{cell(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"


def note(text: str, kind: str = "note") -> str:
    """Return a paragraph; empty if the text is empty."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def plot(figure: Figure, name: str) -> str:
    """Return a plot's element and its data."""
    place = (
        f'<div class="plot" id="{name}"></div>'
        f'<script type="application/json" id="{name}-data">{as_script(figure.content)}</script>'
    ) if figure.content else ""
    return f"<h3>{escape(figure.title)}</h3>{note(figure.note)}{place}"


def status_rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the server's status."""
    job, endpoint, state, server = (status[name] for name in ("job", "endpoint", "state", "server"))
    rows = [("instance", f"{status['instance']} on {status['cluster']}")]
    if job is None:
        rows.append(("job", "none in the queue: the server is not running"))
    else:
        rows.append(("job", " ".join(filter(None, [job["id"], job["state"], job["node"], job["reason"]]))))
        if job["time_left"] is not None:
            total = "" if job["time_limit"] is None else f" of {span(job['time_limit'])}"
            rows.append(("time left", span(job["time_left"]) + total))
    if state is not None:
        rows.append(("state", f"{state['state']}: {state['reason']}, since {when(state.get('since'))}"))
    if server is not None and endpoint is not None:
        rows.append(("endpoint", f"{endpoint['host']} port {endpoint['port']}, since {when(endpoint.get('since'))}"))
        rows.append(("PostgreSQL", server["version"]))
        rows.append(("connections", f"{server['connections']['used']} of {server['connections']['max']}"))
        rows += [("", f"{each['count']} of {each['user']} from {each['host']}")
                 for each in server["connections"]["clients"]]
        rows += [("database" if not number else "", f"{each['name']}, {size(each['size'])}")
                 for number, each in enumerate(server["databases"])]
    else:
        rows.append(("endpoint", "none: the server accepts no connections now"))
    if status["disk"] is not None:
        rows.append(("disk", f"{size(status['disk']['free'])} free of {size(status['disk']['total'])}"))
    return [*rows, ("URL", status["url"])]


def outages(log: dict[str, Any], until: float) -> str:
    """Return the times at which the server was unavailable."""
    if log["since"] is None:
        return note("There are no events of a server job yet.")
    rows = []
    for kind, found in (("away", log["outages"]), ("unhealthy", log["troubles"])):
        for each in found:
            length = span((until if each["ended"] is None else each["ended"]) - each["began"])
            rows.append((
                when(each["began"]) + ("" if each["certain"] else " or later"),
                "still going on" if each["ended"] is None else when(each["ended"]),
                length if each["certain"] else f"at most {length}",
                kind, each["reason"] or "killed, or its node failed: no message",
            ))
    told = f"From log/events.jsonl of the instance since {when(log['since'])}. "
    told += "A killed server writes no message: only the first line of its successor is known then."
    if not rows:
        return note(f"{told} There was no outage.")
    return note(told) + table(sorted(rows), ("from", "until", "for", "", "message of the server"))


def counts(study: dict[str, Any]) -> str:
    """Return the number of trials in each state."""
    states = Counter(trial["state"].lower() for trial in study["trials"])
    number = len(study["trials"])
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{number} trial{'' if number == 1 else 's'}: {told}" if number else "no trials yet"


def study_or_why(study: dict[str, Any], figures: list[Figure], name: str) -> str:
    """Return a study's section, or why it cannot be shown: an error in one study must not lose the others."""
    try:
        return study_section(study, figures, name)
    except Exception as error:  # a value of an unexpected type
        why = note(f"This study cannot be shown: {type(error).__name__}: {error}", "bad")
        return f"<section><h2>{escape(study['database'])}/{escape(study['name'])}</h2>{why}</section>"


def study_section(study: dict[str, Any], figures: list[Figure], name: str) -> str:
    """Return the section of a study."""
    parts = [f"<h2>{escape(study['database'])}/{escape(study['name'])}</h2>"]
    aims = ", ".join(study["directions"])
    parts.append(note(f"{counts(study)}. Aim: {aims}."))
    parts += [note(odd, "bad") for odd in study.get("odd", [])]
    if study["attributes"]:
        parts.append(table((key, shown(value)) for key, value in sorted(study["attributes"].items())))
    best = best_first(study)[:MOST_BEST]
    if best:
        first = "by the first objective" if len(study["directions"]) > 1 else ""
        rows = [
            (
                trial["number"], ", ".join(map(shown, trial["values"])),
                *(", ".join(f"{key} = {shown(value)}" for key, value in sorted(held.items()))
                  for held in (parameters(study, trial), trial["attributes"])),
            )
            for trial in best
        ]
        parts.append(f"<h3>Best trials {first}</h3>")
        parts.append(table(rows, ("trial", "values", "parameters", "attributes")))
    elif study["trials"]:
        parts.append(note("No trial is complete with a finite value, so no trials can be compared."))
    parts += [plot(figure, f"{name}-{number}") for number, figure in enumerate(figures)]
    return "<section>" + "".join(parts) + "</section>"


def parameters(study: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters as the objective function received them."""
    from optuna.distributions import json_to_distribution

    return {
        name: json_to_distribution(study["distributions"][index]).to_external_repr(value)
        for name, (index, value) in trial["params"].items()
    }


def source(status: dict[str, Any]) -> str:
    """Return the source of the studies."""
    if status["server"]:
        return "The studies were read from the running server."
    if not status["job"]:
        return "The server is not running: a temporary server has read the studies."
    return "The server is not running yet: the studies are those of the last report, if any."


def page(
    status: dict[str, Any], held: dict[str, Any], running: Figure | None, figures: list[list[Figure]], digest: str,
    plotly: str,
) -> str:
    """Return the whole file."""
    nonce = digest[:32]
    title = escape(f"{status['instance']} on {status['cluster']}")
    sections = [study_or_why(study, each, f"plot-{number}")
                for number, (study, each) in enumerate(zip(held["studies"], figures))]
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta name="mala.hpc_db" content="{digest}">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce=nonce)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        note(f"Written {when(status['read'])}; all times are UTC. {source(status)}"),
        "<h2>Status</h2>", table(status_rows(status)),
        "".join(note(problem, "bad") for problem in held["problems"]),
        "<h2>Outages</h2>", outages(status["log"], status["read"]),
        plot(running, "plot-running") if running else "",
        "<h2>Studies</h2>" if held["studies"] else note("No studies are known."),
        table(((f"{study['database']}/{study['name']}", counts(study)) for study in held["studies"]), ()),
        *sections,
        f'<script nonce="{nonce}">{plotly}</script>' if running else "",
        f'<script nonce="{nonce}">{SCRIPT}</script>' if running else "",
        "</body></html>\n",
    ])
