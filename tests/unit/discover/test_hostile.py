# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Text from a cluster stays data in the inventory that discover.yml writes, and stays printable on a screen.

Every text that a cluster can send is replaced by each hostile one; a new fact is included automatically.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.modules import cluster_info
from ansible_reader import Reader, Refused

ROOT = Path(__file__).parents[3]
ROLE = ROOT / "roles" / "discover"
INVENTORY = ("hosts.yml", "group_vars/all.yml")

CANARY = ROOT / ".cache" / "CANARY"
HOSTILE = [
    "\nevil: \"{{ lookup('pipe', 'touch .cache/CANARY') }}\"\n#", "\r\nevil: 1", "\revil: 1", "\u2028evil: 1\u2029",
    "\x85evil: 1", "{{ lookup('pipe', 'touch .cache/CANARY') }}", "{% set evil = 1 %}", "{# evil",
    "!unsafe x", "*x", "&x y", "- evil", ": ", " # evil", "#", "'", '"', "\\", '"\nevil: 1\n"', "'''", "[", "{",
    "null", "~", "yes", "12:30:00", "0x1", "|", ">", "%x", "@x", "`x`", "---", "...", "\x1b[2J\x1b]0;evil\x07",
    "\x9b2J", "\x00", "\x7f", "\u202eevil\u202c", "\u200b", "\ufeff", "\udc80", "\t", "x" * 100_000,
    "\u03a9 \U0001f600",
]
# Values that are refused, and values that are accepted because they are quoted.
REFUSED = [HOSTILE[0], "{{ x }}", "\x1b[2J"]
TAKEN = ["*x", "#", "x: y", "yes", "\\", "!unsafe x", "'\"", HOSTILE[-1]]
ALL_AT_ONCE = "".join(HOSTILE[:-2])

# Results of mala.hpc_db.cluster_info, raw and the job; a test compares the names with the documented ones.
FOUND: dict[str, Any] = {
    "host": "login1", "user": "alice", "scheduler": "slurm", "others": ["qsub"], "bin_dir": "/opt/slurm/bin",
    "config": {"SLURM_VERSION": "24.05.1", "ClusterName": "mini"},
    "partitions": [{
        "name": "work", "default": True, "usable": True, "limit": 3600, "walltime": "01:00:00", "nodes": 2, "cpus": 4,
        "memory": 8000, "gpus": True, "exclusive": False, "preempted": True,
    }],
    "accounts": ["mala", "other"], "qos": ["normal"],
    "file_systems": [{
        "name": "HOME", "path": "/home/alice", "type": "nfs4", "shared": True, "free": 1 << 40, "used": 1, "quota": 9,
    }],
    "mounted": ["/bigdata (lustre)"], "clients": ["/opt/conda/bin/conda"], "sources": {"https://x/y": "no route"},
    "proposed": {
        "options": {"partition": "work", "time": "01:00:00", "account": "mala", "mem": "4G", "cpus-per-task": 4},
        "memory": "4G",
    },
}
PYTHON = "python 3.11.2 /usr/bin/python3"
TOLD = {
    "host": "c1", "machine": "x86_64", "python": "3.9.1", "folders": ["/home/alice"], "temporary": True,
    "neighbour": True, "login": True,
}
SENT: dict[str, Any] = {
    "__discover_found": FOUND,
    "__discover_asked": {"stdout_lines": [PYTHON, "python 3.6.8 /usr/bin/python3.6"]},
    "__discover_job": {"answer": TOLD, "said": "job 7 ended", "reached": True},
}
GIVEN = {
    "inventory_hostname": "login.example.org", "discover_name": "mini", "discover_submit_job": True, "hostvars":
    {"login.example.org": {"ansible_user": "alice"}}, "ansible_check_mode": False,
}


def spots(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield the positions of all texts."""
    if isinstance(value, str):
        yield at
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from spots(each, (*at, key))


def replaced(sent: dict, texts: dict[tuple, str]) -> dict:
    """Return the data with other texts at these positions."""
    sent = copy.deepcopy(sent)
    for spot, text in texts.items():
        place = sent
        for key in spot[:-1]:
            place = place[key]
        place[spot[-1]] = text
    return sent


@pytest.fixture(scope="module")
def ansible() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.end()


@pytest.fixture(scope="module")
def written(
    ansible: Reader, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[dict], tuple[str, dict]]]:
    """Write the inventory for this data; return its text, and the settings of its one host as Ansible reads them."""
    tmp_path = tmp_path_factory.mktemp("inventory")

    def write(sent: dict) -> tuple[str, dict]:
        texts = ansible.render("discover", [f"{name}.j2" for name in INVENTORY], GIVEN, sent)
        for name, text in zip(INVENTORY, texts):
            (tmp_path / "written" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "written" / name).write_bytes(text.encode(errors="surrogateescape"))
        hosts = ansible.load(tmp_path / "written")
        assert list(hosts) == ["mini"]
        return "".join(texts), hosts["mini"]

    yield write
    assert not CANARY.exists()


@pytest.fixture(scope="module")
def plain(written: Callable) -> dict[str, Any]:
    """The settings of a harmless cluster."""
    return written(SENT)[1]


ALL = list(spots(SENT))
# The proposed job repeats the partition; the login shell's line ends with the Python.
VALUES = [spot for spot in ALL if spot[1] in ("bin_dir", "proposed") or spot[-2:] == ("stdout_lines", 0)]
COMMENTS = [spot for spot in ALL if spot not in VALUES]


def names(options: dict) -> dict:
    """Return the documented names, including those inside dictionaries."""
    return {name: names(option.get("contains", {})) for name, option in options.items()}


def test_every_fact_is_here() -> None:
    documented = names(yaml.safe_load(cluster_info.RETURN))
    held = {name: names_of(value) if documented[name] else {} for name, value in FOUND.items()}

    assert held == documented
    assert list(TOLD) == re.findall(r'^        "(\w+)": ', (ROLE / "files" / "compute.py").read_text(), re.MULTILINE)


def names_of(value: Any) -> dict:
    return {name: {} for name in (value[0] if isinstance(value, list) else value)}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:30]))
def test_what_is_said_in_comments_stays_there(text: str, plain: dict, written: Callable) -> None:
    file, settings = written(replaced(SENT, dict.fromkeys(COMMENTS, text)))

    assert all(letter.isprintable() or letter == "\n" for letter in file)
    assert settings == plain


@pytest.mark.parametrize("spot", COMMENTS, ids=str)
def test_each_fact_by_itself_stays_in_comments(spot: tuple, plain: dict, written: Callable) -> None:
    settings = written(replaced(SENT, {spot: ALL_AT_ONCE}))[1]

    # Other paths may mean that compute nodes do not see the home directory.
    assert settings.pop("instance_root", "FILL_IN") == "FILL_IN"
    assert settings == plain


@pytest.fixture(params=["4G", False], ids=["shared nodes", "whole nodes"])
def harmless(request: pytest.FixtureRequest) -> dict:
    """The data for shared and for whole nodes; the inventory states the job's memory in a different way for each."""
    sent = copy.deepcopy(SENT)
    sent["__discover_found"]["proposed"]["options"]["mem"] = request.param
    return sent


def with_values(sent: dict, text: str, only: tuple | None = None) -> dict:
    """Return the data with another text in every value, or in one."""
    told = [spot for spot in VALUES if spot in set(spots(sent)) and (spot[-1] != "memory" or not memory_of(sent))]
    return replaced(sent, {spot: (PYTHON if spot[-2] == "stdout_lines" else "") + text
                           for spot in told if only in (None, spot)})


def memory_of(sent: dict) -> object:
    return sent["__discover_found"]["proposed"]["options"]["mem"]


@pytest.mark.parametrize("text", TAKEN)
def test_a_value_is_the_same_data(text: str, harmless: dict, written: Callable) -> None:
    expected, found = (texts_in(written(sent)[1]) for sent in (harmless, with_values(harmless, text)))

    changed = [value for name, value in found.items() if expected[name] != value]
    assert found.keys() == expected.keys() and len(changed) == len(VALUES) - 1
    assert all(value.endswith(text) for value in changed)


@pytest.mark.parametrize("spot", VALUES, ids=str)
def test_a_value_that_is_no_data_is_refused(spot: tuple, harmless: dict, written: Callable) -> None:
    for text in REFUSED:
        sent = with_values(harmless, text, spot)
        if sent == harmless:  # the inventory has no such value for these nodes
            continue
        with pytest.raises(Refused, match=r"[a-z_-]+: '.*' is not allowed in an inventory; allowed are ") as why:
            written(sent)
        assert str(why.value).isprintable()


def texts_in(settings: dict) -> dict[tuple, str]:
    return {spot: functools.reduce(lambda part, key: part[key], spot, settings) for spot in spots(settings)}
