#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the resources of an idle instance: those of the supervisor and of the server. Writes a page's table.

Runs in a job of the test cluster if started by root, otherwise on this machine. All figures are counted by the kernel,
so measuring adds nothing to them; run it while nothing else runs nevertheless.

    bench/at_rest.py docs/figures/performance.md
    bench/at_rest.py --quick --place local
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from provision import CACHE, PLACES, bury_children_of_others, machine, places
from report import write_page

SECONDS = 600.0
# Seconds between two readings of memory and processes.
PAUSE = 5.0
TICKS = os.sysconf("SC_CLK_TCK")
MOST_MB, MOST_PERCENT = 20.0, 0.1


class Used(NamedTuple):
    """Resources used by a process so far: its CPU seconds, those of its ended children, and its read and write calls.

    The calls are only its own; what they read or wrote is unknown.
    """

    own: float
    children: float
    calls: int


def find(root: Path, verb: str = "serve") -> int:
    """Return the supervisor's PID, in any PID namespace."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"hpc_db_host" in words and verb.encode() in words and os.fsencode(root) in words:
                found.append(int(folder.name))
    if len(found) != 1:
        raise SystemExit(f"at_rest.py: {len(found)} supervisors of {root} are running, instead of one")
    return found[0]


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat, beginning with the state."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def used(pid: int) -> Used:
    fields = stat_of(pid)
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    calls = sum(int(line.split()[1]) for line in lines if line.startswith("sysc"))
    own, children = (sum(map(int, fields[at:at + 2])) / TICKS for at in (11, 13))
    return Used(own, children, calls)


def megabytes(pid: int, kind: str) -> float:
    """Return the process's memory in MB: ``Pss`` divides shared pages among their processes, ``Rss`` does not."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def below(pid: int) -> dict[int, str]:
    """Return all descendants of the process, with their names."""
    children: dict[int, list[int]] = {}
    names = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (folder / "stat").read_text(errors="replace")
            parent, child = int(text.rpartition(")")[2].split()[1]), int(folder.name)
            children.setdefault(parent, []).append(child)
            names[child] = text.partition("(")[2].rpartition(")")[0]
    found, left = {}, [pid]
    while left:
        for child in children.get(left.pop(), []):
            found[child] = names[child]
            left.append(child)
    return found


def server_used(pid: int) -> dict[int, float]:
    """Return the CPU seconds of each server process."""
    found = {}
    for child, name in below(pid).items():
        with contextlib.suppress(OSError):  # the process has ended
            if name == "postgres":
                found[child] = used(child).own
    return found


def watch(pid: int, seconds: float) -> dict[str, float]:
    """Return the use of CPU and memory during that time."""
    pss, rss, server, counts = [], [], [], []
    began, before, server_before = time.monotonic(), used(pid), server_used(pid)
    while time.monotonic() < began + seconds:
        time.sleep(PAUSE)
        pss.append(megabytes(pid, "Pss"))
        rss.append(megabytes(pid, "Rss"))
        now = below(pid)
        counts.append(len(now))
        # A server process may end during the reading.
        with contextlib.suppress(OSError, StopIteration):
            server.append(sum(megabytes(child, "Pss") for child, name in now.items() if name == "postgres"))
    took, after = time.monotonic() - began, used(pid)
    spent = [seconds - server_before[child] for child, seconds in server_used(pid).items() if child in server_before]
    return {
        "seconds": took, "pss": max(pss), "rss": max(rss), "own": 100 * (after.own - before.own) / took,
        "children": 100 * (after.children - before.children) / took, "calls": (after.calls - before.calls) / took,
        "server_pss": statistics.median(server), "server_processes": statistics.median(counts),
        "server": 100 * sum(spent) / took,
    }


def text_of(found: dict[str, float], place: str, where: str) -> str:
    """Return the table as Markdown."""
    lines = [
        ("memory, PSS", f"{found['pss']:.1f} MB", f"< {MOST_MB:.0f} MB"),
        ("memory, RSS (with what it shares)", f"{found['rss']:.1f} MB", f"< {MOST_MB:.0f} MB"),
        ("CPU, its own", f"{found['own']:.3f} % of a core", f"< {MOST_PERCENT} %"),
        ("CPU of `psql` and other programs that it runs", f"{found['children']:.3f} % of a core", "–"),
        ("its calls that read or write", f"{found['calls']:.1f} a second", "–"),
        ("the server: processes", f"{found['server_processes']:.0f}", "–"),
        ("the server: memory, PSS", f"{found['server_pss']:.1f} MB", "–"),
        ("the server: CPU", f"{found['server']:.3f} % of a core", "–"),
    ]
    heads = [("what", "at rest", "target"), ("---", "---:", "---:")]
    over = f"Over {found['seconds'] / 60:.1f} minutes with no client, at {place}, on {where}; memory is the most seen."
    return f"{over}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in heads + lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page to update; by default the table is printed")
    parser.add_argument("--place", choices=PLACES[:2], default=PLACES[0] if os.geteuid() else PLACES[1],
                        help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a test run of one minute")
    arguments = parser.parse_args()
    bury_children_of_others()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpc-db-bench-")))
        (place,) = stack.enter_context(places([arguments.place], folder))
        place.describe({})
        place.run(place.play(["hpc_db.yml"]), HPC_DB_PROFILE=os.devnull)
        place.disconnect()
        results = watch(find(place.home / "hpc_db" / "bench"), 60.0 if arguments.quick else arguments.seconds)
        place.clear()
    (CACHE / "at_rest.json").write_text(json.dumps(results, indent=1) + "\n")
    text = text_of(results, arguments.place, machine())
    if arguments.page:
        write_page(arguments.page, "at_rest.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
