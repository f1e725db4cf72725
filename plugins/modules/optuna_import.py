#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: optuna_import
short_description: Import studies from an SQLite or journal file into a database
description:
  - Optuna itself reads a copy of the file, adds the trials to the database while workers run, and reads them back. All
    studies get their names at the same time, and only if every trial equals the one in the file.
  - Before anything is copied, each study is checked for values that PostgreSQL or Optuna's tables cannot store, and
    each line of a journal file for errors that prevent Optuna from reading it.
  - A failed run leaves nothing behind. Remains of a killed run are removed by the next run.
  - The file is never changed. Tables of an older Optuna are upgraded in the copy.
  - Trials that are C(RUNNING) in the file become C(FAIL), because no worker will report their end. Their end time is
    the last time recorded in their study. C(WAITING) trials remain so for the workers of this database.
  - Times are copied unchanged. Optuna before 5 writes local time, and Optuna 5 writes UTC.
author: mala.hpc_db contributors (@mala-project)
options:
  file:
    description: Path of an SQLite file, or of a file of Optuna's C(JournalStorage). No program may be using it.
    type: path
    required: true
  database:
    description: Database to import into. O(user) becomes the owner of the trials.
    type: str
    required: true
  root:
    description: Instance directory. Its folder C(dumps) is used for the temporary copy.
    type: path
    required: true
  studies:
    description: Names of the studies to import. If empty, all studies in the file.
    type: list
    elements: str
    default: []
  name:
    description: Name of the study in the database. Only for a single study. By default studies keep their names.
    type: str
  repair:
    description:
      - Import a damaged file. Trials of a study with gaps or duplicates in their numbers are renumbered in their order.
        Blank lines and a damaged last line of a journal are dropped.
      - If V(false), such a file is refused.
    type: bool
    default: false
extends_documentation_fragment:
  - mala.hpc_db.attributes
  - mala.hpc_db.connection
requirements:
  - optuna
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
seealso:
  - module: mala.hpc_db.optuna_study
"""

EXAMPLES = r"""
- name: Import a study
  mala.hpc_db.optuna_import:
    host: c1
    port: 5432
    user: study
    passfile: ~/hpc_db/hpc_db/secrets/pgpass
    database: mala
    file: ~/study.db
    root: ~/hpc_db/hpc_db
    studies: [beryllium]
    name: beryllium_2025
"""

RETURN = r"""
studies:
  description: Studies that were, or would be, imported, or that existed already.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the study in the database.
      type: str
    source:
      description: Name of the study in the file.
      type: str
    imported:
      description: Whether it was, or would be, imported. If V(false), it existed already.
      type: bool
    trials:
      description: Number of trials in the database by state.
      type: dict
    ended:
      description: Number of trials that are C(RUNNING) in the file.
      type: int
    seconds:
      description: Duration of import and comparison in seconds.
      type: float
  sample:
    - name: beryllium
      source: beryllium
      imported: true
      trials: {COMPLETE: 400, FAIL: 12}
      ended: 0
      seconds: 3.1
"""

import contextlib
import copy
import datetime
import json
import os
import shutil
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection, _optuna, _workers
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import encodable_data, one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout

SQLITE = b"SQLite format 3\0"
# Suffixes of the files that SQLite and Optuna keep beside a file while it is being written.
IN_USE = ("-journal", "-wal", ".lock")
# Folder of the copy; only one import runs at a time.
SCRATCH = ".import"
# Limits of Optuna's tables in PostgreSQL: characters of a name, steps, and whole numbers as values.
LONGEST_NAME = 512
STEPS = range(-(2**31), 2**31)
LARGEST = int(sys.float_info.max)
# Number of bytes shown of a journal line.
LINE_SHOWN = 40
BLANK = "blank"
# Number of lines in which a journal is recognised; the first line may be damaged.
LINES_READ = 5
# Maximum number of problems named in one message.
MOST_NAMED = 3
# Prefix of a study's temporary name during the import; the study's index in this run follows.
UNFINISHED = "hpc_db:importing:"

LOCK = "SELECT pg_try_advisory_lock(hashtext('hpc_db:importing'))"
NAMES = "SELECT study_name FROM studies"
# The trigger has recorded our own connection as each trial's worker. Statements sent in one call are one transaction.
FINISH = f"""
DELETE FROM trial_system_attributes USING trials JOIN studies USING (study_id)
WHERE trials.trial_id = trial_system_attributes.trial_id AND key = '{_workers.KEY}'
  AND study_name = ANY(%(unfinished)s);
UPDATE studies SET study_name = wanted.name
FROM unnest(%(unfinished)s, %(names)s) AS wanted (unfinished, name) WHERE study_name = unfinished
"""
# A server crash loses only studies that do not have their final name yet, since the renaming is written to disk
# synchronously. For each parameter Optuna looks up an earlier one of the same study; without the planner settings the
# server would read those of all other studies first.
QUICK = {
    "synchronous_commit": "off", "enable_seqscan": "off", "enable_hashjoin": "off", "cpu_index_tuple_cost": "1",
    "jit": "off",
}


class Refused(Exception):
    """The file or the database's contents are not suitable; nothing was changed."""


class Study:
    """A study of the file: its names in the file and in the database, and its trials as they will be imported.

    ``changed`` is the file's modification time, the end of running trials if no trial has a time.
    """

    def __init__(self, storage: Any, source: str, name: str, changed: datetime.datetime) -> None:
        self.source, self.name = source, name
        held = storage.get_study_id_from_name(source)
        self.directions = storage.get_study_directions(held)
        self.user_attributes = storage.get_study_user_attrs(held)
        self.system_attributes = storage.get_study_system_attrs(held)
        trials, self.unreadable = _optuna.read_trials(storage, held)
        times = [time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time]
        last = max(times, default=changed)
        self.trials = [
            end(trial, last) if trial.state.name == "RUNNING" else trial
            for trial in sorted(trials, key=lambda trial: trial.number)
        ]
        self.ended = sum(trial.state.name == "RUNNING" for trial in trials)
        self.odd = _optuna.oddities(self.trials, len(self.directions))

    def number_anew(self) -> None:
        """Number the trials consecutively in their order."""
        for number, trial in enumerate(self.trials):
            if trial.number != number:
                self.trials[number] = copy.copy(trial)
                self.trials[number].number = number

    def report(self, imported: bool, seconds: float) -> dict[str, Any]:
        """Return the study's part of the module's result."""
        states = Counter(trial.state.name for trial in self.trials)
        return {
            "name": self.name,
            "source": self.source,
            "imported": imported,
            "trials": dict(sorted(states.items())),
            "ended": self.ended,
            "seconds": round(seconds, 1),
        }


def end(trial: Any, when: Any) -> Any:
    """Return a copy of the trial in the state FAIL."""
    from optuna.trial import TrialState

    ended = copy.copy(trial)
    ended.state, ended.datetime_complete = TrialState.FAIL, when
    return ended


def operation(line: bytes) -> dict | None:
    """Return the operation in a journal line; None if the line is not in Optuna's format."""
    try:
        held = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) and {"op_code", "worker_id"} <= set(held) else None


def describe(line: bytes) -> str:
    """Return the defect of a journal line."""
    if not line.strip():
        return BLANK
    if not line.strip(b"\0\r\n"):
        return "empty, with only NUL bytes"
    shown = line[:LINE_SHOWN].decode(errors="replace").strip()
    return f"damaged or not written by Optuna ({shown}{'…' if len(line) > LINE_SHOWN else ''})"


class Journal:
    """The lines of a journal file; implements the part of Optuna's journal backend that reading needs.

    ``line`` is the number of the line being read, because Optuna does not report which line it cannot read.
    """

    def __init__(self, path: str, label: str, repair: bool) -> None:
        self.path, self.line = path, 0
        damaged = []
        last = 0
        with open(path, "rb") as stream:
            for last, line in enumerate(stream, 1):
                if operation(line) is None:
                    damaged.append((last, describe(line)))
        self.left_out = {number for number, said in damaged if said == BLANK or number == last}
        if len(damaged) == len(self.left_out) and (repair or not damaged):
            return
        named = [f"line {number} of {last} is {said}" for number, said in damaged[:MOST_NAMED]]
        named += [f"and {len(damaged) - MOST_NAMED} more"] if damaged[MOST_NAMED:] else []
        if len(damaged) == len(self.left_out):
            way_out = "import_repair=true leaves out blank lines and a damaged last one"
        else:
            way_out = "later lines may depend on it, so repair the file by hand or from a copy"
        raise Refused(f"import_from: {label}: {'; '.join([*named, way_out])}")

    def read_logs(self, log_number_from: int) -> Iterator[dict]:
        """Return all operations at once, since the copy does not grow."""
        with open(self.path, "rb") as stream:
            for self.line, line in enumerate(stream if not log_number_from else (), 1):
                if self.line not in self.left_out:
                    yield operation(line) or {}

    def append_logs(self, logs: list[dict]) -> None:
        """Refuse to write."""
        raise NotImplementedError


def kind_of(path: str) -> str:
    """Return the file's format: sqlite or journal."""
    with open(path, "rb") as stream:
        if stream.read(len(SQLITE)) == SQLITE:
            return "sqlite"
        stream.seek(0)
        if any(operation(stream.readline(1 << 20)) for _line in range(LINES_READ)):
            return "journal"
    raise Refused(f"import_from: {os.path.basename(path)} is not an SQLite file, nor one of Optuna's JournalStorage")


def stamp_of(path: str) -> tuple[int, int, int]:
    """Return values that change with the file; raise Refused while the file is being written."""
    for suffix in IN_USE:
        beside = path + suffix
        # SQLite leaves an empty file in some modes. A lock is empty, and may be a link without a target.
        if os.path.lexists(beside) and (suffix == ".lock" or os.path.getsize(beside)):
            raise in_use(path, f"{os.path.basename(beside)} exists")
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def in_use(path: str, sign: str) -> Refused:
    """Return the error for a file that is being written."""
    return Refused(
        f"import_from: {os.path.basename(path)} is in use, or was when its last worker died: {sign}; "
        "end its workers, and read it once with Optuna or sqlite3 there"
    )


def check_unchanged(path: str, before: tuple) -> None:
    """Raise Refused if the file has changed, because the copy may then mix two versions."""
    if stamp_of(path) != before:
        raise in_use(path, "it changed during the import")


@contextlib.contextmanager
def copied(params: dict) -> Iterator[str]:
    """Copy the file into a scratch folder, which is removed afterwards."""
    folder = os.path.join(Layout(params["root"]).dumps, SCRATCH)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have been killed
    os.mkdir(folder, 0o700)
    try:
        yield shutil.copyfile(params["file"], os.path.join(folder, "copy"))
    finally:
        shutil.rmtree(folder)


def look_at_schema(path: str, label: str, optuna: optuna_schema.Optuna) -> bool:
    """Return whether an SQLite file's tables must be upgraded; raise Refused if they are newer or not Optuna's."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            damage = [said for said, in connection.execute("PRAGMA quick_check(1)") if said != "ok"]
            rows = [] if damage else connection.execute(optuna_schema.SCHEMA).fetchall()
    except sqlite3.OperationalError as error:
        raise Refused(f"import_from: {label} contains no Optuna studies: SQLite reports: {error}") from None
    except sqlite3.Error as error:
        damage = [str(error)]
    if damage:
        raise Refused(
            f"import_from: {label} is damaged: SQLite reports: {damage[0]}; "
            "its command .recover prints the readable part"
        )
    if not rows:
        raise Refused(f"import_from: {label} contains no Optuna studies")
    schema = optuna_schema.Schema(*rows[0])
    if optuna_schema.is_newer(schema, optuna):
        raise Refused(
            f"import_from: {label} was made by Optuna {schema.library}, which is newer than the installed Optuna "
            f"{optuna.version}: set optuna=={schema.library} in postgres_python_packages"
        )
    return optuna_schema.is_older(schema, optuna)


def open_copy(path: str, label: str, kind: str, repair: bool, installed: optuna_schema.Optuna) -> Any:
    """Return Optuna's storage for the copy, after an upgrade if necessary."""
    from optuna import storages

    if kind == "sqlite":
        old = look_at_schema(path, label, installed)
        storage = storages.RDBStorage(f"sqlite:///{path}", skip_compatibility_check=old)
        if old:
            storage.upgrade()
        return storage
    journal: Any = Journal(path, label, repair)
    try:
        return storages.JournalStorage(journal)
    except OSError:
        raise
    except Exception as error:  # any error that Optuna raises for a line that it cannot read
        raise Refused(
            f"import_from: {label}: Optuna {installed.version} cannot read line {journal.line}: {_optuna.said(error)}"
        ) from None


def study_names(storage: Any) -> list[str]:
    """Return the names of the file's studies, even if an attribute of one of them cannot be read."""
    import optuna

    if not hasattr(storage, "engine"):
        return optuna.get_all_study_names(storage)
    with storage.engine.connect() as connection:
        return [name for name, in connection.exec_driver_sql(NAMES).fetchall()]


def read_source(params: dict, storage: Any) -> list[Study]:
    """Return the selected studies of the file; raise Refused if one of them is not suitable."""
    held = sorted(study_names(storage))
    label = os.path.basename(params["file"])
    if not held:
        raise Refused(f"import_from: {label} contains no study")
    wanted = params["studies"] or held
    missing = [name for name in wanted if name not in held]
    if missing:
        raise Refused(f"import_studies: {label} contains no study {', '.join(missing)}, but {', '.join(held)}")
    if params["name"] and len(wanted) != 1:
        raise Refused(f"import_as: {params['name']} is one name for {len(wanted)} studies; set import_studies")
    changed = datetime.datetime.fromtimestamp(os.stat(params["file"]).st_mtime)
    studies = []
    for name in dict.fromkeys(wanted):
        try:
            studies.append(Study(storage, name, params["name"] or name, changed))
        except Exception as error:  # any error of Optuna and SQLAlchemy
            told = [f"study {name} cannot be read: {_optuna.said(error)}", *others([n for n in wanted if n != name])]
            raise Refused(f"import_from: {label}: {'; '.join(told)}") from None
    for study in studies if params["repair"] else ():
        study.number_anew()
    check_fit(label, studies)
    return studies


def check_fit(label: str, studies: list[Study]) -> None:
    """Raise Refused if a study contains values that the database cannot store."""
    found = [(study, problem) for study in studies for problem in [*numbering(study), *study.unreadable, *unfit(study)]]
    if not found:
        return
    named = [f"study {_optuna.cut(study.source)}: {problem}" for study, problem in found[:MOST_NAMED]]
    more = [f"and {len(found) - MOST_NAMED} more"] if found[MOST_NAMED:] else []
    ways = ["import_repair=true renumbers the trials"] if any(map(numbering, studies)) else []
    fit = [study.source for study in studies if study not in [study for study, _problem in found]]
    raise Refused(f"import_from: {label}: {'; '.join([*named, *more, *ways, *others(fit)])}")


def others(names: list[str]) -> list[str]:
    """Return the advice on how to import the studies that fit."""
    return [f"import_studies can name the others ({', '.join(names)})"] if names else []


def numbering(study: Study) -> list[str]:
    """Return why the trials' numbers are not consecutive from 0; an unreadable trial also leaves a gap."""
    numbers = [] if study.unreadable else [trial.number for trial in study.trials]
    for number, held in enumerate(numbers):
        if held > number:
            return [f"trial {number} is missing, as if it had been deleted"]
        if held < number:
            return [f"two trials have number {held}"]
    return []


def unfit(study: Study) -> Iterator[str]:
    """Return the study's values that the database cannot store."""
    for problem in unfit_names([("its name", study.name)]):
        yield f"{problem} (import_as gives it another)"
    yield from unfit_names(("its attribute", key) for key in [*study.user_attributes, *study.system_attributes])
    first: dict[str, tuple[int, Any]] = {}
    found: dict[str, list[int]] = {}
    for trial in study.trials:
        names = [("its parameter", name) for name in trial.params]
        names += [("its attribute", key) for key in [*trial.user_attrs, *trial.system_attrs]]
        for problem in [*unfit_names(names), *unfit_numbers(trial), *unfit_parameters(trial, first)]:
            found.setdefault(problem, []).append(trial.number)
    for problem, numbers in found.items():
        yield f"trial {numbers[0]}: {problem}" + (f" (and so on, in {len(numbers)} trials)" if numbers[1:] else "")


def unfit_names(names: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Return the names that the database cannot store."""
    for what, name in names:
        if len(name) > LONGEST_NAME:
            yield f"{what} {_optuna.cut(name)} has {len(name)} characters, but PostgreSQL stores at most {LONGEST_NAME}"
        elif "\0" in name or name != name.encode("utf-8", "replace").decode():
            yield f"{what} {_optuna.cut(name)} has a character that PostgreSQL cannot store"


def unfit_numbers(trial: Any) -> Iterator[str]:
    """Return the trial's numbers that the database cannot store."""
    held = {"value": trial.values or [], "intermediate value": trial.intermediate_values.values()}
    for what, numbers in held.items():
        for number in numbers:
            if not isinstance(number, float) and not (isinstance(number, int) and abs(number) <= LARGEST):
                yield f"its {what} {_optuna.cut(number)} is not a 64-bit integer"
    for step in trial.intermediate_values:
        if step not in STEPS:
            yield f"its step {step}, with an intermediate value, does not fit into 32 bits"


def unfit_parameters(trial: Any, first: dict[str, tuple[int, Any]]) -> Iterator[str]:
    """Return the parameters that Optuna would refuse or change; ``first`` collects the first use of each parameter."""
    from optuna.distributions import check_distribution_compatibility

    for name, value in trial.params.items():
        kind = trial.distributions.get(name)
        number, earlier = first.setdefault(name, (trial.number, kind))
        try:
            check_distribution_compatibility(earlier, kind)
            back = kind.to_external_repr(float(kind.to_internal_repr(value)))
        except Exception as error:  # any error that Optuna raises for a value outside of its distribution
            since = f"differs from trial {number} in its distribution" if earlier != kind else "has no valid value"
            yield f"its parameter {_optuna.cut(name)} {since}: {' '.join(str(error).split()).rstrip('.')}"
            continue
        if text_of(as_held(back, kind)) != text_of(as_held(value, kind)):
            yield f"its parameter {_optuna.cut(name)} is {_optuna.cut(value)}, which would become {_optuna.cut(back)}"


def fields_of(trial: Any) -> dict[str, str]:
    """Return all fields of a trial as text for comparison: in Python NaN differs from NaN, and True equals 1."""
    from optuna.distributions import distribution_to_json

    attributes = {key: value for key, value in trial.system_attrs.items() if key != _workers.KEY}
    fields = {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values and [as_number(value) for value in trial.values],
        "params": {name: as_held(value, trial.distributions.get(name)) for name, value in trial.params.items()},
        "distributions": {name: distribution_to_json(kind) for name, kind in trial.distributions.items()},
        "user attributes": trial.user_attrs,
        "system attributes": attributes,
        "intermediate values": {step: as_number(value) for step, value in trial.intermediate_values.items()},
        "start": trial.datetime_start,
        "end": trial.datetime_complete,
    }
    return {name: text_of(value) for name, value in fields.items()}


def as_held(value: Any, distribution: Any) -> Any:
    """Return a parameter's value as stored: the database stores numbers as floats."""
    return as_number(value) if hasattr(distribution, "low") else value


def as_number(value: Any) -> float:
    """Return a number as psycopg2 stores it: -0.0 becomes 0.0."""
    return float(value) + 0.0


def text_of(value: Any) -> str:
    """Return a value as text."""
    return json.dumps(value, sort_keys=True, default=str)


def difference(study: Study, storage: Any, name: str, grown: bool) -> str:
    """Return how a study in the database differs from the file's; empty if it does not.

    A study that has ``grown`` may have more trials, other attributes, and its waiting trials may have run.
    """
    found_id = storage.get_study_id_from_name(name)
    if storage.get_study_directions(found_id) != study.directions:
        return "its directions"
    if not grown and storage.get_study_user_attrs(found_id) != study.user_attributes:
        return "its user attributes"
    if not grown and storage.get_study_system_attrs(found_id) != study.system_attributes:
        return "its system attributes"
    found = storage.get_all_trials(found_id, deepcopy=False)
    if len(found) < len(study.trials) or (len(found) > len(study.trials) and not grown):
        return f"{len(found)} trials instead of {len(study.trials)}"
    for wanted, trial in zip(study.trials, found):
        if grown and wanted.state.name == "WAITING":
            continue
        here, there = fields_of(trial), fields_of(wanted)
        if here != there:
            return f"the {next(field for field in there if here[field] != there[field])} of trial {wanted.number}"
    return ""


def look_into_database(params: dict, connection: Any, optuna: optuna_schema.Optuna) -> list[str]:
    """Return the names of the studies in the database."""
    if not _optuna.has_schema(connection):
        return []
    schema = _optuna.read_schema(connection)
    mismatch = _optuna.mismatch(params["database"], schema, optuna) if schema else ""
    if mismatch:
        raise Refused(mismatch)
    return [name for name, in _connection.rows(connection, NAMES)]


def open_database(params: dict) -> Any:
    """Return Optuna's storage for the database. Each call reads the database again, without a cache."""
    from optuna import storages

    url = _connection.storage_url(params, params["database"])
    options = " ".join(f"-c {name}={value}" for name, value in QUICK.items())
    return storages.RDBStorage(url, engine_kwargs={"connect_args": {"options": options}})


def choose(params: dict, studies: list[Study], held: list[str]) -> list[Study]:
    """Return the studies to import: those that the database does not have yet."""
    present = [study for study in studies if study.name in held]
    if present:
        storage = open_database(params)
        for study in present:
            different = difference(study, storage, study.name, grown=True)
            if different:
                raise Refused(
                    f"import_as: {params['database']} already contains a study {study.name}, with other trials "
                    f"({different}); rename the new one by import_as"
                )
    return [study for study in studies if study not in present]


def add(study: Study, storage: Any, name: str) -> None:
    """Add the study to the database under another name, as ``optuna.copy_study`` does, and compare the result."""
    created = storage.create_new_study(study.directions, name)
    for key, value in study.system_attributes.items():
        storage.set_study_system_attr(created, key, value)
    for key, value in study.user_attributes.items():
        storage.set_study_user_attr(created, key, value)
    for trial in study.trials:
        storage.create_new_trial(created, template_trial=trial)
    different = difference(study, storage, name, grown=False)
    if different:
        raise Refused(f"study {study.source}: the database and the file differ in {different}; nothing was imported")


def remove_unfinished(params: dict, connection: Any) -> None:
    """Remove studies that still have a temporary name."""
    import optuna

    if not _optuna.has_schema(connection):
        return
    names = [name for name, in _connection.rows(connection, NAMES) if name.startswith(UNFINISHED)]
    storage = open_database(params) if names else None
    for name in names:
        optuna.delete_study(study_name=name, storage=storage)


def bring(params: dict, connection: Any, studies: list[Study], stamp: tuple) -> list[float]:
    """Import the studies, all or none; return the seconds that each one took."""
    seconds = []
    remove_unfinished(params, connection)
    unfinished = [f"{UNFINISHED}{number}" for number, _study in enumerate(studies)]
    try:
        storage = open_database(params)
        for study, name in zip(studies, unfinished):
            begin = time.monotonic()
            add(study, storage, name)
            seconds.append(time.monotonic() - begin)
        check_unchanged(params["file"], stamp)
        with connection.cursor() as cursor:
            cursor.execute(FINISH, {"unfinished": unfinished, "names": [study.name for study in studies]})
    except BaseException:
        remove_unfinished(params, connection)
        raise
    return seconds


@contextlib.contextmanager
def alone(params: dict) -> Iterator[Any]:
    """Connect to the database and ensure that this is its only import."""
    with _connection.connect(params, params["database"]) as connection:
        if _connection.rows(connection, LOCK) != [(True,)]:
            raise Refused(f"another import into the database {params['database']} is running; wait for its end")
        yield connection


def read_file(params: dict, installed: optuna_schema.Optuna, stamp: tuple) -> list[Study]:
    """Return the selected studies of the file, read from a copy."""
    kind, label = kind_of(params["file"]), os.path.basename(params["file"])
    with copied(params) as path:
        check_unchanged(params["file"], stamp)
        try:
            return read_source(params, open_copy(path, label, kind, params["repair"], installed))
        except (Refused, OSError):
            raise
        except Exception as error:  # any error of Optuna and SQLAlchemy for a damaged file
            raise Refused(f"import_from: {label}: Optuna reports: {_optuna.said(error)}") from None


def ensure_imported(params: dict, check_mode: bool) -> dict:
    """Import the studies that the database does not have yet."""
    stamp = stamp_of(params["file"])
    installed = optuna_schema.installed_optuna()
    if installed is None:
        raise Refused(_connection.not_importable("optuna", ImportError("No module named 'optuna'")))
    with alone(params) as connection:
        held = look_into_database(params, connection, installed)
        studies = read_file(params, installed, stamp)
        try:
            missing = choose(params, studies, held)
            seconds = bring(params, connection, missing, stamp) if missing and not check_mode else []
        except (Refused, OSError, _connection.Unreachable):
            raise
        except Exception as error:  # any error of Optuna, SQLAlchemy and psycopg2
            raise Refused(f"database {params['database']}: {_optuna.said(error)}") from None
        names = {study.name for study in missing}
        clocks = [row for row in _connection.rows(connection, _optuna.CLOCKS) if row[0] in names] if seconds else []
    took = {study.name: time for study, time in zip(missing, seconds)}
    return {
        "changed": bool(missing),
        "studies": [study.report(study in missing, took.get(study.name, 0)) for study in studies],
        "warnings": [
            *(f"study {study.source}: {odd}; imported unchanged" for study in missing for odd in study.odd),
            *_optuna.clock_warnings(params["database"], clocks, installed),
        ],
        "diff": {
            "before": "",
            "after": "".join(f"{study.name}: {len(study.trials)} trials\n" for study in missing),
        },
    }


def explain(error: Exception) -> str:
    """Return the error message for the user."""
    if isinstance(error, FileNotFoundError):
        return f"import_from: the file {error.filename} exists neither on the cluster nor on the workstation"
    if isinstance(error, OSError):
        return f"import_from: {error.filename}: {error.strerror}"
    return str(error)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "file": {"type": "path", "required": True},
            "database": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "studies": {"type": "list", "elements": "str", "default": []},
            "name": {"type": "str"},
            "repair": {"type": "bool", "default": False},
            **_connection.CONNECTION_OPTIONS,
        },
        supports_check_mode=True,
    )
    os.umask(0o077)
    try:
        result = ensure_imported(module.params, module.check_mode)
    except (OSError, _connection.Unreachable, Refused) as error:
        module.fail_json(msg=one_line(explain(error)))
    for warning in result.pop("warnings"):
        module.warn(one_line(warning))
    module.exit_json(**encodable_data(result))


if __name__ == "__main__":
    main()
