# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a dashboard reaches the server: over a tunnel, or directly on the cluster itself."""

import os
import pwd
import shlex

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.dashboard_connection import dashboard_connection, ssh_arguments

ME = pwd.getpwuid(os.getuid())
SETTINGS = {
    "root": "/r a/hpc_db", "owner": ME.pw_name, "instance_name": "hpc_db", "databases_reader_role": "reader",
    "dashboard_databases": ["mala", "second"], "services": {"tunnel": {"sslmode": "require"}},
}
LIMITS = "hpc_db_patience=60&hpc_db_max_wait=60"
SSH = {
    "local": False, "program": "/opt/ssh", "host": "login", "user": None, "port": None, "identity_file": None,
    "arguments": "",
}


def test_tunnel_leads_to_the_server():
    found = dashboard_connection(SETTINGS, SSH, "/home/bob/dashboard")

    assert found == {
        "urls": {
            "mala": "postgresql+psycopg2:///mala?service=hpc_db&plugin=hpc_db&" + LIMITS,
            "second": "postgresql+psycopg2:///second?service=hpc_db&plugin=hpc_db&" + LIMITS,
        },
        "service_file": "/home/bob/dashboard/pg_service.conf",
        "tunnel": {
            "ssh": "/opt/ssh", "host": "login", "arguments": "", "root": "/r a/hpc_db", "role": "reader",
            "folder": "/home/bob/dashboard", "service": "hpc_db", "poll": 3, "parameters": {"sslmode": "require"},
        },
    }


def test_on_the_cluster_the_supervisors_entry_is_used(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")  # that of the user who runs the playbook, not of the owner

    found = dashboard_connection({**SETTINGS, "dashboard_databases": ["mala"]}, {**SSH, "local": True}, "/d")

    assert found == {
        "urls": {
            "mala": "postgresql+psycopg2://reader@/mala?service=hpc_db&plugin=hpc_db&" + LIMITS
            + "&passfile=/r%20a/hpc_db/secrets/pgpass",
        },
        "service_file": f"{ME.pw_dir}/.pg_service.conf",
        "tunnel": None,
    }


@pytest.mark.parametrize("given, words", [
    ({}, []),
    ({"arguments": "-o ProxyJump=gate -F 'my file'"}, ["-o", "ProxyJump=gate", "-F", "my file"]),
    ({"arguments": "-4", "port": 2222, "user": "it's me", "identity_file": "~/my keys/hpc"},
     ["-4", "-o", "Port=2222", "-o", "User=it's me", "-i", "/home/bob/my keys/hpc"]),
])
def test_arguments_of_ssh_are_words_of_a_shell(given, words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/bob")

    assert shlex.split(ssh_arguments({**SSH, **given})) == words
