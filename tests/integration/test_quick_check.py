# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run with nothing to do ends after the quick check; a full run repairs what the quick check does not read."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from ansible_collections.mala.hpc_db.plugins.modules.quick_check import FOLDERS, checksum, find_serving
from target import Target

STUDIES = [{"name": "studies", "studies": [{"name": "beryllium", "user_attributes": {"element": "Be"}}]}]
NOTHING = re.compile(
    r"^\[localhost\] \w+: nothing changed since the last full run, serving on \S+:\d+$", re.MULTILINE
)
URL = re.compile(r"^postgresql\+psycopg2:///\?service=\w+$", re.MULTILINE)
# Changes by hand in the instance's folder that the quick check notices. The settings stay the same.
FILES = [
    "chmod 0640 secrets/pgpass", "chmod 0711 conf", "echo >> conf/pg_hba.conf", "touch host/new",
    "rm host/hpc_db_host/probe.py",
]
# Changes that only a full run notices: in the folder, each with a command whose output shows it ...
OTHER_FILES = {
    "chmod 0711 log": "stat -c %a log",
    "cd python/lib/python3*/site-packages && rm -r optuna optuna-*": "python/bin/python -c 'import optuna' 2>&1 || :",
}
# ... and in the database, each with a query whose answer shows it.
SETTINGS_OF_READER = """
SELECT setdatabase, unnest(setconfig) FROM pg_db_role_setting WHERE setrole = 'reader'::regrole ORDER BY 1, 2
"""
STATEMENTS = {
    "REVOKE SELECT ON trials FROM reader": "SELECT has_table_privilege('reader', 'trials', 'SELECT')",
    "ALTER DEFAULT PRIVILEGES FOR ROLE study IN SCHEMA public REVOKE SELECT ON TABLES FROM reader":
        "SELECT count(*) FROM pg_default_acl, aclexplode(defaclacl) WHERE defaclrole = 'study'::regrole",
    "GRANT CREATE ON SCHEMA public TO reader": "SELECT has_schema_privilege('reader', 'public', 'CREATE')",
    "GRANT TEMPORARY ON DATABASE studies TO PUBLIC": "SELECT has_database_privilege('reader', 'studies', 'TEMPORARY')",
    "ALTER ROLE reader RESET default_transaction_read_only": SETTINGS_OF_READER,
    "ALTER ROLE reader IN DATABASE studies SET work_mem = '1GB'": SETTINGS_OF_READER,
    "ALTER ROLE reader CONNECTION LIMIT 99": "SELECT rolconnlimit FROM pg_roles WHERE rolname = 'reader'",
    "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC":
        "SELECT has_function_privilege('reader', 'lo_create(oid)', 'EXECUTE')",
    "ALTER ROLE study CREATEDB": "SELECT rolcreatedb FROM pg_roles WHERE rolname = 'study'",
    "ALTER DATABASE studies OWNER TO CURRENT_USER":
        "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'studies'",
    "DROP TRIGGER {trigger} ON trials": "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal",
    "UPDATE study_user_attributes SET value_json = '1'": "SELECT value_json FROM study_user_attributes",
}
# Each place in the instance directory that the quick check ignores, and who looks at it instead.
IGNORED = {
    "data": "a full run: roles, databases and studies", "python": "a full run: packages",
    "dumps": "a full run: permissions; the server job writes it", "log": "a full run: permissions; the server job",
    "run": "the server job, which the quick check asks for",
}
DIRECTION = "UPDATE study_directions SET direction = '{}'"


class Instance:
    """An instance of the user; this process runs the module's check on it."""

    def __init__(self, here: Target, settings: dict) -> None:
        self.here, self.settings = here, {**settings, "databases_studies": STUDIES}
        self.name = str(here.variables["instance_name"])
        self.root = here.run(f"echo ~/hpc_db/{self.name}")

    def play(self, *options: str, **settings: Any) -> str:
        played = self.here.play("hpc_db", {**self.settings, **settings}, *options)
        assert played.returncode == 0, played.stdout
        return played.stdout

    def shell(self, script: str) -> str:
        return self.here.run(f"cd {self.root} && {script}")

    def psql(self, statement: str, database: str = "studies", user: str = "") -> str:
        psql = f"{self.settings['postgres_bindir']}/psql"
        service = f"service={self.name} dbname={database} user="
        return self.shell(f"{shlex.quote(psql)} -XAtq -d '{service}'{user or '$(id -un)'} -c {shlex.quote(statement)}")

    def look(self) -> str:
        """Return the checksum that the quick check compares; empty if the job does not serve."""
        params = {"name": self.name, "root": self.root, "scheduler": "local", "bin_dir": None}
        _job, endpoint = find_serving(params, lambda command: self.shell(f"cd host && {shlex.join(command)}"))
        return checksum(self.root) if endpoint else ""


def test_one_look_is_enough_until_something_differs(here: Target, quick_settings: dict) -> None:
    instance = Instance(here, quick_settings)

    assert not NOTHING.search(instance.play())
    given = instance.settings.items()
    as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given}
    for option, settings in (("--diff", {}), ("--check", as_text)):
        again = instance.play(option, **settings)
        assert NOTHING.search(again) and URL.search(again) and "changed=0" in again
        assert again.count("TASK [") < 10
    refused = here.play("hpc_db", {**instance.settings, "postgres_port": 80}, "--check").stdout
    assert "postgres_port: 80 is not allowed" in refused and not NOTHING.search(refused)

    seen = instance.look()
    for script in FILES:
        instance.shell(script)
        before, seen = seen, instance.look()
        assert seen not in ("", before), script

    instance.psql("DROP DATABASE studies WITH (FORCE)", database="postgres")
    job = json.loads(instance.shell("cat run/endpoint.json"))["job"]
    queue = "python3 -m hpc_db_host.local_job queue"
    instance.shell(f"cd host; kill {job}; while [ \"$({queue})\" ]; do sleep 0.1; done")
    assert instance.look() == ""

    mended = instance.play()
    assert "changed=0" not in mended and not NOTHING.search(mended)
    assert instance.psql("SELECT study_name, direction FROM studies JOIN study_directions USING (study_id)") == (
        "beryllium|MINIMIZE"
    )
    assert instance.shell("stat -c %a conf secrets/pgpass").split() == ["700", "600"]
    assert NOTHING.search(instance.play())


def test_every_place_is_compared_or_ignored_for_a_reason(here: Target, quick_settings: dict) -> None:
    """A role that keeps something in a new place adds it to the quick check, or to IGNORED with the reason."""
    instance = Instance(here, quick_settings)
    instance.play(server_look_closely=True)

    places = instance.shell("ls -A").split()

    assert sorted(places) == sorted([*FOLDERS, *IGNORED])


def test_full_run_mends_what_the_quick_check_does_not_read(here: Target, quick_settings: dict) -> None:
    instance = Instance(here, quick_settings)
    instance.play()

    def answers() -> dict[str, str]:
        found = {statement: instance.psql(question) for statement, question in STATEMENTS.items()}
        return {**found, **{script: instance.shell(command) for script, command in OTHER_FILES.items()}}

    before = answers()
    trigger = instance.psql("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
    for statement in STATEMENTS:
        instance.psql(statement.format(trigger=trigger))
    for script in OTHER_FILES:
        instance.shell(script)
    instance.psql("ALTER ROLE study PASSWORD 'guessed'")
    changed = answers()
    assert not [change for change in before if changed[change] == before[change]]
    assert NOTHING.search(instance.play())

    mended = instance.play(server_look_closely=True)

    assert "changed=0" not in mended and not NOTHING.search(mended)
    assert answers() == before
    assert instance.psql("SELECT current_user", user="study") == "study"
    assert NOTHING.search(instance.play())


def test_after_a_full_run_that_failed_there_is_another(here: Target, quick_settings: dict) -> None:
    instance = Instance(here, quick_settings)
    instance.play()
    instance.psql(DIRECTION.format("MAXIMIZE"))

    refused = here.play("hpc_db", {**instance.settings, "server_look_closely": True})
    instance.psql(DIRECTION.format("MINIMIZE"))

    assert refused.returncode != 0
    assert "directions cannot be changed" in " ".join(refused.stdout.split()), refused.stdout
    assert not NOTHING.search(instance.play())
    assert NOTHING.search(instance.play())


def test_rotation_that_was_killed_before_its_last_step_is_mended(here: Target, quick_settings: dict) -> None:
    """The running server already has the new passwords, and rejects those in the file."""
    instance = Instance(here, quick_settings)
    instance.play()
    instance.shell("cd secrets && mv pgpass pgpass.new && umask 077 && sed 's/:[^:]*$/:old/' pgpass.new > pgpass")
    begun = instance.shell("cat secrets/*")

    assert "changed=0" not in instance.play("--check")
    assert instance.shell("cat secrets/*") == begun
    instance.play()

    assert "pgpass.new" not in instance.shell("ls secrets").split()
    assert instance.psql("SELECT count(*) FROM studies") == "1"
    assert NOTHING.search(instance.play())
