# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values of the right type that a setting may not have are refused, with the allowed ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.modules.settings import DOCUMENTATION
from ansible_collections.mala.hpc_db.plugins.plugin_utils.rules import RULES, broken
from ansible_reader import Reader

HBA = {"type": "local", "databases": ["all"], "users": ["all"], "method": "peer", "options": ""}
EMBEDDED = {
    "postgres_provider": "embedded", "postgres_major": 18, "postgres_tls": False, "postgres_listen_addresses": "::1",
    "postgres_python_provider": "pip", "server_pooler": False,
}
LOGS = {"tensorboard_logs": [{"name": "a", "path": "~/a"}]}

REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({"instance_name": name}, f"instance_name: {name or 'nothing'} is not allowed; lower case letters, digits and")
      for name in ("a b", "a\n", "-x", "it's", "1a", "A", "\u03a9", "x" * 41, "")],
    *[({"instance_cluster": name}, f"instance_cluster: {name} is not allowed; letters, digits and ._- after a letter o")
      for name in ("a\nb", "$(touch x)", "-x", ".x")],
    *[({"instance_study_role": name}, f"instance_study_role: {name} is not allowed; lower case letters, digits and")
      for name in ("a\n", 'a"b', "pg_a", "x" * 64)],
    *[({"instance_memory": text}, f"instance_memory: {text} is not allowed; the server job's memory as a number with K")
      for text in ("a lot", "12Q", "0G", "1.5G", "16GB", "16G\n")],
    ({"databases_workers": 0}, "databases_workers: 0 is not allowed; a number of processes, 1 or more"),
    ({"postgres_port": 1023}, "postgres_port: 1023 is not allowed; a port from 1024 to 65535"),
    ({"postgres_port": 65536}, "postgres_port: 65536 is not allowed; a port from 1024 to 65535"),
    ({"postgres_major": 13}, "postgres_major: 13 is not allowed; 14 or newer"),
    ({**EMBEDDED, "postgres_major": 17},
     "postgres_major: 17 with postgres_provider embedded is not allowed; 18, which the provider embedded contains"),
    ({**EMBEDDED, "postgres_tls": True},
     "postgres_tls: True with postgres_provider embedded is not allowed; false, since the provider embedded has no"),
    ({"postgres_provider": "system", "postgres_lock_file": "my.lock"},
     "postgres_lock_file: my.lock with postgres_provider system is not allowed; only conda packages (rattler, conda)"),
    ({"postgres_provider": "system", "postgres_python_provider": "conda"},
     "postgres_python_provider: conda with postgres_provider system is not allowed; pip, since other providers"),
    ({"postgres_provider": "conda", "postgres_staged": True},
     "postgres_staged: True with postgres_provider conda is not allowed; only with the provider rattler, whose"),
    ({"postgres_staged": True, "postgres_python_packages": ["a", "b --hash=sha256:1"]},
     "postgres_python_packages: a, b --hash=sha256:1 with postgres_staged is not allowed; requirements without hashes"),
    ({**EMBEDDED, "postgres_listen_addresses": "*"},
     "postgres_listen_addresses: * with postgres_provider embedded is not allowed; 127.0.0.1, since the provider"),
    *[({"postgres_listen_addresses": text}, f"postgres_listen_addresses: {text} is not allowed; *, or host names and")
      for text in ("a\nb", "a'b")],
    *[({"postgres_max_connections": text}, f"postgres_max_connections: {text} is not allowed; a number of connections,")
      for text in ("100\nfsync = off", "0", "many", "1000000")],
    *[({"postgres_networks": ["all", text]}, f"postgres_networks: all, {text or 'nothing'} is not allowed; all, samene")
      for text in ("10.0.0.0", "10.0.0.0/33", "300.0.0.1/8", "::1/129", "all\n", "all trust", "")],
    *[({"postgres_settings": {"fsync": 1, name: 1}}, f"postgres_settings: fsync, {name} is not allowed; names of Postg")
      for name in ("work mem", "work_mem\n", "it's", "-x", "A")],
    ({"postgres_settings": {"log_line_prefix": "%t"}},
     "postgres_settings: log_line_prefix: %t is not allowed; not set, since the doctor reads only lines with this"),
    ({"postgres_settings": {"lc_messages": "de_DE"}},
     "postgres_settings: lc_messages: de_DE is not allowed; not set, since clients and the doctor parse PostgreSQL's"),
    *[({"postgres_hba_rules": [HBA, {**HBA, key: [name]}]}, f"postgres_hba_rules: {name or 'nothing'} is not allowed; ")
      for key in ("databases", "users") for name in ('a" trust', "a\nb", "")],
    *[({"postgres_hba_rules": [{**HBA, key: text}]}, f"postgres_hba_rules: {text} is not allowed; values of one line,")
      for key, text in (("options", "map=a\nlocal all all trust"), ("address", "10.0.0.0/8\nlocal"))],
    ({"server_placement": "workers", "server_scheduler": "gridengine"},
     "server_placement: workers with server_scheduler gridengine is not allowed; job, since this scheduler kills all"),
    ({"server_candidates": 0}, "server_candidates: 0 is not allowed; 1 to 100 jobs"),
    ({"server_candidates": 101}, "server_candidates: 101 is not allowed; 1 to 100 jobs"),
    *[({"server_workers_shared_buffers": text}, f"server_workers_shared_buffers: {text} is not allowed; a size with kB")
      for text in ("512", "0MB", "1.5GB", "512 MB", "1G")],
    *[({"server_python": text}, f"server_python: {text or 'nothing'} is not allowed; the name of a Python, or its path")
      for text in ("-c", "a\ntouch x", "$(touch x)", "", "~alice/python")],
    *[({"server_address": text}, f"server_address: {text} is not allowed; a host name, an address, socket, or nothing")
      for text in ("a b", "c1\n[other]", "-x", "a,b")],
    *[({"server_socket_parent": text}, f"server_socket_parent: {text} is not allowed; an absolute path of letters, dig")
      for text in ("tmp", "/tmp/a,b", "/tmp/it's", "/tmp/a\nb", "/tmp/{x}")],
    *[({"instance_name": "abc", "server_socket_parent": text},
       f"server_socket_parent: {text} is not allowed; at most 72 bytes, since a socket's path has at most 107")
      for text in ("/" + "x" * 72, "/" + "\u03a9" * 36)],
    ({"server_lease_ttl": 4}, "server_lease_ttl: 4 is not allowed; 5 seconds or more, 90 on NFS"),
    ({"server_stop_notice": 0}, "server_stop_notice: 0 is not allowed; 1 to 65535 seconds"),
    ({"server_stop_notice": 65536}, "server_stop_notice: 65536 is not allowed; 1 to 65535 seconds"),
    *[({"server_handover_after": text}, f"server_handover_after: {text} is not allowed; a share of the walltime such ")
      for text in ("half", "100%", "-1%", "50 %", "12h", "1:2:3:4", "50%\n", "43200", "0%", "0:00", "0:00:59")],
    *[({"server_pooler_program": text}, f"server_pooler_program: {text} is not allowed; a path that begins with / or ~")
      for text in ("pgbouncer", "/a\nb", "-x")],
    ({"server_pooler": True, "postgres_provider": "system", "server_pooler_program": ""},
     "server_pooler_program: nothing with postgres_provider system is not allowed; the path of a PgBouncer, since onl"),
    ({"server_pooler_port": 80}, "server_pooler_port: 80 is not allowed; a port from 1024 to 65535"),
    *[({"server_pooler_connections": text}, f"server_pooler_connections: {text} is not allowed; a number of connection")
      for text in ("10\nauth_type = any", "0", "many")],
    ({"server_pooler": True, "server_pooler_connections": "91", "postgres_max_connections": "100"},
     "server_pooler_connections: 91 of postgres_max_connections 100 is not allowed; at most postgres_max_connections"),
    *[({"server_pooler": True, "postgres_networks": [text]},
       f"postgres_networks: {text} with server_pooler is not allowed; all, or networks such as 10.1.0.0/16, which Pg")
      for text in ("samenet", "samehost")],
    ({"server_proxy_port": 80}, "server_proxy_port: 80 is not allowed; a port from 1024 to 65535"),
    ({"server_proxy_connections": 0}, "server_proxy_connections: 0 is not allowed; 1 to 1000 connections"),
    ({"server_proxy_connections": 1001}, "server_proxy_connections: 1001 is not allowed; 1 to 1000 connections"),
    ({"workers_number": 0}, "workers_number: 0 is not allowed; a number of processes, 1 or more"),
    ({"workers_job_name": "a b"}, "workers_job_name: a b is not allowed; letters, digits and ._- after a letter or a"),
    ({"workers_job_name": "x", "server_job_name": "x"}, "workers_job_name: x is not allowed; letters, digits and ._-"),
    *[({"workers_url": text}, f"workers_url: {text} is not allowed; a URL that begins with postgresql, without spaces")
      for text in ("mysql://", "postgresql:///a b", "postgresql:///{x}", "postgresql:///\n")],
    ({"workers_study": "a\nb"}, "workers_study: a\nb is not allowed; one line"),
    ({"workers_study": ""}, "workers_study: nothing is not allowed; one line"),
    ({"workers_trials": 0}, "workers_trials: 0 is not allowed; a number of trials, 1 or more"),
    ({"workers_python": "python"}, "workers_python: python is not allowed; the path of a Python, which begins with /"),
    ({"workers_program": "x.py"}, "workers_program: x.py is not allowed; the path of a Python program, which begins"),
    ({"workers_patience": -1}, "workers_patience: -1 is not allowed; 0 seconds or more"),
    ({"workers_max_wait": -1}, "workers_max_wait: -1 is not allowed; 0 seconds or more"),
    ({"workers_outage": 0}, "workers_outage: 0 is not allowed; 1 second or more"),
    ({"workers_wait_time": -1}, "workers_wait_time: -1 is not allowed; 0 seconds or more"),
    ({"dashboard_databases": []}, "dashboard_databases: an empty list is not allowed; names in databases_studies with"),
    ({"dashboard_databases": ["studies", "nope"]},
     "dashboard_databases: studies, nope is not allowed; names in databases_studies with Optuna's tables (studies)"),
    ({"dashboard_port": 1023}, "dashboard_port: 1023 is not allowed; a port from 1024 to 65535, with a following port"),
    ({"dashboard_port": 65536}, "dashboard_port: 65536 is not allowed; a port from 1024 to 65535, with a following"),
    ({"dashboard_root": "here"}, "dashboard_root: here is not allowed; an absolute path, or one that begins with ~/"),
    ({"dashboard_timeout": 0}, "dashboard_timeout: 0 is not allowed; 1 second or more"),
    ({"tensorboard_logs": []}, "tensorboard_logs: nothing is not allowed; name the folders on the cluster, such as ["),
    *[({"tensorboard_logs": [{"name": name, "path": "~/a"} for name in names]},
       f"tensorboard_logs: {', '.join(names)} is not allowed; unique names of letters, digits, '.', '_' and '-', a")
      for names in (["a b"], ["a", "a"], [".a"])],
    ({"tensorboard_logs": [{"name": "a", "path": "runs"}]},
     "tensorboard_logs: runs is not allowed; each path begins with / or ~/"),
    ({**LOGS, "tensorboard_reload_interval": 0},
     "tensorboard_reload_interval: 0 is not allowed; 1 second or more"),
]
ALLOWED: list[dict[str, Any]] = [
    {}, {"instance_name": "x" * 40}, {"instance_memory": "4000"}, {"postgres_port": 1024}, {"postgres_port": 65535},
    EMBEDDED, {**EMBEDDED, "postgres_listen_addresses": "localhost"},
    {"postgres_networks": ["all", "samenet", "10.1.0.0/16", "255.0.0.1/32", "::1/128", "fe80::/10"]},
    {"postgres_settings": {"work_mem": "4MB", "auto_explain.log_min_duration": 1}},
    {"postgres_hba_rules": [{**HBA, "users": ["Ω it's"], "address": None, "options": "clientcert=verify-full"}]},
    {"server_placement": "workers", "server_candidates": 100, "server_workers_shared_buffers": "1GB"},
    {"server_address": "socket"}, {"server_address": "::1"}, {"server_python": "python3.11"},
    {"server_socket_parent": "/tmp/-a b Ω=+@"}, {"instance_name": "abc", "server_socket_parent": "/" + "x" * 71},
    {"server_pooler": True, "server_pooler_connections": "90", "postgres_max_connections": "100"},
    *[{"server_handover_after": text} for text in ("", "5%", "33.3%", "90:00", "12:00:00", "2-00")],
    {"dashboard_port": 0}, {"dashboard_port": 65535}, {"workers_python": "~/env/bin/python"}, {"workers_url": ""},
]


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """Return the defaults of all settings, and log folders, which have none."""
    reader = Reader()
    try:
        return {**reader.settings({}), **LOGS}
    finally:
        reader.end()


@pytest.mark.parametrize("given, says", REFUSED)
def test_a_value_is_refused(given: dict, says: str, usual: dict) -> None:
    errors = broken(RULES, {**usual, **given})

    assert len(errors) == 1 and errors[0].startswith(says), errors


@pytest.mark.parametrize("given", ALLOWED)
def test_a_value_is_allowed(given: dict, usual: dict) -> None:
    assert broken(RULES, {**usual, **given}) == []


def test_all_errors_of_the_given_roles_are_named_at_once(usual: dict) -> None:
    given = {**usual, "postgres_port": 80, "postgres_settings": {"-x": 1, "lc_messages": "C"}, "server_proxy_port": 1}

    assert [error.split(":")[0] for error in broken(["postgres"], given)] == [
        "postgres_port", "postgres_settings", "postgres_settings",
    ]


def test_every_rule_refuses_something_above(usual: dict) -> None:
    for role, rules in RULES.items():
        refusing = [rules(SimpleNamespace(**{**usual, **given})) for given, _says in REFUSED]
        for number, rule in enumerate(rules(SimpleNamespace(**usual))):
            assert not all(each[number].is_kept for each in refusing), (role, rule)


def test_the_module_names_every_role_with_rules() -> None:
    assert yaml.safe_load(DOCUMENTATION)["options"]["roles"]["choices"] == list(RULES)
