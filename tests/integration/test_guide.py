# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run every command of the guide, and compare its output with the printed one."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from guide import LOGIN, PAGES, WORKSTATION, Block, Walk, blocks, draw, lines_of, shown, telling_words
from target import CHECKOUT, CLUSTER, ROOT, Target

# The pages whose commands run here, in this order; each builds on the pages before it.
FIRST_HOUR, SETTINGS, OPERATIONS = "docs/first_hour.md", "docs/settings.md", "docs/operations.md"
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_HERE = [block for block in BLOCKS if block.how == "on"]
RUN_ELSEWHERE = [block for block in BLOCKS if block.how == "by"]
PICTURE = ROOT / "docs" / "run.svg"


def of_page(page: str) -> list[Block]:
    return [block for block in RUN_HERE if block.page == page]


def yaml_of(page: str) -> list[dict]:
    """Return the YAML blocks of a page."""
    return [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)]


def test_every_command_says_what_runs_it() -> None:
    assert [block for block in BLOCKS if not block.how] == []
    assert {block.place for block in RUN_HERE} == {WORKSTATION, LOGIN}
    assert {block.page for block in RUN_HERE} == {FIRST_HOUR, SETTINGS, OPERATIONS}


def test_no_command_hides_as_output() -> None:
    """A block without a language is output; INVENTORY and similar words are placeholders."""
    fences = [text for page in PAGES for text in re.findall("^```(.*?)^```$", page.read_text(), re.M | re.S)]
    lines = [line for text in fences if text.startswith("\n") for line in text.splitlines()]

    assert [line for line in lines if re.match(r"\$ |[\w./]*\b(make|pip|sbatch|ansible[\w-]*|psql) ", line)
            and "INVENTORY" not in line] == []


@pytest.mark.parametrize("block", RUN_ELSEWHERE, ids=lambda block: f"{block.page}: {block.script.splitlines()[0]}")
def test_command_is_run_by_that_test(block: Block) -> None:
    path, _colons, name = block.place.partition("::")
    source = (ROOT / path).read_text()
    named = telling_words(block)

    assert named and {word for word in named if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source)} == set()
    if path.endswith(".py") and name:
        assert name in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    elif name:
        assert re.search(rf"^{name}:", source, re.MULTILINE)


def test_every_playbook_is_in_the_list() -> None:
    listed = re.findall(r"^\| `(\w+)\.yml", (ROOT / "docs" / "playbooks.md").read_text(), re.MULTILINE)

    assert set(listed) == {path.stem for path in (ROOT / "playbooks").glob("*.yml")}


@pytest.fixture(scope="module")
def walk(mini: Target, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(mini, tmp_path_factory.mktemp("clone"))


def fill_in(walk: Walk) -> None:
    """Edit the copied inventory as the first page says, then add the test cluster's own settings."""
    folder = walk.folder / "inventories" / "mycluster"
    hosts, group = yaml_of(FIRST_HOUR)
    (usual,) = yaml.safe_load((ROOT / "molecule/default/inventory/hosts.yml").read_text())["hpc_db"]["hosts"].values()
    site = {"postgres_channels": ["file:///srv/channel"], "postgres_python_wheelhouse": "/srv/wheels"}
    hosts["hpc_db"]["hosts"]["mycluster"].update(usual)
    (folder / "hosts.yml").write_text(yaml.safe_dump(hosts))
    copied = yaml.safe_load((folder / "group_vars" / "all.yml").read_text())
    (folder / "group_vars" / "all.yml").write_text(yaml.safe_dump({**copied, **group, **site}))


def worker_errors(walk: Walk, state: str) -> str:
    """Return a worker's output while the server is in that state."""
    return walk.run(
        f"PYTHONPATH=/srv/client hpc_db/hpc_db/python/bin/python {CHECKOUT}/tests/integration/worker_errors.py"
        f" hpc_db {state} 2>&1", LOGIN,
    )


def test_first_hour(walk: Walk) -> None:
    """The clone contains everything that make setup creates."""
    said: dict[str, str] = {}
    for block in of_page(FIRST_HOUR):
        if "status.yml" in block.script:  # as a reader sees it after a coffee break
            walk.target.run("while squeue --noheader --me --name=hpc_db_workers | grep -q .; do sleep 0.5; done")
        if "stop.yml" in block.script:
            walk.errors = worker_errors(walk, "serving")
        said[block.script.strip()] = walk.run(block.script, block.place)
        if block.script.startswith("cp "):
            fill_in(walk)
    walk.errors += worker_errors(walk, "stopped")

    (dump,) = walk.folder.glob("hpc_db_dumps/mala-*.dump")
    assert dump.stat().st_size > 1000
    for command in said:
        if re.search("/(hpc_db|status).yml$", command):
            walk.picture += shown(command, said[command])
    assert "postgresql+psycopg2:///?service=hpc_db" in walk.picture


def test_picture_is_of_such_a_run(walk: Walk) -> None:
    """The picture shows a run with more workers, in the middle of their work; .cache/test has one of this run."""
    (ROOT / ".cache" / "test").mkdir(exist_ok=True)
    (ROOT / ".cache" / "test" / PICTURE.name).write_text(draw(walk.picture))
    said = [words(line) for line in walk.picture]

    lines = [line for line in lines_of(PICTURE.read_text()) if not re.fullmatch(r" +(from +)?c\d +\d+  study", line)]
    assert len(lines) > 10
    assert [line for line in lines if words(line) not in said] == []


def words(line: str) -> list[str]:
    """Return the words of a line, without bars and numbers."""
    return re.findall("[A-Za-z_]{2,}", re.sub(r"\[[-#>/x.]{20}\].*|[KMGT]B", "", line))


def printed(section: str) -> list[list[str]]:
    """Return the headings of a section, which quote messages, split at each ``…``."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [words.split("…") for words in re.findall("^### `(.*)`$", text, re.MULTILINE)]


def test_errors_of_workers_are_as_printed(walk: Walk) -> None:
    known = printed("What workers print")

    print(walk.errors)
    assert len(known) > 10
    assert [parts for parts in known if not re.search(".*".join(map(re.escape, parts)), walk.errors)] == []


def test_errors_of_playbooks_are_as_printed() -> None:
    """Other tests provoke these messages; this one searches their sources."""
    known = printed("What playbooks print")
    sources = ("roles/*/tasks/*.yml", "roles/*/files/**/*.py", "plugins/**/*.py")
    text = " ".join(path.read_text() for pattern in sources for path in sorted(ROOT.glob(pattern)))

    assert len(known) > 5
    assert [part for parts in known for part in parts if part.strip() not in " ".join(text.split())] == []


def test_settings(walk: Walk) -> None:
    (block,) = of_page(SETTINGS)

    assert "server_job_options" in walk.run(block.script)


SHARED = f"""
mkdir -p /opt/hpc_db/inventory /opt/hpc_db/venv/bin
cat > /opt/hpc_db/inventory/hosts.yml
cd /opt/hpc_db/venv/bin
printf '#!/bin/sh\\nexec {CHECKOUT}/.venv/bin/python -m ansible playbook "$@"\\n' > ansible-playbook
chmod 755 ansible-playbook
chmod -R go=rX /opt/hpc_db
"""


def test_two_users_share_an_inventory(mini: Target, bindir: Path) -> None:
    """Use the page's inventory on the login node: one user takes it unchanged, the other has values of her own."""
    hosts, group = yaml_of("docs/for_maintainers.md")
    group.update(postgres_bindir=str(bindir), postgres_major=int(bindir.parts[-2]))
    group.update(postgres_python_wheelhouse="/srv/wheels", postgres_networks=["198.51.100.0/25"])
    group["server_job_options"].update(time="01:00:00", mem="1000M")  # adapted to the size of the test cluster
    hosts["hpc_db"]["hosts"]["mycluster"].update(group)
    own = {"hpc_db": {"hosts": {"mycluster": {"instance_name": "second", "databases_workers": 30}}}}
    environment = f"export ANSIBLE_COLLECTIONS_PATH={CHECKOUT}/.cache/collections PATH=/opt/hpc_db/venv/bin:$PATH\n"
    commands = [block.script for block in BLOCKS if block.page == "docs/for_maintainers.md"]

    def start(user: str, script: str) -> subprocess.Popen[str]:
        command = [str(CLUSTER), "exec", "login", "--user", user, "--", "sh", "-ec", f"cd\n{environment}{script}"]
        return subprocess.Popen(command, env=mini.environment, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(user: str, script: str, given: str = "") -> str:
        with start(user, script) as started:
            said = started.communicate(given, timeout=300)[0]
        assert started.returncode == 0, said
        return said

    run("root", SHARED, json.dumps(hosts))
    run("alice", "mkdir hpc_db_inventory; cat > hpc_db_inventory/hosts.yml", json.dumps(own))
    # Shares the installation of her other instance.
    run("alice", "mkdir -m 700 -p hpc_db/second/run; ln -s ../hpc_db/python hpc_db/second")
    users = ["mallory", "alice"]
    plays = [start(user, script) for user, script in zip(users, commands)]
    said = [play.communicate(timeout=300)[0] for play in plays]

    assert [play.returncode for play in plays] == [0, 0], said
    assert [text.rpartition("?service=")[2].split()[0] for text in said] == ["hpc_db", "second"]
    queue = run("root", "squeue --noheader --state=running --format='%u %j' | sort")
    assert queue.splitlines() == ["alice second", "mallory hpc_db"]
    limits = [run(user, f"grep -h ^max_connections hpc_db/{name}/conf/postgresql-{group['postgres_major']}.conf")
              for user, name in zip(users, ["hpc_db", "second"])]
    assert limits == ["max_connections = 80\n", "max_connections = 110\n"]
    with pytest.raises(AssertionError, match="Permission denied"):
        run("mallory", "ls ~alice/hpc_db/second")
    for user in users:
        run(user, "scancel --me; while squeue --noheader --me | grep -q .; do sleep 0.2; done; rm -rf hpc_db/second")


def test_operations(walk: Walk) -> None:
    """Runs last, since the page ends with removing everything."""
    for block in of_page(OPERATIONS):
        walk.run(block.script, block.place)

    left = walk.target.run("ls -A hpc_db; cat .pg_service.conf; squeue --noheader --me; ps -u alice -o args=")
    assert "hpc_db" not in left.replace("ls -A hpc_db", "")
