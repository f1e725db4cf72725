# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps as users make and restore them, and as the hosting program makes them, of a study with real trials."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from target import Target

FIRST = f"it{os.getpid()}"
SECOND = f"{FIRST}b"

WORK = """
import optuna
study = optuna.create_study(storage="postgresql+psycopg2:///?service={0}", study_name="be", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_float("y", 0, 1), n_trials={1})
"""
DRILL = """
import optuna
for study in optuna.get_all_study_names("postgresql+psycopg2:///?service={0}"):
    study = optuna.load_study(storage="postgresql+psycopg2:///?service={0}", study_name=study)
    print(study.study_name, len(study.trials), study.best_value, study.best_trial)
"""
# The hosting program's part, on a folder of its own.
ROUND = """
import json, sys, types
from hpc_db_host.dumps import Dumps
settings = json.load(open("settings.json"))
settings.update(root=sys.argv[1], databases=["studies"], dump_minutes=0, dump_keep=2)
dumps = Dumps(settings, types.SimpleNamespace(**json.load(open("../run/endpoint.json"))))
print(dumps.now(float(sys.argv[2]), lambda: None), dumps.told)
"""
LOCK = """
psql -c 'BEGIN; LOCK TABLE trials; SELECT pg_sleep(60)' > /dev/null 2>&1 &
until [ "$(psql -c "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")" = 1 ]; do sleep 0.05; done
program &
program=$!
until pgrep -P $program pg_dump; do sleep 0.05; done > /dev/null
"""
UNLOCK = """
psql -c "SELECT pg_terminate_backend(pid, 9999) FROM pg_stat_activity WHERE wait_event = 'PgSleep'" > /dev/null
"""


class Studies:
    """An instance with a study, and what its owner does with it."""

    def __init__(self, target: Target, name: str) -> None:
        self.target, self.name = target, name
        # no dumps but those that the tests make
        played = target.play("hpc_db", {"instance_name": name, "server_dump_minutes": 0})
        assert played.returncode == 0, played.stdout

    def play(self, playbook: str, **settings: object) -> str:
        played = self.target.play(playbook, {"instance_name": self.name, **settings})
        assert played.returncode == 0, played.stdout
        return played.stdout

    def refusal(self, **settings: object) -> str:
        """Return the message of the one task that failed, after a look that nothing has changed."""
        before = self.held()
        played = self.target.play("restore", {"instance_name": self.name, **settings})
        assert played.returncode != 0
        assert self.held() == before
        assert len(re.findall(r"^(?:fatal|failed): \[", played.stdout, re.MULTILINE)) == 1, played.stdout
        return " ".join(re.findall(r"^ +msg: (.*(?:\n {8,}.*)*)", played.stdout, re.MULTILINE)[-1].split())

    def held(self) -> list[str]:
        """Return dumps, databases, and the trials."""
        databases = self.psql("SELECT oid, datname FROM pg_database ORDER BY 1")
        return [*self.dumps(), databases, self.psql("SELECT md5(string_agg(trials::text, '' ORDER BY 1)) FROM trials")]

    def python(self, script: str, *values: object) -> str:
        script = script.format(self.name, *values)
        return self.target.run(f"~/hpc_db/{self.name}/python/bin/python - 2>/dev/null <<'EOF'\n{script}\nEOF")

    def work(self, trials: int) -> None:
        self.python(WORK, trials)

    def drill(self) -> str:
        """Return name, number of trials, best value and all of the best trial of each study, as Optuna reads them."""
        return self.python(DRILL)

    def shell(self, script: str) -> str:
        """Run a script where the hosting program is, with psql for the owner."""
        psql = f"""psql() {{ command "$bin/psql" -XAtq "service={self.name} user=$USER dbname=studies" "$@"; }}"""
        bin_ = """bin=$(python3 -c 'import json; print(json.load(open("settings.json"))["bindir"])')"""
        return self.target.run(f"cd ~/hpc_db/{self.name}/host\n{bin_}\n{psql}\n{script}")

    def psql(self, statement: str) -> str:
        return self.shell(f'psql -c "{statement}"')

    def dumps(self) -> list[str]:
        return self.target.run(f"ls -A ~/hpc_db/{self.name}/dumps").split()


@pytest.fixture(scope="module")
def studies(here: Target) -> Studies:
    studies = Studies(here, FIRST)
    studies.work(20)
    return studies


@pytest.fixture(scope="module")
def fetched(studies: Studies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the study, on the workstation."""
    folder = tmp_path_factory.mktemp("workstation") / "new" / "folder"
    said = studies.play("backup", backup_fetch=str(folder))
    assert re.search(r"^studies: 20 trials in /\S+\.dump$", said, re.MULTILINE)
    return next(folder.glob("studies-*.dump"))


def test_dump_is_complete_and_nobody_else_s(studies: Studies, fetched: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in fetched.parent.iterdir()}

    assert modes == {fetched.name: 0o600, f"{fetched.name}.sha256": 0o600}
    assert studies.dumps() == sorted(modes)
    assert studies.shell("cd ../dumps; stat -c %a *; sha256sum -c *.sha256").split() == [
        "600", "600", f"{fetched.name}:", "OK"
    ]


def test_newest_dump_brings_back_what_was_there(studies: Studies, fetched: Path) -> None:
    before = studies.drill()
    studies.work(5)

    assert "restore_database: studies holds 1 studies with 25 trials; with restore_replace=true" in studies.refusal(
        restore_from="newest"
    )
    said = studies.play("restore", restore_from="newest", restore_replace=True)

    assert studies.drill() == before
    kept = re.findall(r"^studies: 20 trials from newest; .* kept as the database (studies-\w+)$", said, re.MULTILINE)
    names = studies.psql("SELECT datname FROM pg_database WHERE datname LIKE 'studies%' ORDER BY 1").split()
    assert names == ["studies", *kept]
    assert studies.psql("SELECT count(*) FROM trials") == "20"
    count = "psql -d \"service=$name user=$USER dbname={}\" -c 'SELECT count(*) FROM trials'"
    assert studies.shell(f"name={FIRST}; {count.format(kept[0])}") == "25"


def test_fetched_dump_brings_the_study_to_another_instance(here: Target, studies: Studies, fetched: Path) -> None:
    # What is installed is the same for both.
    share = "mkdir -m 700 {1} {1}/run; cd {1}; ln -s ../{0}/python ../{0}/postgresql-* ."
    here.run("cd ~/hpc_db; " + share.format(FIRST, SECOND))
    second = Studies(here, SECOND)
    try:
        second.play("restore", restore_from=str(fetched))

        assert second.drill() == studies.drill()
        owners = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert second.psql(owners) == "study"
        assert second.psql("SELECT datname FROM pg_database WHERE datname LIKE 'studies%'") == "studies"
        assert second.dumps() == []
        second.work(1)
    finally:
        job = "$(sed -n 's/.*\"id\": \"\\(.*\\)\".*/\\1/p' ../run/local_job.json)"
        second.shell(f"kill {job}; while kill -0 {job} 2>/dev/null; do sleep 0.1; done")


def test_damaged_dump_is_refused(studies: Studies, fetched: Path, tmp_path: Path) -> None:
    whole = fetched.read_bytes()
    cut = tmp_path / "cut.dump"
    cut.write_bytes(whole[:-100])

    assert "cut.dump is no dump, or a damaged one: pg_restore failed: " in studies.refusal(
        restore_from=str(cut), restore_replace=True
    )

    newest = f"../dumps/{fetched.name}"
    middle = len(whole) // 2
    studies.shell(f"cp {newest} ../whole; printf X | dd of={newest} bs=1 seek={middle} conv=notrunc 2>&1")
    said = studies.refusal(restore_from="newest", restore_replace=True)
    assert f"{fetched.name} is damaged: it does not fit" in said
    studies.shell(f"mv ../whole {newest}")


def test_dump_that_is_killed_leaves_the_older_ones(studies: Studies) -> None:
    studies.target.run("mkdir -p ~/rounds/dumps; touch ~/rounds/dumps/studies-20260101T000000Z.dump.part")
    studies.shell(f"cat > round.py <<'EOF'\n{ROUND}\nEOF")
    for _round in range(3):
        assert studies.shell("python3 round.py ~/rounds 30; sleep 1") == "True"
    older = studies.target.run("stat -c '%a %n %Y' ~/rounds/dumps/*")
    assert re.fullmatch(r"(600 \S+/studies-\w+Z\.dump(\.sha256)? \d+\n?){4}", older)

    def locked(script: str, patience: int = 60) -> str:
        """Run a script while a dump hangs."""
        return studies.shell(f"program() {{ exec python3 round.py ~/rounds {patience}; }}\n{LOCK}{script}{UNLOCK}")

    killed = locked("ps -o ni= $(pgrep -P $program); pkill -9 -P $program; wait $program")
    assert killed.split("\n") == ["10", "False no dump of studies: pg_dump ended with -9"]
    assert locked("wait $program; pgrep -r RSDT -xu $USER pg_dump", patience=2) == "False no dump within 2 s"
    assert studies.target.run("stat -c '%a %n %Y' ~/rounds/dumps/*") == older

    killed = locked("kill -9 $program; sleep 1; pgrep -r RSDT -xu $USER pg_dump; ls ~/rounds/dumps")
    assert len(re.findall(r"^studies-\w+Z\.dump\.part$", killed, re.MULTILINE)) == 1
    assert not re.search(r"^\d+$", killed, re.MULTILINE)
    assert studies.shell("python3 round.py ~/rounds 30; ls ~/rounds/dumps | grep -c part || :") == "True \n0"
