# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every setting has the same meaning as text (``-e NAME=VALUE``), in YAML and in JSON, with Ansible's own parsers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.splitter import parse_kv
from ansible_collections.mala.hpc_db.plugins.action.settings import ROLES, Refused, options_of_roles, typed
from ansible_reader import Reader
from ansible_reader import Refused as Unusable

OPTIONS = options_of_roles()
PLAYBOOKS = sorted((ROLES.parent / "playbooks").glob("*.yml"))


@pytest.fixture(scope="module")
def ansible() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.end()


def sample(option: dict, switch: bool) -> Any:
    """Return a value that the option accepts."""
    if option["type"] == "list":
        return [sample({**option, "type": option["elements"]}, switch)]
    if option["type"] == "dict" and "options" in option:
        return {name: sample(inner, switch) for name, inner in option["options"].items()}
    if "choices" in option:
        return option["choices"][-1 if switch else 0]
    return {"bool": switch, "int": 4711, "str": "17", "dict": {"a": "b", "c": switch}}[option["type"]]


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def as_number(value: Any) -> Any:
    """Return the value as YAML reads it when the quotes are missing."""
    if isinstance(value, (dict, list)):
        return [*map(as_number, value)] if isinstance(value, list) else {k: as_number(v) for k, v in value.items()}
    return 17 if value == "17" else value


@pytest.mark.parametrize("switch", [False, True])
def test_every_setting_is_the_same_in_every_form(switch: bool, ansible: Reader) -> None:
    wanted = {name: sample(option, switch) for name, option in OPTIONS.items()}
    forms = {
        "text": parse_kv(" ".join(f"{name}='{text_of(value)}'" for name, value in wanted.items())),
        "text in YAML": yaml.safe_load(yaml.safe_dump({name: text_of(value) for name, value in wanted.items()})),
        "YAML": yaml.safe_load(yaml.safe_dump(wanted)),
        "JSON": json.loads(json.dumps(wanted)),
        "numbers": as_number(wanted),
    }

    for form, given in forms.items():
        found = ansible.settings(given)
        assert {name: found[name] for name in wanted} == wanted, form


def test_every_default_is_found(ansible: Reader) -> None:
    found = ansible.settings({})

    assert set(found) == set(OPTIONS)
    for name, option in OPTIONS.items():
        if "{{" not in str(option.get("default", "{{")):
            assert found[name] == typed(option["default"], option, name)


def roles_of(playbook: Path) -> list[str]:
    return sorted(set(re.findall(r"name: mala\.hpc_db\.(\w+)$", playbook.read_text(), re.MULTILINE)))


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_every_playbook_finds_its_settings(playbook: Path, ansible: Reader) -> None:
    """Without the roles of other playbooks."""
    roles = roles_of(playbook)
    assert roles
    every, found = ansible.settings({}), ansible.settings({}, roles)

    own = [name for role in roles for name in yaml.safe_load((ROLES / role / "defaults/main.yml").read_text())]
    assert {name: found[name] for name in own} == {name: every[name] for name in own}


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_no_playbook_forgets_its_settings(playbook: Path) -> None:
    """A skipped task would register its skipped result in place of the settings."""
    for play in yaml.safe_load(playbook.read_text()):
        for task in [*play.get("pre_tasks", []), *play.get("tasks", [])]:
            imported = task.get("ansible.builtin.import_role", {}).get("name")
            assert "when" not in task or imported != "mala.hpc_db.instance", task["name"]


@pytest.mark.parametrize("given, follows", [
    ({"databases_workers": "40"}, {"postgres_max_connections": "140", "workers_number": 40}),
    ({"databases_workers": "40", "client_environment": "{{ '~' }}/env"}, {"postgres_max_connections": "100"}),
    ({"server_job_options": '{"mem":"8G"}'}, {"instance_memory": "8G", "postgres_shared_buffers": "819MB"}),
    ({"server_job_options": "mem=8G,exclusive=true"}, {"server_job_options": {"mem": "8G", "exclusive": True}}),
    ({"server_job_options": "mem=8G,exclusive=True"}, {"server_job_options": {"mem": "8G", "exclusive": True}}),
    ({"postgres_settings": "work_mem=4MB"}, {"postgres_settings": {"work_mem": "4MB"}}),
    ({"databases_studies": '[{"name":"a"},{"name":"b"}]'}, {"dashboard_databases": ["a", "b"]}),
    ({"server_job_name": "{{ 'my' ~ ' server_job_name' }}/server_job_name"},
     {"server_job_name": "my server_job_name/server_job_name"}),
    # 4096 MB minus 409 of shared buffers and 128 fixed, for 320 connections with 3 MB of their own
    ({}, {"postgres_work_mem": "8MB"}),
    ({"instance_name": "{{ site.instance_name }}", "site": {"instance_name": "mine"}}, {"server_job_name": "mine"}),
    ({"instance_memory": "{{ 2 }}G", "postgres_settings": "shared_buffers=1GB"}, {"postgres_work_mem": "1MB"}),
])
def test_what_follows_from_a_setting(given: dict, follows: dict, ansible: Reader) -> None:
    found = ansible.settings(given)

    assert {name: found[name] for name in follows} == follows


def test_what_is_encrypted_is_text(ansible: Reader) -> None:
    options = {"account": "{{ 'x' ~ databases_workers }}", "comment": {"__vault__": "secret"}}
    given = {
        "postgres_python_index_url": {"__vault__": "https://me:secret@example.org"}, "server_job_options": options,
        "databases_workers": {"__vault__": "40"}, "postgres_networks": [{"__vault__": "10.0.0.0/8"}],
    }

    found = ansible.settings(given)

    assert (found["postgres_python_index_url"], found["workers_number"]) == ("https://me:secret@example.org", 40)
    assert found["server_job_options"] == {"account": "x40", "comment": "secret"}
    assert found["postgres_networks"] == ["10.0.0.0/8"]


def test_all_wrong_values_are_named_at_once(ansible: Reader) -> None:
    given = {name: "?" for name, option in OPTIONS.items() if option["type"] != "list" or option["elements"] == "dict"}
    given = {name: text for name, text in given.items() if OPTIONS[name]["type"] != "str" or "choices" in OPTIONS[name]}

    with pytest.raises(Unusable) as refused:
        ansible.settings(given)

    lines = str(refused.value).split("; ")
    assert [name for name in given if not any(line.startswith(name) and "? is not allowed" in line for line in lines)
            ] == []


@pytest.mark.parametrize("name, value, says", [
    ("server_wait", "maybe", "server_wait: maybe is not allowed; true or false"),
    ("server_wait", "", "server_wait: nothing is not allowed; true or false"),
    ("server_wait", 2, "server_wait: 2 is not allowed; true or false"),
    ("server_wait", [True], "server_wait: [True] is not allowed; true or false"),
    ("databases_workers", "many", "databases_workers: many is not allowed; a whole number"),
    ("databases_workers", "1.5", "databases_workers: 1.5 is not allowed; a whole number"),
    ("databases_workers", 1.5, "databases_workers: 1.5 is not allowed; a whole number"),
    ("databases_workers", float("inf"), "databases_workers: inf is not allowed; a whole number"),
    ("databases_workers", "010", "databases_workers: 010 is not allowed; a whole number"),  # which is 8 in YAML
    ("databases_workers", True, "databases_workers: true is not allowed; a whole number"),
    ("databases_workers", None, "databases_workers: nothing is not allowed; a whole number"),
    ("postgres_provider", "apt", "postgres_provider: apt is not allowed; rattler, conda, embedded, system"),
    ("workers_study", True, "workers_study: true is not allowed; text, in quotes if YAML reads it as another type"),
    ("workers_study", 1.1, "workers_study: 1.1 is not allowed; text, in quotes if YAML reads it as another type"),
    ("server_job_options", "x", "server_job_options: x is not allowed; names with values, such as {partition: work}"),
    ("server_job_options", "{a: b", "server_job_options: {a: b is not allowed; names with values, such as "),
    ("server_job_options", ["a"], "server_job_options: ['a'] is not allowed; names with values, such as "),
    ("postgres_networks", {"a": 1}, "postgres_networks: {'a': 1} is not allowed; a list, such as [a, b]"),
    ("postgres_networks", "[a", "postgres_networks: [a is not allowed; a list, such as [a, b]"),
    ("postgres_networks", True, "postgres_networks: true is not allowed; a list, such as [a, b]"),
    ("databases_studies", "mala", "databases_studies[0]: mala is not allowed; names with values, such as "),
    ("databases_studies", [{"nme": "a"}], "databases_studies[0]: nme is not allowed; name, tables, role, studies"),
    ("databases_studies", [{"studies": []}], "databases_studies[0]: name is not given"),
    ("databases_studies", [{"name": "a", "studies": [{"name": "b", "directions": "up"}]}],
     "databases_studies[0].studies[0].directions[0]: up is not allowed; minimize, maximize"),
])
def test_wrong_value_is_refused_in_one_line(name: str, value: Any, says: str) -> None:
    with pytest.raises(Refused) as refused:
        typed(value, OPTIONS[name], name)

    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("name, value, found", [
    ("server_wait", "No", False), ("server_wait", " on ", True), ("server_wait", 0, False),
    ("databases_workers", " 40 ", 40), ("databases_workers", "-1", -1), ("databases_workers", 40.0, 40),
    ("postgres_networks", "all", ["all"]), ("postgres_networks", "10.0.0.0/8, samenet", ["10.0.0.0/8", "samenet"]),
    ("postgres_networks", "['all']", ["all"]), ("postgres_networks", None, []), ("postgres_networks", "", []),
    ("server_job_options", None, {}), ("server_job_options", "", {}), ("postgres_python", None, ""),
    ("server_job_options", "{time: '72:00:00'}", {"time": "72:00:00"}),
    ("server_job_options", "time=72:00:00", {"time": "72:00:00"}),
    ("databases_studies", "name=a", [{"name": "a", "studies": [], "tables": "optuna"}]),
])
def test_text_has_its_type(name: str, value: Any, found: Any) -> None:
    assert typed(value, OPTIONS[name], name) == found


@pytest.mark.parametrize("given, says", [
    ({"instance_root": "{{ nowhere }}/x"}, r"^instance_root: .*'?nowhere'? is undefined"),
    ({"instance_name": "{{ instance_cluster }}", "instance_cluster": "{{ instance_name }}"},
     r"^instance_cluster: \{\{ instance_name \}\} is not allowed; it refers to itself$"),
    ({"databases_workers": "{{ 'many' }}"}, "^databases_workers: many is not allowed; a whole number$"),
])
def test_template_without_a_value_is_named(given: dict, says: str, ansible: Reader) -> None:
    with pytest.raises(Unusable, match=says):
        ansible.settings(given)


def test_template_of_another_playbook_may_lack_a_value(ansible: Reader) -> None:
    """For example a value that is only given when that playbook runs."""
    given = {"tensorboard_root": "~/{{ run }}", "restore_from": "{{ dump }}", "server_job_name": "mine"}

    found = ansible.settings(given, ["instance", "server"])

    assert (found["tensorboard_root"], found["restore_from"], found["server_job_name"]) == (None, None, "mine")
    with pytest.raises(Unusable, match="^tensorboard_root: .*'?run'? is undefined"):
        ansible.settings(given, ["instance", "tensorboard"])
