# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pages printed by playbooks: text from a cluster cannot move the cursor or start a line."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_reader import Reader

ROOT = Path(__file__).parents[2]
HOSTILE = "x\n    ok  job\r\x1b[2J\x1b]0;x\x07\x9b2J\u202ex\u2028\x85\x00{{ 1 }}{% x %}'\"\\\udc80"
INSTANCE = {"instance_name": "hpc_db", "inventory_hostname": "mini", "ansible_check_mode": False}
CLIENT = {"host": "c1", "count": 1, "user": "study", "database": "studies", "seconds": 7, "pid": 8}

# The role, its page, its local values, and the values from the cluster.
PAGES: dict[str, tuple[str, dict, dict]] = {
    "status.txt.j2": ("server", {**INSTANCE, "hpc_db": {"url": "postgresql:///", "other_urls": []}}, {
        "__server_found": {
            "job": {"id": "7", "state": "PENDING", "reason": "Priority", "node": "c1", "time_left": 60,
                    "time_limit": 3600},
            "state": {"state": "serving", "reason": "it accepts writes"}, "disk": {"free": 1, "total": 2},
            "endpoint": {"host": "c1", "port": "5432", "pooler": {"host": "c1", "port": "6432"}},
        },
        "__server_held": {
            "version": "17.2", "databases": [{"name": "studies", "size": 9}], "connections": {
                "used": 1, "max": 9, "clients": [CLIENT], "idle_in_transaction": [CLIENT], "orphaned": [CLIENT],
            }, "studies": [{"database": "studies", "name": "be", "trials": {"complete": 1}}],
        },
    }),
    "report.txt.j2": ("doctor", INSTANCE, {
        "__doctor_report": {"found": [], "parts": [{"name": "login", "findings": [
            {"state": "found", "check": "log", "said": "damaged", "mend": "restore.yml"}]}]},
    }),
    "compared.txt.j2": ("upgrade", INSTANCE, {"__upgrade_done": {
        "from": "16", "to": "17", "seconds": 3, "way": "kept", "kept": "/data/16", "databases": {
            "studies": {"studies": [{"study": "be", "trials": 3, "best": "0.1", "direction": "MINIMIZE"}]}},
    }}),
    "requeued.txt.j2": ("workers", {**INSTANCE, "databases_workers": 1, "hpc_db": {"root": "/r"}}, {
        "__workers_requeued": {
            "requeued": [{"study": "be", "number": 1, "new_number": 2, "why": "job 7 has ended"}],
            "left": [{"study": "be", "number": 3, "why": "job 8 runs", "unknown": True}],
        },
    }),
}


@pytest.fixture(scope="module")
def ansible() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.end()


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return the data with each text changed except states, which select the page's wording."""
    if isinstance(value, dict):
        return {name: each if (name, each) in (("state", "found"), ("way", "kept")) else with_texts(each, change)
                for name, each in value.items()}
    if isinstance(value, list):
        return [with_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def test_status_page_of_a_server_whose_node_is_dead(ansible: Reader) -> None:
    role, own, sent = PAGES["status.txt.j2"]
    no_answer = {**sent, "__server_held": {"no_answer": "database alice: timeout expired"}}

    (text,) = ansible.render(role, ["status.txt.j2"], own, copy.deepcopy(no_answer))

    assert "  endpoint     c1 port 5432\n" in text
    assert "  PostgreSQL   does not answer: database alice: timeout expired\n" in text
    assert text.rstrip().endswith("URL          postgresql:///")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_cluster_says_is_only_seen(page: str, ansible: Reader) -> None:
    role, own, sent = PAGES[page]
    (harmless,) = ansible.render(role, [page], own, copy.deepcopy(sent))

    (text,) = ansible.render(role, [page], own, with_texts(sent, lambda value: value + HOSTILE))

    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert text.count("\n") == harmless.count("\n")
    assert r"x\n    ok  job\r\x1b[2J" in text


def test_show_prints_what_a_terminal_does_not_obey(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text("one\ntwo\x1b[2J\x9b\u202e\n", encoding="utf-8")
    command = ["ansible", "localhost", "--module-name=mala.hpc_db.show",
               f"--args=text={{{{ lookup('ansible.builtin.file', '{said}') }}}}"]

    done = subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:]], cwd=ROOT, capture_output=True, timeout=120,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}, check=True,
    )

    assert rb"one" + b"\n" + rb"two\x1b[2J\x9b\u202e" + b"\n" in done.stdout
    assert b"\x1b" not in done.stdout
