# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run with nothing to do ends after the quick check; later changes by hand are detected and repaired."""

from __future__ import annotations

import json
import os
import re
import shlex
from typing import Any
from unittest import mock

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.last_run import look, questions
from target import Target

STUDIES = [{"name": "studies", "studies": [{"name": "beryllium", "user_attributes": {"element": "Be"}}]}]
NOTHING = re.compile(r"^\[localhost\] \w+: nothing has changed since the last run, serving on \S+:\d+$", re.MULTILINE)
URL = re.compile(r"^postgresql\+psycopg2:///\?service=\w+$", re.MULTILINE)
# Changes by hand to an instance: in its folder, or with psql in its database. The settings stay the same.
FILES = [
    "chmod 0640 secrets/pgpass", "chmod 0711 log", "echo >> conf/pg_hba.conf", "touch host/new",
    "rm host/hpc_db_host/probe.py", "mkdir data/99; echo 99 > data/99/PG_VERSION",
    "cd python/lib/python3*/site-packages && touch new.py",
]
STATEMENTS = [
    "REVOKE SELECT ON trials FROM reader",
    "ALTER DEFAULT PRIVILEGES FOR ROLE study IN SCHEMA public REVOKE SELECT ON TABLES FROM reader",
    "GRANT CREATE ON SCHEMA public TO reader", "GRANT TEMPORARY ON DATABASE studies TO PUBLIC",
    "ALTER ROLE reader RESET default_transaction_read_only", "ALTER ROLE reader CONNECTION LIMIT 99",
    "GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC", "ALTER ROLE reader IN DATABASE studies SET work_mem = '1GB'",
    "ALTER ROLE study CREATEDB", "ALTER ROLE study PASSWORD 'guessed'", "ALTER DATABASE studies OWNER TO CURRENT_USER",
    "DROP TRIGGER {trigger} ON trials", "UPDATE study_user_attributes SET value_json = '1'",
    "UPDATE study_directions SET direction = 'MAXIMIZE'", "UPDATE version_info SET library_version = '3.0.0'",
]


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

    def psql(self, statement: str, database: str = "studies") -> str:
        psql = f"{self.settings['postgres_bindir']}/psql"
        service = f"service={self.name} dbname={database} user="
        return self.shell(f"{shlex.quote(psql)} -XAtq -d '{service}'$(id -un) -c {shlex.quote(statement)}")

    def look(self) -> dict:
        params = {
            "name": self.name, "root": self.root, "scheduler": "local", "bin_dir": None, "fingerprint": "",
            "roles": ["study", "reader"], "databases": STUDIES, "others": [], "environment": None,
        }

        def ask(command: list) -> str:
            return self.shell(f"{shlex.join(command)} <<'EOF'\n{questions(params)}\nEOF")

        with mock.patch("os.geteuid", return_value=os.stat(self.root).st_uid):  # the module runs as the owner
            return look(params, lambda command: self.shell(f"cd host && {shlex.join(command)}"), ask)[0]

    def differs(self, before: dict) -> tuple[set, dict]:
        after = self.look()
        return {key for key in before if after.get(key) != before[key]}, after


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
    trigger = instance.psql("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
    for statement in STATEMENTS:
        instance.psql(statement.format(trigger=trigger))
        differing, seen = instance.differs(seen)
        assert differing == {"databases"}, statement
    for script in FILES:
        instance.shell(script)
        differing, seen = instance.differs(seen)
        assert differing == {"files"}, script

    instance.psql("DROP DATABASE studies WITH (FORCE)", database="postgres")
    with pytest.raises(AssertionError, match='database "studies" does not exist'):
        instance.look()
    job = json.loads(instance.shell("cat run/endpoint.json"))["job"]
    queue = "python3 -m hpc_db_host.local_job queue"
    instance.shell(f"rm -r data/99; cd host; kill {job}; while [ \"$({queue})\" ]; do sleep 0.1; done")
    assert instance.look() == {}

    mended = instance.play()
    assert "changed=0" not in mended and not NOTHING.search(mended)
    assert instance.psql("SELECT study_name, direction FROM studies JOIN study_directions USING (study_id)") == (
        "beryllium|MINIMIZE"
    )
    assert instance.psql("SELECT rolcreatedb FROM pg_roles WHERE rolname = 'study'") == "f"
    assert instance.shell("stat -c %a log secrets/pgpass").split() == ["700", "600"]
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
