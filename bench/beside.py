#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure what the server in a worker's job costs the training beside it. Writes a page's table.

A loop that only computes has one processor for itself; the server of a hundred workers has the same processor or
another one, in turns. Run it while nothing else runs.

    bench/beside.py docs/figures/performance.md
    bench/beside.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from at_rest import below, find, megabytes, server_used, used
from provision import CACHE, bury_children_of_others, machine, places
from report import write_page

WORKERS = 100
# Seconds of a trial, which are short for a training.
TRIAL = 20.0
# Seconds that the loop computes in one turn, and turns.
TURN, TURNS = 10.0, 12
MOST_PERCENT = 2.0
TRAINING, OTHERS = {0}, {1}
# Threads with a storage of their own, in a few processes.
LOAD = """
import os, sys, threading, time
import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
seconds = float(sys.argv[1])

def objective(trial):
    for name in "xyz":
        trial.suggest_float(name, 0, 1)
    time.sleep(seconds)
    return 0.0

def work(number):
    time.sleep(seconds * number / 25)
    storage = optuna.storages.RDBStorage(os.environ["HPC_DB_URL"])
    sampler = optuna.samplers.RandomSampler()
    optuna.load_study(study_name="bench", storage=storage, sampler=sampler).optimize(objective)

for number in range(25):
    threading.Thread(target=work, args=(number,), daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


def compute(loops: int) -> float:
    """Compute; return the seconds that it took."""
    began = time.perf_counter()
    total = 0
    for number in range(loops):
        total += number * number % 7
    return time.perf_counter() - began


def bind(pid: int, processors: set[int]) -> None:
    """Bind a process and all its descendants to processors."""
    for each in [pid, *below(pid)]:
        with contextlib.suppress(OSError):  # it has ended
            for task in Path(f"/proc/{each}/task").iterdir():
                os.sched_setaffinity(int(task.name), processors)


def measure(pid: int, turns: int) -> dict[str, float]:
    """Return the slowdown of the training in percent, and what the server uses meanwhile."""
    os.sched_setaffinity(0, TRAINING)
    loops = int(1_000_000 * TURN / compute(1_000_000))
    bind(pid, OTHERS)
    compute(loops)
    began, before, server_before = time.monotonic(), used(pid), server_used(pid)
    alone = beside = 0.0
    for _turn in range(turns):
        bind(pid, OTHERS)
        alone += compute(loops)
        bind(pid, TRAINING)
        beside += compute(loops)
    took, after = time.monotonic() - began, used(pid)
    spent = sum(seconds - server_before.get(child, 0.0) for child, seconds in server_used(pid).items())
    memory = sum(megabytes(child, "Pss") for child, name in below(pid).items() if name == "postgres")
    ours = after.own + after.children - before.own - before.children
    return {
        "slower": 100 * (beside / alone - 1), "server": 100 * spent / took, "supervisor": 100 * ours / took,
        "memory": memory, "seconds": took,
    }


def text_of(found: dict[str, float], where: str) -> str:
    """Return the table as Markdown."""
    lines = [
        ("what", "measured", "target"), ("---", "---:", "---:"),
        ("a computation on the same processor takes longer by", f"{found['slower']:.1f} %", f"≤ {MOST_PERCENT:.0f} %"),
        ("the server: CPU", f"{found['server']:.1f} % of a core", "–"),
        ("the supervisor and its programs: CPU", f"{found['supervisor']:.2f} % of a core", "–"),
        ("the server: memory, PSS", f"{found['memory']:.0f} MB", "–"),
    ]
    over = f"{WORKERS} workers with trials of {TRIAL:.0f} s, over {found['seconds'] / 60:.0f} minutes, on {where}."
    return f"{over}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page to update; by default the table is printed")
    parser.add_argument("--quick", action="store_true", help="two turns only")
    arguments = parser.parse_args()
    bury_children_of_others()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpc-db-bench-")))
        (place,) = stack.enter_context(places(["local"], folder))
        place.describe({"server_placement": "workers", "databases_workers": WORKERS})
        for playbook in ("hpc_db.yml", "workers.yml"):
            place.run(place.play([playbook]), HPC_DB_PROFILE=os.devnull)
        root = place.home / "hpc_db" / "bench"
        (place.home / "load.py").write_text(LOAD)
        turns = 2 if arguments.quick else TURNS
        seconds = 2 * TRIAL + 2 * TURN * (turns + 3)
        load_command = f"{root}/python/bin/python load.py {TRIAL} {seconds}"
        script = f"cd; . {root}/workers/environment; for n in 1 2 3 4; do {load_command} & done; wait"
        with subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, OTHERS)), "sh", "-c", script], env=place.environment,
            stdin=subprocess.DEVNULL, user=place.user.pw_uid, group=place.user.pw_gid, extra_groups=[],
        ) as load:
            time.sleep(2 * TRIAL)  # all workers have begun
            results = measure(find(root, "candidate"), turns)
            load.terminate()
        place.clear()
    (CACHE / "beside.json").write_text(json.dumps(results, indent=1) + "\n")
    text = text_of(results, machine())
    if arguments.page:
        write_page(arguments.page, "beside.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
