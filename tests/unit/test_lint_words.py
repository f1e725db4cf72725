# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""tools/lint_words.py finds the wordings, and only those."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml

PLUGIN = '''
DOCUMENTATION = r"""
description: [This option is no number.]
options: {a: {description: Whatever is given., type: str}}
"""
EXAMPLES = "- name: Keep it"
RETURN = "description: {description: The description.}"
'''


@pytest.fixture(scope="module")
def words() -> ModuleType:
    spec = spec_from_file_location("lint_words", Path(__file__).parents[2] / "tools" / "lint_words.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint(words: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(words, "ROOT", folder)
    return words.main()


@pytest.mark.parametrize("text, found", [
    ("Path of the file. What is in it is replaced.", True),
    ("Whoever reaches the port is accepted.", True),
    ("The file beside it.", True),
    ("The given value is no number.", True),
    ("Whether to start a job.", True),
    ("Whether the server is running.", False),
    ("The file that it contains is no longer read.", False),
    ("Null if there is no job.", False),
    ("A package besides the listed ones.", False),
])
def test_wordings_of_a_setting(
    text: str, found: bool, words: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = {"description": ["A setting.", text], "type": "str"}
    specs = {"argument_specs": {"main": {"options": {"server_a": option}}}}
    (tmp_path / "roles" / "server" / "meta").mkdir(parents=True)
    (tmp_path / "roles" / "server" / "meta" / "argument_specs.yml").write_text(yaml.safe_dump(specs))

    assert lint(words, tmp_path, monkeypatch) == found


@pytest.mark.parametrize("name, found", [
    ("Keep the role", True), ("Have a server that answers", True), ("Print what it says", True), ("start it", True),
    ("Start it.", True), ("Ensure the role exists", False), ("Start a temporary server", False),
])
def test_wordings_of_a_task(
    name: str, found: bool, words: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "playbooks").mkdir()
    play = {"name": "Run it", "tasks": [{"name": "Run all", "block": [{"name": name}]}]}
    (tmp_path / "playbooks" / "one.yml").write_text(yaml.safe_dump([play]))

    assert lint(words, tmp_path, monkeypatch) == found


def test_wordings_of_a_plugin_are_printed_with_their_file(
    words: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugins" / "modules").mkdir(parents=True)
    (tmp_path / "plugins" / "modules" / "one.py").write_text(PLUGIN)

    assert lint(words, tmp_path, monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines} == {"plugins/modules/one.py"}
    assert {line.rpartition("): ")[2] for line in lines} == {"This option is no number.", "Whatever is given."}
