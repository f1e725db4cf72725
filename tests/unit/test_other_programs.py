# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Privileges in another program's database; tests/integration has a real one."""

from __future__ import annotations

import json
from pathlib import Path

from ansible_reader import Reader

OWN = {
    "inventory_hostname": "mini", "postgres_networks": ["10.0.0.0/8"],
    "databases_studies": [
        {"name": "mlflow", "tables": "none", "role": "mlflow"}, {"name": "mala"}, {"name": "raw", "tables": "none"},
        {"name": "second"},
    ],
}
FOUND = {"job": None, "endpoint": None, "state": None, "disk": None, "placement": "job", "may_start": False}


def test_nobody_else_gets_in_and_each_has_a_url() -> None:
    ansible = Reader()
    try:
        (rules,) = ansible.render("postgres", ["pg_hba.conf.j2"], OWN, {}, ["databases"])
        (page,) = ansible.render("server", ["status.txt.j2"], OWN, {"__server_found": FOUND})
    finally:
        ansible.end()

    allowed = [line.split()[:3] for line in rules.splitlines() if line[0] != "#"]
    logins = [['"mala","second"', '"study","reader"'], ['"mlflow"', '"mlflow"'], ['"raw"', '"study"']]
    assert allowed == [
        ["local", "all", '"alice"'], *(["local", *login] for login in logins),
        ["hostssl", "all", '"alice"'], *(["hostssl", *login] for login in logins),
    ]
    assert [line.split()[-1] for line in page.splitlines() if "postgresql" in line] == [
        "postgresql+psycopg2://mlflow@/mlflow?service=hpc_db", "postgresql+psycopg2:///raw?service=hpc_db",
        "postgresql+psycopg2:///second?service=hpc_db", "postgresql+psycopg2:///?service=hpc_db",
    ]


def test_studies_reach_modules_as_they_are_given(tmp_path: Path) -> None:
    attributes = {"rate": 1e-05, "nothing": None, "texts": ["it's", "1e-05"]}
    studies = [{"name": "\U0001f600 {x}", "directions": ["minimize"], "user_attributes": attributes}]
    given = [{"name": "mala", "studies": studies}, {"name": "mlflow", "tables": "none", "role": "mlflow"}]
    page = tmp_path / "page.j2"
    page.write_text("studies: {{ hpc_db.optuna_databases | to_json }}")
    ansible = Reader()
    try:
        (text,) = ansible.render("databases", [str(page)], {**OWN, "databases_studies": given}, {})
    finally:
        ansible.end()

    assert json.loads(text.partition(" ")[2]) == given[:1]
