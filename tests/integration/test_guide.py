# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every command in the guide is run, and what it shows is what is printed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from guide import LOGIN, PAGES, WORKSTATION, Block, Walk, blocks, draw, lines_of, shown, telling_words
from target import CHECKOUT, CLUSTER, ROOT, Target

# The pages whose commands are run here, in this order, each with all that the ones before it have done.
ON_THE_CLUSTER = ["docs/first_hour.md"]
ON_THIS_MACHINE = [
    "docs/doctor.md", "docs/playbooks.md", "docs/settings.md", "docs/workers.md", "docs/operations.md",
]
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_HERE = [block for block in BLOCKS if block.how == "on"]
RUN_ELSEWHERE = [block for block in BLOCKS if block.how == "by"]


def of_page(page: str) -> list[Block]:
    return [block for block in RUN_HERE if block.page == page]


def test_every_command_says_what_runs_it() -> None:
    assert [block for block in BLOCKS if not block.how] == []
    assert {block.place for block in RUN_HERE} == {WORKSTATION, LOGIN}
    assert {block.page for block in RUN_HERE} == {*ON_THE_CLUSTER, *ON_THIS_MACHINE}


@pytest.mark.parametrize("block", RUN_ELSEWHERE, ids=lambda block: f"{block.page}: {block.script.splitlines()[0]}")
def test_command_is_run_by_that_test(block: Block) -> None:
    path, _colons, name = block.place.partition("::")
    source = (ROOT / path).read_text()
    named = telling_words(block.script)

    assert named and {word for word in named if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source)} == set()
    if path.endswith(".py") and name:
        assert name in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    elif name:
        assert re.search(rf"^{name}:", source, re.MULTILINE)


def test_every_playbook_is_in_the_list() -> None:
    listed = re.findall(r"^\| `(\w+)\.yml", (ROOT / "docs" / "playbooks.md").read_text(), re.MULTILINE)

    assert set(listed) == {path.stem for path in (ROOT / "playbooks").glob("*.yml")}


@pytest.fixture(scope="module")
def on_this_machine(here: Target, quick_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """This machine, with the instance that the pages take for granted."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "hosts.yml").write_text(json.dumps({"hpc_db": {"hosts": {"localhost": quick_settings}}}))
    inventories = [Path(word.partition("=")[2]) for word in here.command("") if word.startswith("--inventory=")]
    walk = Walk(here, tmp_path_factory.mktemp("clone"), [*inventories, folder], str(here.variables["instance_name"]))
    walk.run(".venv/bin/ansible-playbook -i inventories/local playbooks/hpc_db.yml")
    return walk


@pytest.mark.parametrize("page", ON_THIS_MACHINE)
def test_page_on_this_machine(on_this_machine: Walk, page: str) -> None:
    for block in of_page(page):
        print(on_this_machine.run(block.script, block.place))


def yaml_of(page: str) -> list[dict]:
    """Return the YAML that a page prints."""
    return [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)]


def fill_in(walk: Walk, mini: Target) -> None:
    """Edit the copied inventory as the first page says; what is the mini cluster's own comes on top."""
    folder = walk.folder / "inventories" / "mycluster"
    hosts, group = yaml_of("docs/first_hour.md")
    (usual,) = yaml.safe_load((ROOT / "molecule/default/inventory/hosts.yml").read_text())["hpc_db"]["hosts"].values()
    site = {"postgres_channels": ["file:///srv/channel"], "postgres_python_wheelhouse": "/srv/wheels"}
    hosts["hpc_db"]["hosts"]["mycluster"].update(usual)
    (folder / "hosts.yml").write_text(yaml.safe_dump(hosts))
    copied = yaml.safe_load((folder / "group_vars" / "all.yml").read_text())
    (folder / "group_vars" / "all.yml").write_text(yaml.safe_dump({**copied, **group, **site}))


def test_first_hour(mini: Target, tmp_path: Path) -> None:
    walk = Walk(mini, tmp_path, [])
    said: dict[str, str] = {}
    for block in of_page("docs/first_hour.md"):
        if "stop.yml" in block.script:
            mini.run("while squeue --noheader --me --name=hpc_db_workers | grep -q .; do sleep 0.5; done")
        said[block.script.strip()] = walk.run(block.script, block.place)
        if block.script.startswith("cp "):
            fill_in(walk, mini)

    picture = [line for command in said if re.search("hpc_db.yml$|status.yml$", command)
               for line in shown(command, said[command])]
    (ROOT / ".cache" / "test").mkdir(exist_ok=True)
    (ROOT / ".cache" / "test" / "run.svg").write_text(draw(picture))
    print("\n".join(picture))
    assert mini.run("ls hpc_db/hpc_db/workers/log | wc -l") == "20"
