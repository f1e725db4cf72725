# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A dump made while workers write contains every trial that was acknowledged before it began."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from mini_cluster import COMPARE, URL, MiniCluster

DRILL = "postgresql+psycopg2://alice@/drill?service=hpc_db"  # workers can only log in to the databases of the inventory
SAME = f"""
exec hpc_db/hpc_db/python/bin/python - <<'END'
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)
live, restored = (
    {{trial.number: trial for trial in optuna.load_study(storage=url, study_name="beryllium").trials}}
    for url in ("{URL}", "{DRILL}")
)
done = [number for number, trial in restored.items() if trial.state.is_finished()]
def best(trials):
    return min(trials[number].value for number in done if trials[number].value is not None)
assert list(restored) == list(range(len(restored)))
assert all(restored[number] == live[number] for number in done)
print(len(done), best(restored) == best(live))
END
"""


@pytest.fixture
def no_drill(cluster: MiniCluster) -> Iterator[None]:
    yield
    bindir = cluster.settings()["bindir"].replace(" ", "\\ ")
    cluster.run(f"{bindir}/psql -X -d 'service=hpc_db user=alice dbname=mala' -c 'DROP DATABASE IF EXISTS drill'")
    cluster.run("rm -rf before")


@pytest.mark.usefixtures("no_drill")
def test_restore_drill(cluster: MiniCluster, figure: Callable[[str, str], None]) -> None:
    cluster.run("mkdir before && cp workers/log.* before")
    for playbook, settings in (("backup", {}), ("restore", {"restore_database": "drill"})):
        dumps = sorted((cluster.root / "dumps").glob("mala-*.dump"))
        if playbook == "restore":
            settings["restore_from"] = f"/home/alice/hpc_db/hpc_db/dumps/{dumps[-1].name}"
        played = cluster.playbooks.play(playbook, settings)
        assert played.returncode == 0, played.stdout

    promised = cluster.run(COMPARE.replace("workers/log", "before/log"), DRILL)
    assert re.search(r" lost=0 doubled=0 ", promised), promised
    finished, is_best = cluster.run(SAME).split()
    assert is_best == "True"
    figure("B1", f"{finished} trials restored and compared, beside 8 workers; best value identical")
