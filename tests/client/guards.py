# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Show that each guard of the plugin and of the storage proxy is needed: in a copy without it, a test must fail.

PYTHON tests/client/guards.py [NAME...]; the Python belongs to an environment for tests/client. With names, only those
guards are tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGES = [HERE.parents[1] / "client/src/hpc_db_client", HERE.parents[1] / ".cache/host/hpc_db_host"]
PROXY = HERE.parents[1] / "roles/server/files/storage_proxy.py"
FILES = (
    "connection.py", "catalog.py", "journal.py", "sql.py", "plugin.py", "dialect.py", "proxy.py", "storage_proxy.py"
)
SECONDS = 180  # a test that hangs without a guard also counts as failed


class Guard(NamedTuple):
    """The guard's code, its replacement, and the tests that must fail."""

    old: str
    new: str
    tests: str  # in the syntax of pytest's -k


GUARDS = {
    "data behind a pooler": Guard(
        "self._link.check(self._facts.identity.system, *data)  # guard: data behind a pooler\n", "pass\n",
        "other_data_behind",
    ),
    "mark of this transaction": Guard("not (self._bound or journal.why_not) and self._mark", "self._mark", "in_words"),
    "data behind a pooler, without a mark": Guard(
        "self._link.check(self._facts.identity.system, *data)  # guard: data behind a pooler, without a mark", "pass",
        "without_a_mark",
    ),
    "identity": Guard("if identity != self._identity:", "if False:", "other_data"),
    "what may stay in the session": Guard("if judged.binds:", "if False:", "not_taken_for_the_temporary"),
    "unknown statements": Guard("if judged.why:  #", "if False:  #", "definition_in"),
    "rows of an executemany": Guard(
        'self._journal.give_up("an executemany that returns rows, or has options")', "pass", "executemany_that"
    ),
    "parameters": Guard("self.bind(why)  #", "return_unused = why  #", "parameter_that_is_sql"),
    "what names mean": Guard("if unknown:  #", "if False:  #", "not_lost_silently"),
    "clock": Guard("if self._journal.clock_twice:  #", "if False:  #", "clock"),
    "clock of a new transaction": Guard(
        "if self._journal.clock_twice and self._journal.repeats:", "if False:", "clock"
    ),
    "clock that is not named": Guard("if kind in timed and", "if False and", "not_named"),
    "search_path": Guard(
        "if self._journal.began and self._journal.path != self._facts.path:", "if False:", "names_mean_the_same"
    ),
    "half a transaction": Guard("if self._lost:  #", "if False:  #", "interrupted"),
    "results": Guard("if after != before:", "if False:", "read_something_else or set_of_parameters"),
    "an iterator gives its items once": Guard(
        "arguments = (list(arguments[0]), *arguments[1:])", "pass", "iterator"
    ),
    "each set of parameters": Guard("digest(None, said, None)", "digest(None, said[-1], None)", "set_of_parameters"),
    "fork": Guard("os.register_at_fork(", "(lambda **_unused: None)(", "forked"),
    "sequences that begin again": Guard("if sequence.cycles:", "if False:", "count_otherwise"),
    "order of keys": Guard("for table in self.late:", "for table in ():", "keys_that_count"),
    "order of keys, behind views": Guard("seen = follow(step.judged.names)", "seen = '', set()", "one_number"),
    "order of keys, when the locks are held": Guard(
        "if not tables <= journal.late and _is_late(", "if False and _is_late(", "locks_are_held"
    ),
    "keys that a crash gives twice": Guard("if crashed:  #", "if False:  #", "crash_may"),
    "closed": Guard("if self._closed:  #", "if False:  #", "stays_closed"),
    "values whose text is not all of them": Guard("chunk = _shown(chunk)", "pass", "show_what_they_are"),
    "keys that something else gives": Guard("if fills and sequence is not None:", "if True:", "one_number"),
    "keys that were seen": Guard(
        "if step.given and step.judged.insert:", "if False:", "keys_that_the_program or objects_keep"
    ),
    "snapshot": Guard("self.isolated or judged.isolates", "self.isolated", "snapshot"),
    "isolation level": Guard(
        'and "isolation_level" not in self._attributes and "set_isolation_level" not in self._attributes', "",
        "repeatable_read",
    ),
    "what was committed": Guard('return status == "committed"', "return False", "commit_that_was_cut"),
    "server that cannot tell": Guard("if not before.mark:", "if False:", "does_not_say_which"),
    "id that was not made durable": Guard(
        'or (status == "committed" and lsn)', 'or status == "committed"', "cannot_make_sure"
    ),
    "calls": Guard(
        "raise Unknown(f\"the effect of {token.text}", "continue; raise Unknown(f\"the effect of {token.text}",
        "judgement",
    ),
    "INTO": Guard('raise Unknown("INTO creates a table")', "pass", "judgement"),
    "temporary tables": Guard('raise Unknown("a temporary table")', "pass", "judgement"),
    "the server's own tables": Guard("if not judged.free and _has_server_s_own(names):", "if False:", "judgement"),
    "the server's own tables, in triggers": Guard("if _has_server_s_own(names):", "if False:", "judgement"),
    "parameters within literals": Guard(
        'raise Unknown("a parameter within a literal, a name or a comment")', "pass", "judgement"
    ),
    "a literal in two parts": Guard('raise Unknown("a literal in two parts")', "pass", "judgement"),
    "backslashes": Guard(
        'raise Unknown("a backslash in a literal, with standard_conforming_strings off")', "pass", "judgement"
    ),
    "long texts": Guard("if end > MOST_CHARACTERS or len(found) >= MOST_TOKENS:", "if False:", "too_long"),
    "percent signs in names": Guard(
        'meant = part.replace("%%", "%") if has_arguments else part', "meant = part", "doubled_percent"
    ),
    "words that are not reserved": Guard(
        "if {before.word, two} & _CONTEXT.get(token.word, set()):", "if token.word in _CONTEXT:", "judgement"
    ),
    "DECLARE": Guard(
        'declares = declares and token.word != "begin"',
        'declares = (declares or token.word == "declare") and token.word != "begin"', "body_of_a_trigger",
    ),
    "the server's own tables, in views": Guard(
        "if not why and _has_server_s_own(judged.names):", "if False:", "all_that_a_database"
    ),
    "aggregates": Guard(
        "WHERE p.oid >= 16384 AND (", "WHERE p.oid >= 16384 AND p.prokind <> 'a' AND (", "all_that_a_database"
    ),
    "types within types": Guard(
        "UNION SELECT other FROM type JOIN consists ON one = type.oid WHERE other >= 16384", "", "all_that_a_database"
    ),
    "relations that are gone": Guard(
        "WHERE NOT EXISTS (SELECT FROM pg_class WHERE relname", "WHERE false AND NOT EXISTS (SELECT FROM pg_class"
        " WHERE relname", "that_is_gone",
    ),
    "other encodings": Guard("WHERE getdatabaseencoding() <> 'UTF8'", "WHERE false", "cut_elsewhere"),
    "values with a backslash": Guard('if "\\\\" in str(value):', "if False:", "end_its_literal"),
    "bulk": Guard("if self._bytes > MOST_BYTES or len(self.steps) >= MOST_STEPS:", "if False:", "bulk"),
    "AUTOCOMMIT": Guard(
        "if self.real.autocommit:\n            self._check_data", "if False:\n            self._check_data",
        "without_a_transaction",
    ),
    "what a listener sets": Guard("if not self.looks:", "if False:", "listener"),
    "what was done with the driver's own": Guard(
        "if self._bound or not self.real.closed:", "if not self.real.closed:", "copy_that_was_cut"
    ),
    "parked": Guard("if self._parked and not self._bound:", "if self._parked:", "behind_a_pooler"),
    "pools of others": Guard('if kwargs.get("pool") is not None:', "if False:", "pool_of_somebody"),
    "creators": Guard("pool._creator = connect", "pass", "opened_otherwise"),
    "notes": Guard("session.execute(*self._note.now)", "pass", "told_once"),
    "note of a commit that was cut": Guard("what = self._done(request)  #", "what = None  #", "commit_s_answer"),
    "deletions": Guard("lambda: self._storage.delete_study(study_id)", "lambda: None", "deleted_once"),
    "attributes of studies": Guard('NOTE_CHANGE = NOTE + ":study"', 'NOTE_CHANGE = "SELECT 1"', "another_worker_has"),
    "notes that are waited for": Guard("now() - interval '90 days'", "now() - interval '1 day'", "after_weeks"),
    "notes that nobody needs": Guard("self._answered.append(said[REQUEST])", "pass", "nobody_needs"),
    "notes of clients that have ended": Guard("        once.forget()\n", "        pass\n", "nobody_needs"),
    "longest patience": Guard("if not 0 <= seconds <= MOST_SECONDS:", "if False:", "patience_ends"),
    "requests that nobody knows": Guard(
        'if name not in ONCE | TWICE and not name.startswith("Get"):', "if False:", "unknown_request"
    ),
    "repetitions": Guard("if request is None:", "if True:", "repetition_waits"),
    "other certificate": Guard(
        "(address, certificate, key) != self._made_for", "address != (self._made_for or [0])[0]", "other_certificate"
    ),
    "certificate that is missing": Guard(
        "except FileNotFoundError as error:  #", "except EOFError as error:  #", "made_anew"
    ),
    "other data behind the storage proxy": Guard("os._exit(ANEW)", "pass", "clients_are_told"),
}


def notices(guard: Guard, folder: Path) -> bool:
    """Return whether a test fails without the guard."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(package, folder / package.name)
    shutil.copy(PROXY, folder)
    found = 0
    for file in folder.rglob("*.py"):
        if file.name not in FILES:
            continue
        text = file.read_text()
        found += text.count(guard.old)
        file.write_text(text.replace(guard.old, guard.new))
    if found != 1:
        raise SystemExit(f"{guard.old!r} is {found} times in the plugin, not once")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE), "-k", guard.tests, "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={folder} {HERE}"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        ended = subprocess.run(
            command, env=environment, timeout=SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    if ended.returncode not in (0, 1):
        raise SystemExit(ended.stdout.decode()[-2000:])
    return ended.returncode == 1


def main() -> int:
    wanted = sys.argv[1:] or list(GUARDS)
    missed = []
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        for name in wanted:
            noticed = notices(GUARDS[name], Path(folder) / "src")
            print(f"{name}: {'a test fails without it' if noticed else 'NO TEST FAILS WITHOUT IT'}", flush=True)
            if not noticed:
                missed.append(name)
    print(f"{len(wanted) - len(missed)} of {len(wanted)} guards are tested")
    return len(missed) > 0


if __name__ == "__main__":
    sys.exit(main())
