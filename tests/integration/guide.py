# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guide's commands, and an environment that runs them exactly as printed.

A comment before a block of commands, invisible to readers of the page, names the test that runs it:

    <!-- run on the workstation -->             test_guide.py, in the page's order
    <!-- run on the login node -->              the same, as the owner
    <!-- run by tests/a/test_b.py::test_c -->   that test, which names the same playbooks and settings
    <!-- run by FILE -->                        that file, for example in a Molecule scenario

A block of Python is run by a test that reads it from the page.
"""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from target import ROOT, Target

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "client" / "README.md"]
BLOCK = re.compile(
    r"(?:^<!-- run (?P<how>on|by) (?P<place>[^\n]*) -->\n)?"
    r"^```(?P<language>shell|python|sh|bash|console)\n(?P<script>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
WORKSTATION, LOGIN = "the workstation", "the login node"


class Block(NamedTuple):
    """Commands of a page, and the test or file that runs them."""

    page: str
    how: str
    place: str
    language: str
    script: str


def blocks(page: Path) -> list[Block]:
    """Return the commands of a page."""
    return [
        Block(str(page.relative_to(ROOT)), found["how"] or "", found["place"] or "", found["language"], found["script"])
        for found in BLOCK.finditer(page.read_text())
    ]


def telling_words(block: Block) -> set[str]:
    """Return the words that a test must contain to count as running these commands: playbooks, settings, arguments."""
    if block.language == "python":
        return {Path(block.page).name}
    words: set[str] = set()
    clusters = {path.name for path in (ROOT / "inventories").iterdir()}
    for command in (shlex.split(line, comments=True) for line in block.script.splitlines()):
        # the path of a program, the inventory and the host do not matter
        arguments = [
            word for option, word in zip(command, command[1:])
            if word[0] != "-" and option != "-i" and word not in clusters and "@" not in word
        ]
        for word in arguments:
            playbook = re.fullmatch(r"(?:playbooks/|mala\.hpc_db\.)(\w+)(?:\.yml)?", word)
            settings = re.findall(r'"(\w+)":', word) or re.findall(r"^(\w+)=", word)
            # of a path in the home directory the end, of a package its name
            last = word.partition("[")[0] if word[0] != "~" else "/".join(word.split("/")[-2:])
            words.update([playbook[1]] if playbook else settings or [last])
    return words


class Walk:
    """A folder that looks like a fresh clone, on the workstation, and a cluster.

    The printed commands are changed in one point: the number of workers, since the test cluster has only two cores.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.errors = ""
        self.picture: list[str] = []
        # files for the user's home go there, too
        self._environment = {**target.environment, "HOME": str(folder)}
        for path in ROOT.iterdir():
            if path.name != "inventories":
                (folder / path.name).symlink_to(path)
        shutil.copytree(ROOT / "inventories", folder / "inventories")

    def run(self, script: str, place: str = WORKSTATION) -> str:
        """Run the commands; return their output."""
        if place == LOGIN:
            return self.target.run(f"set -e\n{script}")
        done = subprocess.run(
            ["bash", "-ec", script.replace("workers_number=20", "workers_number=4")], cwd=self.folder,
            env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=300, check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout


def shown(command: str, said: str) -> list[str]:
    """Return a command and its output as a reader of the page sees them: without Ansible's task log."""
    account = re.compile(r"(PLAY|TASK) |(ok|changed|skipping|included): |\w+ +: ok=\d|[-+@]|no schema|$")
    lines = [line for line in said.splitlines() if not account.match(line)]
    return [f"$ {command}", *lines]


def draw(lines: list[str]) -> str:
    """Return an SVG picture of a terminal with these lines."""
    width, height = 16 + 7.3 * max(map(len, lines)), 14 + 17 * len(lines)
    text = "".join(
        f'  <text class="{"command" if line.startswith("$ ") else "said"}" x="10" y="{21 + 17 * number}">'
        f"{html.escape(line)}</text>\n"
        for number, line in enumerate(lines)
    )
    box = f'viewBox="0 0 {width:.0f} {height}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" xml:space="preserve">
  <!-- SPDX-FileCopyrightText: mala.hpc_db contributors -->
  <!-- SPDX-License-Identifier: GPL-3.0-or-later -->
  <!-- Made by tests/integration/test_guide.py from what the playbooks said. -->
  <title>A run of hpc_db.yml, and status.yml while 20 workers share a study</title>
  <style>text {{ font: 12px monospace; white-space: pre }} .said {{ fill: #ddd }} .command {{ fill: #8f8 }}</style>
  <rect width="100%" height="100%" rx="6" fill="#222"/>
{text}</svg>
"""


def lines_of(picture: str) -> list[str]:
    """Return the lines that a picture shows."""
    return [html.unescape(line) for line in re.findall(r"<text [^>]*>(.*)</text>", picture)]
