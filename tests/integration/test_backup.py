# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dumps of real studies, by users and by the supervisor; and the upgrade of Optuna's schema, after a dump.

PostgreSQL is Debian's, at a path with a space.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from target import ROOT, Target

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
# A worker for any version of Optuna that creates the trials of these numbers; another worker may create those between.
NUMBERED = """
import sys, time, optuna
storage = optuna.storages.RDBStorage("postgresql+psycopg2:///older?service={0}", skip_compatibility_check=True)
study = optuna.create_study(storage=storage, study_name="{1}", load_if_exists=True)
for number in {2}:
    while len(study.trials) < number:
        time.sleep(0.05)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
"""
TRIALS = """
SELECT version_num, md5(string_agg(concat(study_name, trials, trial_values, trial_params), ',' ORDER BY trial_id))
FROM alembic_version, studies JOIN trials USING (study_id) JOIN trial_values USING (trial_id)
JOIN trial_params USING (trial_id) GROUP BY 1
"""
# The supervisor's scheduled dump, for another folder.
ROUND = """
import json, sys, types
from hpc_db_host.dumps import Dumps
settings = json.load(open("settings.json"))
settings.update(root=sys.argv[1], databases=["studies"], dump_minutes=0, dump_keep=2)
dumps = Dumps(settings, types.SimpleNamespace(**json.load(open("../run/endpoint.json"))))
print(dumps.now(float(sys.argv[2]), lambda: None), dumps.told)
"""
# The same command as in docs/other_programs.md.
WHERE = """'import json; print("{host}:{port}".format(**json.load(open("hpc_db/hpc_db/run/endpoint.json"))))'"""
NEXT_TRIAL = "SELECT last_value FROM trials_trial_id_seq"
GENERATION = """
SELECT unnest(setconfig) FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase WHERE datname = 'studies'
"""
# An idle worker.
HOLD = """
"$bin/psql" "service={0} dbname=older" -c 'SELECT pg_sleep(600)' > ../log/held 2>&1 &
until psql -c 'SELECT query FROM pg_stat_activity' | grep -q '(600)'
do kill -0 $! || {{ cat ../log/held >&2; exit 1; }}; sleep 0.05; done
"""
LOCK = """
psql -c 'BEGIN; LOCK TABLE trials; SELECT pg_sleep(60)' > /dev/null 2>&1 &
until [ "$(psql -c "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")" = 1 ]; do sleep 0.05; done
program &
program=$!
until psql -c 'SELECT wait_event_type FROM pg_stat_activity' | grep -qx Lock || ! kill -0 $program
do sleep 0.05; done 2> /dev/null
"""
UNLOCK = """
psql -c "SELECT pg_terminate_backend(pid, 9999) FROM pg_stat_activity WHERE wait_event = 'PgSleep'" > /dev/null
"""


class Studies:
    """An instance with a study, and its owner's actions on it."""

    def __init__(self, target: Target, name: str, settings: dict) -> None:
        self.target, self.name, self.settings = target, name, settings
        self.play("hpc_db", **settings)

    def play(self, playbook: str, **settings: object) -> str:
        played = self.target.play(playbook, {"instance_name": self.name, **settings})
        assert played.returncode == 0, played.stdout
        return played.stdout

    def refusal(self, **settings: object) -> str:
        """Return the message of the one task that failed, after checking that nothing has changed."""
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
        """Return name, number of trials, best value and the whole best trial of each study, as Optuna reads them."""
        return self.python(DRILL)

    def shell(self, script: str) -> str:
        """Run a script in the supervisor's folder, with psql as the owner."""
        psql = f"""psql() {{ command "$bin/psql" -XAtq "service={self.name} user=$USER dbname=studies" "$@"; }}"""
        bin_ = """bin=$(python3 -c 'import json; print(json.load(open("settings.json"))["bindir"])')"""
        return self.target.run(f"cd ~/hpc_db/{self.name}/host\n{bin_}\n{psql}\n{script}")

    def psql(self, statement: str) -> str:
        return self.shell(f'psql -c "{statement}"')

    def dumps(self) -> list[str]:
        return self.target.run(f"ls -A ~/hpc_db/{self.name}/dumps").split()

    def schema(self, python: str, upgrade: bool = False, **database: object) -> str:
        """Run the module alone for the database "older", with a given interpreter; return its output."""
        endpoint = json.loads(self.shell("cat ../run/endpoint.json"))
        passfile = f"~/hpc_db/{self.name}/secrets/pgpass"
        server = {"host": endpoint["host"], "port": endpoint["port"], "user": "study", "passfile": passfile}
        server["tls"] = endpoint["tls"]
        wanted = {"databases": [{"name": "older", **database}], "upgrade": upgrade}
        inventories = [word for word in self.target.command("") if word.startswith("--inventory=")]
        done = subprocess.run(
            ["ansible", "localhost", *inventories, "--module-name=mala.hpc_db.optuna_study",
             f"--args={json.dumps({**server, **wanted})}",
             f"--extra-vars={json.dumps({'ansible_python_interpreter': python})}"],
            cwd=ROOT, env=self.target.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )
        return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def studies(quick_settings: dict, here: Target) -> Studies:
    # The fixture that makes the settings' folder comes first, so that the server ends before its programs are removed.
    studies = Studies(here, FIRST, {**quick_settings, "databases_studies": [{"name": "studies"}, {"name": "older"}]})
    studies.work(20)
    return studies


@pytest.fixture(scope="module")
def fetched(studies: Studies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the study, fetched to the workstation."""
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
    given = studies.psql(NEXT_TRIAL)

    assert "restore_database: studies contains 1 studies with 25 trials; with restore_replace=true" in studies.refusal(
        restore_from="newest"
    )
    said = studies.play("restore", restore_from="newest", restore_replace=True)

    assert studies.drill() == before
    assert "kept.json" not in studies.shell("ls ../run").split(), "the next run must ensure the settings' studies"
    kept = re.findall(r"^studies: 20 trials from newest; .* kept as the database (studies-\w+)$", said, re.MULTILINE)
    names = studies.psql("SELECT datname FROM pg_database WHERE datname LIKE 'studies%' ORDER BY 1").split()
    assert names == ["studies", *kept]
    assert int(studies.psql(NEXT_TRIAL)) > int(given), "no trial has an id that workers know of another trial"
    assert re.fullmatch(r"hpc_db\.generation=\w+-\w+", studies.psql(GENERATION))
    assert studies.psql("SELECT count(*), has_table_privilege('reader', 'trials', 'SELECT') FROM trials") == "20|t"
    count = "psql -d \"service=$name user=$USER dbname={}\" -c 'SELECT count(*) FROM trials'"
    assert studies.shell(f"name={FIRST}; {count.format(kept[0])}") == "25"


def test_fetched_dump_brings_the_study_to_another_instance(
    studies: Studies, here: Target, quick_settings: dict, fetched: Path
) -> None:
    # Both instances share the same installation.
    here.run(f"cd ~/hpc_db; mkdir -m 700 {SECOND} {SECOND}/run; ln -s ../{FIRST}/python {SECOND}")
    second = Studies(here, SECOND, quick_settings)
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

    assert "cut.dump is not a dump, or is damaged: pg_restore failed: " in studies.refusal(
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
    niceness = min(19, os.nice(0) + 10)
    assert killed.split("\n") == [str(niceness), "False cannot dump studies: pg_dump ended with -9"]
    assert locked("wait $program; pgrep -r RSDT -xu $USER pg_dump", patience=2) == "False no dump within 2 s"
    assert studies.target.run("stat -c '%a %n %Y' ~/rounds/dumps/*") == older

    killed = locked("kill -9 $program; sleep 1; pgrep -r RSDT -xu $USER pg_dump; ls ~/rounds/dumps")
    assert len(re.findall(r"^studies-\w+Z\.dump\.part$", killed, re.MULTILINE)) == 1
    assert not re.search(r"^\d+$", killed, re.MULTILINE)
    assert studies.shell("python3 round.py ~/rounds 30; ls ~/rounds/dumps | grep -c part || :") == "True \n0"


def test_older_schema_is_named_and_upgraded_on_request_after_a_dump(studies: Studies, open_folder: Path) -> None:
    wheel, = (ROOT / ".cache" / "old_optuna").glob("optuna-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(open_folder / "old")
    new = studies.target.run(f"cd ~/hpc_db/{FIRST}/python/bin; pwd -P") + "/python"
    old = f"{open_folder}/python"
    Path(old).write_text(f"#!/bin/sh\nPYTHONPATH='{open_folder}/old' exec {new} \"$@\"\n")
    Path(old).chmod(0o755)

    def worker(python: str, zone: str, study: str, numbers: range) -> str:
        script = NUMBERED.format(FIRST, study, numbers)
        return f"TZ={zone} '{python}' - 2>/dev/null <<'EOF'\n{script}\nEOF\n"

    def older(statement: str) -> str:
        return studies.shell(f"psql -d 'service={FIRST} user='$USER' dbname=older' -c \"{statement}\"")

    older("DROP OWNED BY study")
    studies.target.run(worker(old, "EAST-2", "east", range(3)))
    mixed = worker(old, "WEST5", "mixed", range(0, 8, 2)), worker(new, "WEST5", "mixed", range(1, 8, 2))
    studies.target.run(f"{{ {mixed[0]} }} & {mixed[1]} wait $!")
    before, dumps = older(TRIALS), studies.dumps()

    named = studies.schema(new)
    studies.shell(HOLD.format(FIRST))
    refused = studies.schema(new, upgrade=True)
    older("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE query LIKE '%(600)'")

    must = r"database older: Optuna's schema v3\.0\.0\.d there was made by Optuna 3\.1\.1, but the installed Optuna \S+"
    assert re.search(rf"\[WARNING\]: {must} needs v3\.2\.0\.a: set databases_upgrade_schema", named), named
    assert re.search(r"localhost \| SUCCESS => .*\bchanged: false", named)
    assert "databases_upgrade_schema: 1 connections to the database older are open; end its workers first" in refused
    assert (older(TRIALS), studies.dumps()) == (before, dumps)

    said = studies.play("hpc_db", **studies.settings, databases_upgrade_schema=True)

    assert older(TRIALS) == before.replace("v3.0.0.d", "v3.2.0.a")
    made = sorted(set(studies.dumps()) - set(dumps))
    assert re.search(rf"^older: 11 trials in \S+/{re.escape(made[0])}$", said, re.M), said
    assert made == [made[0], f"{made[0]}.sha256"]
    assert "study east in database older: a trial's time is 2.0 h ahead of UTC" in said
    assert "study mixed in database older: 3 trials began half an hour or more before their" in said
    assert re.search(r"is newer than the installed Optuna 3\.1\.1: set optuna==\d\S+ in postgres_python_packages",
                     studies.schema(old))


class MLflow:
    """A real MLflow tracking server that uses the printed URL."""

    def __init__(self, url: str, home: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "log"
        command = [
            ROOT / ".cache/mlflow/bin/mlflow", "server", f"--backend-store-uri={url}", "--host=127.0.0.1",
            f"--port={self.port}", "--workers=1", f"--artifacts-destination={folder}",
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        path = f"{ROOT}/.cache/mlflow/bin:{os.environ['PATH']}"
        with self.log.open("w") as stream:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
                env={**os.environ, **quiet, "PATH": path, "PGSERVICEFILE": f"{home}/.pg_service.conf"},
            )

    def ask(self, call: str, patience: float = 0, **given: str) -> dict:
        """Return the server's answer. ``patience`` gives it some seconds to start or to reconnect."""
        limit = time.monotonic() + patience
        question = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/2.0/mlflow/experiments/{call}", json.dumps(given).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(question, timeout=30) as answer:
                    return json.load(answer)
            except OSError:
                assert time.monotonic() < limit and self._process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.2)

    def names(self) -> set[str]:
        """Return the names of its experiments."""
        found = self.ask("search", patience=20, max_results="100")  # type: ignore[arg-type]
        return {experiment["name"] for experiment in found["experiments"]}

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def test_another_program_keeps_its_database_through_a_move(studies: Studies, tmp_path: Path) -> None:
    setup = [ROOT / "tools/setup", "environment", ".cache/mlflow", "/usr/bin/python3", "requirements/mlflow.txt"]
    subprocess.run(setup, cwd=ROOT, check=True)
    mlflow = {"name": "mlflow", "tables": "none", "role": "mlflow"}
    settings = {**studies.settings, "databases_studies": [{"name": "studies"}, {"name": "older"}, mlflow]}
    urls = {"older": f"postgresql+psycopg2:///older?service={FIRST}",
            "mlflow": f"postgresql+psycopg2://mlflow@/mlflow?service={FIRST}"}

    said = studies.play("hpc_db", **settings)

    assert dict(re.findall(r"^(\w+): (postgresql\S+)$", said, re.MULTILINE)) == urls
    server = MLflow(urls["mlflow"], studies.target.run("cd; pwd -P"), tmp_path)
    try:
        server.ask("create", patience=60, name="before the dump")
        made = studies.play("backup", **settings)
        assert re.search(r"^mlflow: \d\d tables in /\S+\.dump$", made, re.MULTILINE), made
        server.ask("create", name="after the dump")

        where = WHERE.replace("hpc_db/hpc_db", f"hpc_db/{FIRST}")
        before = studies.target.run(f"python3 -c {where}")
        studies.play("stop", **settings)
        moved = studies.play("hpc_db", **settings)
        assert studies.target.run(f"python3 -c {where}") != before
        assert urls["mlflow"] in moved
        assert {"before the dump", "after the dump"} < server.names()

        status = studies.play("status", **settings)
        listed = rf"^  URL of +older +{re.escape(urls['older'])}\n +mlflow +{re.escape(urls['mlflow'])}$"
        assert re.search(listed, status, re.MULTILINE), status
        back = studies.play("restore", **settings, restore_from="newest", restore_database="mlflow",
                            restore_replace=True)
        assert re.search(r"^mlflow: \d\d tables from newest; .* is kept as the database mlflow-", back, re.MULTILINE)
        names = server.names()
        assert "before the dump" in names and "after the dump" not in names
    finally:
        server.end()

    mine = f'command "$bin/psql" -XAtq "service={FIRST} user={{}} dbname={{}}" -c "SELECT current_user" 2>&1 || :'
    assert studies.shell(mine.format("mlflow", "mlflow")) == "mlflow"
    assert 'no pg_hba.conf entry' in studies.shell(mine.format("mlflow", "studies"))
    assert 'no pg_hba.conf entry' in studies.shell(mine.format("study", "mlflow"))
    owners = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert studies.shell(f"psql -d \"service={FIRST} user=$USER dbname=mlflow\" -c \"{owners}\"") == "mlflow"
    for wrong, says in [
        ({"databases_studies": [mlflow]}, "no database with Optuna's tables is not allowed; at least one"),
        ({"databases_studies": [{"name": "studies", "role": "mine"}]}, "a role of studies is not allowed; only with"),
    ]:
        played = studies.target.play("hpc_db", {**settings, "instance_name": FIRST, **wrong}, "--check")
        assert f"databases_studies: {says}" in played.stdout.replace("''", "'"), played.stdout
