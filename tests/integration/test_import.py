# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Import studies that three versions of Optuna have written into files, and run every other playbook on the result,
whatever the studies contain.

PostgreSQL is Debian's, at a path with a space.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
import zipfile
from html import escape
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable
from target import ROOT, Target

NAME = f"it{os.getpid()}"  # the fixture ``here`` stops the instance with this name
SETTINGS = {"instance_name": NAME, "databases_studies": [{"name": "studies"}, {"name": "second"}]}
AGES = {"3": "old_optuna", "4": "optuna_4"}

# Writes everything that a study can contain. The last trials are one left by its worker, and one that waits.
WRITE = """
import math, sys, optuna
url, age = sys.argv[1:]
storage = url
if url.endswith(".log"):
    if age == "3":
        from optuna.storages import JournalFileStorage as File
    else:
        from optuna.storages.journal import JournalFileBackend as File
    storage = optuna.storages.JournalStorage(File(url))

def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    y = trial.suggest_int("n", 1, 64, log=True)
    trial.suggest_categorical("c", [None, True, 1.5, "say \\"hi\\"", 7])
    trial.set_user_attr("host", {"name": "c1", "cores": [1, 2], "\u03a9": trial.number})
    trial.report([0.5, math.inf, math.nan][trial.number % 3], step=trial.number)
    if trial.number == 3:
        raise optuna.TrialPruned()
    if trial.number == 4:
        raise ValueError("not today")
    return math.inf if trial.number == 5 else x ** 2 + y

study = optuna.create_study(storage=storage, study_name="be", sampler=optuna.samplers.TPESampler(seed=1))
study.set_user_attr("snapshots", 4)
study.optimize(objective, n_trials=14, catch=(ValueError,))
study.ask().suggest_float("x", -1, 1)
study.enqueue_trial({"x": 0.5})
two = optuna.create_study(
    storage=storage, study_name="it's {two}", directions=["minimize", "maximize"],
    sampler=optuna.samplers.NSGAIISampler(constraints_func=lambda trial: (trial.number - 1.5,)),
)
two.optimize(lambda trial: (trial.suggest_float("x", 0, 1, step=0.25), 1.0), n_trials=3)
"""
MANY = """
import sys, optuna
storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(sys.argv[1]))
study = optuna.create_study(storage=storage, study_name="many")
trial = optuna.create_trial(
    value=1.0, params={"x": 0.5}, distributions={"x": optuna.distributions.FloatDistribution(0, 1)})
for _each in range(50):
    study.add_trial(trial)
"""
# Prints a whole study in one line; RUNNING trials of the file are FAIL in the database, where nothing ever ran them.
READ = """
import sys, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
url, name = sys.argv[1:]
storage = optuna.storages.RDBStorage(url, skip_compatibility_check=True)
study = optuna.load_study(storage=storage, study_name=name)
system = storage.get_study_system_attrs(storage.get_study_id_from_name(name))
print(study.directions, sorted(study.user_attrs.items()), sorted(system.items()), [
    [t.number, t.state.name if t.number != 14 else "", t.values, sorted(t.params.items()),
     sorted(t.distributions.items()), sorted(t.user_attrs.items()), sorted(t.system_attrs.items()),
     sorted(t.intermediate_values.items()), t.datetime_start, t.number == 14 or t.datetime_complete]
    for t in study.get_trials()])
"""
STATES = """
import sys, optuna
study = optuna.load_study(storage=sys.argv[1], study_name=sys.argv[2])
print([trial.state.name for trial in study.trials])
"""
GO_ON = """
import sys, optuna
study = optuna.load_study(storage=sys.argv[1], study_name="be", sampler=optuna.samplers.TPESampler(seed=1))
study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("n", 1, 64, log=True), n_trials=6)
print(study.best_value, len(study.trials), study.trials[15].params["x"], study.trials[-1].number)
"""
# Prints the studies that differ between file and database, except for RUNNING trials, and the number of all studies.
COMPARE = """
import sys, warnings, optuna
warnings.simplefilter("ignore")
def held(storage, study):
    trials = []
    for trial in storage.get_all_trials(study._study_id):
        ended = trial.state.name == "RUNNING"
        attributes = {key: value for key, value in trial.system_attrs.items() if key != "hpc_db:worker"}
        trials.append([
            trial.number, "FAIL" if ended else trial.state.name,
            trial.values and [value + 0.0 for value in trial.values],  # psycopg2 makes 0.0 of -0.0
            sorted(trial.params.items()),
            sorted(trial.distributions.items()), sorted(trial.user_attrs.items()), sorted(attributes.items()),
            sorted((step, value + 0.0) for step, value in trial.intermediate_values.items()), trial.datetime_start,
            ended or trial.datetime_complete])
    return study.directions, sorted(study.user_attrs.items()), sorted(study.system_attrs.items()), trials
file, database = (optuna.storages.RDBStorage(url) for url in sys.argv[1:])
brought = {study.study_name: study for study in database.get_all_studies()}
same = 0
for study in file.get_all_studies():
    there, here = held(file, study), held(database, brought[study.study_name])
    ended = [trial[9] is True for trial in there[3]]
    here[3][:] = [trial[:9] + [True] if was else trial for trial, was in zip(here[3], ended)]
    same += repr(there) == repr(here) or print(ascii(study.study_name)) or 0
print(same)
"""
# Files of users who have deleted a trial by SQL, or whose machine has crashed.
UNFIT = """
import json, os, sqlite3, sys, optuna
from optuna.storages.journal import JournalFileBackend
os.chdir(sys.argv[1])
def make(name, objective=lambda trial: trial.suggest_float("x", 0, 1)):
    file = name + ".db"
    storage = "sqlite:///" + file
    if name in ("cut", "blank", "nul", "last"):
        file = name + ".log"
        storage = optuna.storages.JournalStorage(JournalFileBackend(file))
    study = optuna.create_study(storage=storage, study_name=name)
    study.optimize(objective, n_trials=6)
    return study
make("long_parameter", lambda trial: trial.suggest_float("p" * 600, 0, 1))
make("long_key").set_user_attr("k" * 600, 1)
make("step", lambda trial: trial.report(0.5, 2 ** 31) or 1.0)
make("patched", lambda trial: trial.suggest_categorical("k", [1, 2]))
with sqlite3.connect("patched.db") as connection:
    more = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3]}})
    connection.execute("UPDATE trial_params SET distribution_json = ? WHERE trial_id > 3", (more,))
make("unreadable", lambda trial: trial.suggest_categorical("k", [1, 2]))
with sqlite3.connect("unreadable.db") as connection:
    connection.execute("UPDATE trial_params SET param_value = 7 WHERE trial_id = 3")
make("attribute").set_user_attr("k", 1)
with sqlite3.connect("attribute.db") as connection:
    connection.execute("UPDATE study_user_attributes SET value_json = '{cut'")
make("gap"), make("twice")
with sqlite3.connect("gap.db") as connection:
    for table in ("trial_params", "trial_values", "trials"):
        connection.execute(f"DELETE FROM {table} WHERE trial_id = 3")
with sqlite3.connect("twice.db") as connection:
    connection.execute("UPDATE trials SET number = 2 WHERE number = 3")
for name, change in {
    "cut": lambda lines: lines[:10] + [lines[10][:20]] + lines[11:],
    "blank": lambda lines: lines[:10] + [b""] + lines[10:],
    "nul": lambda lines: lines[:8] + [bytes(4096)] + lines[8:],
    "last": lambda lines: lines[:-4] + [lines[-4][:20], b""],
}.items():
    make(name)
    with open(name + ".log", "rb") as stream:
        lines = stream.read().split(b"\\n")
    with open(name + ".log", "wb") as stream:
        stream.write(b"\\n".join(change(lines)))
"""
UNFITTING = {
    "long_parameter.db": r"study long_parameter: trial 0: its parameter pp+… has 600 characters, .* in 6 trials\)",
    "long_key.db": "study long_key: its attribute kk+… has 600 characters, but PostgreSQL stores at most 512",
    "step.db": "study step: trial 0: its step 2147483648, with an intermediate value, does not fit into 32 bits",
    "patched.db": "study patched: trial 3: its parameter k differs from trial 0 in its distribution: Categorical",
    "unreadable.db": "study unreadable: trial 2 cannot be read: IndexError: tuple index out of range'$",
    "attribute.db": "study attribute cannot be read: JSONDecodeError: ",
    "gap.db": "study gap: trial 2 is missing, as if it had been deleted; import_repair=true renumbers the trials",
    "twice.db": "study twice: two trials have number 2; import_repair=true renumbers the trials",
    "cut.log": r"line 11 of 19 is damaged or not written by Optuna \(.*op_code",
    "blank.log": "line 11 of 20 is blank; import_repair=true leaves out",
    "nul.log": "line 9 of 20 is empty, with only NUL bytes",
    "last.log": "line 17 of 17 is damaged or not written by Optuna .*; import_repair=true leaves out blank lines and "
    "a damaged last one",
}
# More steps than Optuna could write in half a minute.
STEPS = """
INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
SELECT trial_id, step, 0.5, 'FINITE' FROM trials JOIN studies USING (study_id), generate_series(300, 9999) AS step
WHERE study_name = '300 steps'
"""
# A parameter value outside its choices, and an attribute that is not JSON; and the valid values again.
UNREADABLE = """
UPDATE trial_params SET param_value = {0} WHERE param_id =
(SELECT min(param_id) FROM trial_params WHERE distribution_json LIKE '%Categorical%');
UPDATE study_user_attributes SET value_json = '{1}' WHERE key = 'cutoff' AND study_id =
(SELECT study_id FROM studies WHERE study_name = 'empty')
"""
# The number of random studies, and the minimum that they must cover.
DRAWN = 25
KINDS = [
    "-Infinity", "NaN", "FloatDistribution", "IntDistribution", "CategoricalDistribution", r'\"log\": true',
    "COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING", '"start": null', '"complete": null', "constraints:size",
    r"\ud800", r"\u0000",
]
# Blocks inserts into the table, as a long read of it would.
LOCK = """
(psql -c 'BEGIN; LOCK TABLE trials IN SHARE MODE; SELECT pg_sleep(600)') > /dev/null 2>&1 &
while n=$(psql -c "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") && [ "$n" = 0 ]
do sleep 0.05; done
"""
UNLOCK = "psql -c \"SELECT pg_terminate_backend(pid, 9999) FROM pg_stat_activity WHERE wait_event = 'PgSleep'\""
# Kills the module once it has a study to add trials to.
KILL = f"""
while n=$(psql -c "SELECT count(*) FROM studies WHERE study_name LIKE 'hpc_db:importing:%'") && [ "$n" = 0 ]
do sleep 0.05; done
kill -9 $(pgrep -f -u "$USER" "^$HOME/hpc_db/{NAME}/python/bin/python( |$)")
"""


class Instance:
    """An instance, files beside it, and its owner's actions on them."""

    def __init__(self, target: Target, settings: dict) -> None:
        self.target = target
        self.play("hpc_db", **settings)
        self.home = target.run("pwd -P")
        self.url = f"postgresql+psycopg2:///?service={NAME}"

    def play(self, playbook: str, *options: str, **settings: object) -> str:
        played = self.target.play(playbook, {**SETTINGS, **settings}, *options)
        assert played.returncode == 0, played.stdout
        return played.stdout

    def refusals(self, folder: Path, given: list[dict]) -> list[str]:
        """Return the one failed task's message for each of these settings, after checking that nothing has changed."""
        hosts = {
            f"case{number}": {**self.target.variables, "ansible_connection": "local", **SETTINGS, **settings}
            for number, settings in enumerate(given)
        }
        (folder / "hosts.json").write_text(json.dumps({"hpc_db": {"hosts": hosts}}))
        before = self.held()
        # One at a time, since only one import may run.
        played = self.target.play("import", None, f"--inventory={folder}/hosts.json", "--limit=case*", "--forks=1")
        assert self.held() == before
        said = [re.findall(rf"^fatal: \[{host}\].*(?:\n .*)*", played.stdout, re.MULTILINE) for host in hosts]
        assert [len(messages) for messages in said] == [1] * len(hosts), played.stdout
        return [" ".join(message.replace("''", "'").split()) for (message,) in said]

    def held(self) -> str:
        """Return the studies, the files beside the instance, and anything that an import could leave."""
        studies = self.psql("SELECT string_agg(studies::text, ',' ORDER BY study_id) FROM studies")
        return studies + self.target.run(f"sha256sum *.db *.log; ls -A ~ ~/hpc_db/{NAME} ~/hpc_db/{NAME}/dumps")

    def python(self, script: str, *arguments: str, path: str = "") -> str:
        words = shlex.join(arguments)
        python = f"PYTHONPATH='{path}' ~/hpc_db/{NAME}/python/bin/python"
        return self.target.run(f"{python} - {words} 2>/dev/null <<'EOF'\n{script}\nEOF")

    def shell(self, script: str) -> str:
        """Run a script with psql for the owner."""
        psql = f"""psql() {{ command "$bin/psql" -XAtq "service={NAME} user=$USER dbname=studies" "$@"; }}"""
        bin_ = """bin=$(python3 -c 'import json; print(json.load(open("settings.json"))["bindir"])')"""
        return self.target.run(f"cd ~/hpc_db/{NAME}/host\n{bin_}\n{psql}\n{script}")

    def psql(self, statement: str, database: str = "studies") -> str:
        return self.shell(f'psql -d "service={NAME} user=$USER dbname={database}" -c "{statement}"')


@pytest.fixture(scope="module")
def instance(here: Target, quick_settings: dict) -> Instance:
    here.environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(ROOT / ".cache" / "wheels"))
    return Instance(here, quick_settings)


@pytest.fixture(scope="module")
def ages(open_folder: Path) -> dict[str, str]:
    """Folders with older versions of Optuna."""
    for age, name in AGES.items():
        (wheel,) = (ROOT / ".cache" / name).glob("optuna-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(open_folder / age)
    return {"5": "", **{age: str(open_folder / age) for age in AGES}}


def test_sqlite_file_of_the_cluster(instance: Instance, ages: dict[str, str]) -> None:
    source = f"sqlite:///{instance.home}/new.db"
    instance.python(WRITE, source, "5")
    before = instance.target.run("sha256sum new.db; stat -c '%Y %Z' new.db")

    looked = instance.play("import", "--check", import_from="~/new.db")
    assert re.search(r"^study be: 16 trials \(12 COMPLETE, 2 FAIL, 1 PRUNED, 1 WAITING; 1 of them FAIL since they were "
                     r"RUNNING\) would be imported$", looked, re.MULTILINE), looked
    assert instance.psql("SELECT count(*) FROM studies") == "0"
    said = instance.play("import", import_from="~/new.db")

    assert re.search(r"^study it's {two}: 3 trials \(3 COMPLETE\) in \d+\.\d s$", said, re.MULTILINE), said
    for study in ("be", "it's {two}"):
        assert instance.python(READ, instance.url, study) == instance.python(READ, source, study)
    assert instance.python(STATES, instance.url, "be").count("FAIL") == 2
    assert instance.target.run("sha256sum new.db; stat -c '%Y %Z' new.db") == before

    best, trials, waited, last = instance.python(GO_ON, instance.url).split()
    assert (trials, waited, last) == ("21", "0.5", "20") and float(best) > 1
    again = instance.play("import", import_from="~/new.db")
    assert re.search(r"^study be: 16 trials .* already imported$", again, re.MULTILINE) and "changed=0" in again


@pytest.mark.parametrize("age, file", [("4", "four.log"), ("3", "three.db")])
def test_older_files_of_the_workstation(
    instance: Instance, ages: dict[str, str], tmp_path: Path, age: str, file: str
) -> None:
    url = f"sqlite:///{instance.home}/{file}" if file.endswith(".db") else f"{instance.home}/{file}"
    instance.python(WRITE, url, age, path=ages[age])
    (tmp_path / file).write_bytes(Path(instance.home, file).read_bytes())
    before = (tmp_path / file).read_bytes()

    said = instance.play("import", import_from=str(tmp_path / file), import_studies=["be"], import_as=f"be{age}")

    assert re.search(rf"^study be{age}: 16 trials \(12 COMPLETE, .* in \d+\.\d s$", said, re.MULTILINE), said
    assert (tmp_path / file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file]
    states = instance.python(STATES, instance.url, f"be{age}")
    assert [states.count(state) for state in ("COMPLETE", "FAIL", "PRUNED", "WAITING")] == [12, 2, 1, 1]
    assert instance.target.run(f"ls -A ~/hpc_db/{NAME}/dumps") == ""


def test_what_does_not_fit_is_refused(instance: Instance, tmp_path: Path) -> None:
    instance.target.run("echo text > text.db")
    other = tmp_path / "other.db"
    instance.python(WRITE, f"sqlite:///{instance.home}/other.db", "5")
    other.write_bytes(Path(instance.home, "other.db").read_bytes())
    (tmp_path / "other.db.lock").symlink_to("/no/such")

    expected: list[tuple[dict, str]] = [
        (
            {"import_from": "~/new.db", "import_studies": ["nope"]},
            "import_studies: new.db contains no study nope, but be",
        ),
        ({"import_from": "~/text.db"}, "import_from: text.db is not an SQLite file, nor one of Optuna's"),
        ({"import_from": str(other)}, "import_from: other.db is in use, .* other.db.lock exists"),
        ({"import_from": "~/other.db"}, r"import_as: studies already contains a study be, with other trials \(the "),
        ({"import_from": "~/new.db", "import_database": "no"},
         "import_database: no is not allowed; databases in databases_studies with Optuna's tables: studies, second"),
    ]
    said = instance.refusals(tmp_path, [settings for settings, _says in expected])
    for (_settings, says), message in zip(expected, said):
        assert re.search(says, message), message


def test_import_that_is_killed_leaves_nothing_to_the_next(instance: Instance) -> None:
    instance.python(MANY, f"{instance.home}/many.log")
    names = "SELECT study_name FROM studies WHERE study_name LIKE 'hpc_db%' OR study_name = 'many'"
    instance.shell(f"{LOCK}\n({KILL}) > /dev/null 2>&1 &")

    killed = instance.target.play("import", {**SETTINGS, "import_from": "~/many.log"})
    assert killed.returncode != 0
    instance.shell(UNLOCK)
    assert instance.psql(names) == "hpc_db:importing:0"
    said = instance.play("import", import_from="~/many.log")

    assert re.search(r"^study many: 50 trials \(50 COMPLETE\) in", said, re.MULTILINE), said
    assert instance.psql(names) == "many"
    assert instance.psql("SELECT count(*) FROM trials LEFT JOIN studies USING (study_id) WHERE studies IS NULL") == "0"
    assert instance.target.run(f"ls -A ~/hpc_db/{NAME}/dumps") == ""


@pytest.fixture(scope="module")
def everything(instance: Instance, open_folder: Path) -> int:
    """Write random studies to an SQLite file and a journal; return the number of studies in each."""
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "workers" / "everything.py"), str(DRAWN)],
        check=True, capture_output=True, text=True,
    )
    assert [kind for kind in KINDS if kind not in drawn.stdout] == []
    (open_folder / "studies.json").write_text(drawn.stdout)
    script = (ROOT / "tests" / "workers" / "fill.py").read_text()
    for url in (f"sqlite:///{instance.home}/everything.db", f"{instance.home}/everything.log"):
        instance.python(script, url, "0", str(open_folder / "studies.json"))
    instance.target.run("touch -r everything.db everything.log")  # the end time of trials without one
    return len(json.loads(drawn.stdout)) + 3


def test_whatever_optuna_can_store_is_imported(instance: Instance, everything: int) -> None:
    looked = instance.play("import", "--check", import_from="~/everything.log", import_database="second")
    said = instance.play("import", import_from="~/everything.db", import_database="second")

    assert len(re.findall(r"^study .* would be imported$", looked, re.MULTILINE)) == everything
    assert len(re.findall(r"^study .* in [\d.]+ s$", said, re.MULTILINE)) == everything
    assert re.search(r"WARNING\]: study \d+ .*: trial \d+ has .* outside of .*; imported unchanged", said), said
    file, database = f"sqlite:///{instance.home}/everything.db", f"postgresql+psycopg2:///second?service={NAME}"
    assert instance.python(COMPARE, file, database) == str(everything)
    assert "changed=0" in instance.play("import", import_from="~/everything.log", import_database="second")


def test_whatever_optuna_can_store_is_shown(instance: Instance, everything: int, open_folder: Path) -> None:
    names = {f"second/{each['name']}" for each in json.loads((open_folder / "studies.json").read_text())}
    instance.psql(STEPS, "second")
    instance.psql(UNREADABLE.format(99, "cut ["), "second")
    workstation = {"report_root": str(open_folder / "report"), "dashboard_root": str(open_folder / "dashboard")}

    page = instance.play("status")
    (file,) = re.findall(r"^(/.*\.html)$", instance.play("report", **workstation), re.MULTILINE)
    report = Path(file).read_text()
    try:
        shown = instance.play("dashboard", dashboard_databases=["second"], **workstation)
        (address,) = re.findall(r"^optuna-dashboard shows second: (http://\S+)$", shown, re.MULTILINE)
        answers = [json.loads(ask(f"{address}api/studies/{study['study_id']}"), parse_constant=pytest.fail)
                   for study in json.loads(ask(f"{address}api/studies"))["study_summaries"]]
    finally:
        instance.play("dashboard", dashboard_state="stopped", **workstation)
        instance.psql(UNREADABLE.format(0, 1), "second")

    assert page.count(" second/") == everything
    assert re.findall(r"This (?:study )?cannot be [^<]*", report) == []
    assert {escape(printable(name)) for name in names} <= set(re.findall("<h2>(.*?)</h2>", report))
    assert re.search('<p class="bad">trial .* outside of .*Distribution', report)
    assert re.search('<p class="bad">trial .* cannot be read: IndexError', report)
    assert "study second/empty cannot be read and is not shown: JSONDecodeError: " in report
    attributes = [each["key"] for answer in answers for trial in answer["trials"] for each in trial["user_attrs"]]
    assert attributes.count("cannot be read") == 1
    assert len(answers) == everything and sum(len(answer["trials"]) for answer in answers) > DRAWN


def test_whatever_optuna_can_store_is_requeued_dumped_and_restored(instance: Instance, everything: int) -> None:
    script = (ROOT / "tests" / "workers" / "rows.py").read_text()
    database = f"postgresql+psycopg2:///second?service={NAME}"
    instance.psql("UPDATE trials SET state = 'RUNNING' WHERE number = 0", "second")

    requeued = instance.play("requeue", requeue_clock_tolerance=0)
    # two studies of fill.py have no trial
    assert len(re.findall(r"^second/.*: trial 0 is requeued as trial \d+: ", requeued, re.MULTILINE)) == everything - 2
    assert instance.psql("SELECT count(*) FROM trials WHERE state = 'RUNNING'", "second") == "0"
    before = instance.python(script, database)
    instance.play("backup")
    instance.psql("DELETE FROM trial_params", "second")
    instance.play("restore", restore_database="second", restore_from="newest", restore_replace=True)
    assert instance.python(script, database) == before


def test_what_the_database_cannot_hold_is_named_before(instance: Instance, tmp_path: Path) -> None:
    instance.python(UNFIT, instance.home)

    said = instance.refusals(tmp_path, [{"import_from": f"~/{file}"} for file in UNFITTING])
    foreseen = instance.target.play("import", {**SETTINGS, "import_from": "~/gap.db"}, "--check")

    for (file, says), message in zip(UNFITTING.items(), said):
        assert re.search(f"import_from: {file}: {says}", message), message
    assert "study gap: trial 2 is missing" in foreseen.stdout and foreseen.returncode != 0
    for file, study, count in (("gap.db", "gap", 5), ("twice.db", "twice", 6), ("last.log", "last", 5)):
        brought = instance.play("import", import_from=f"~/{file}", import_repair=True)
        assert re.search(rf"^study {study}: {count} trials .* in ", brought, re.MULTILINE), brought


def ask(address: str) -> str:
    """Return the dashboard's answer."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=100) as answer:
        return answer.read().decode()
