# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands of the guide, and the ways to run them as they are printed.

The line before a block of commands says what runs it, as a comment that readers do not see:

    <!-- run on the workstation -->           this test, in the page's order
    <!-- run on the login node -->            this test, on the cluster, as the owner
    <!-- run by tests/a/test_b.py::test_c -->  that one, which names the same playbook and settings
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from target import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "client" / "README.md"]
BLOCK = re.compile(
    r"(?:^<!-- run (?P<how>on|by) (?P<place>.*?) -->\n)?"
    r"^```(?:shell|python|sh|bash|console)\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Commands of a page, and what runs them."""

    page: str
    how: str
    place: str
    script: str


def blocks(page: Path) -> list[Block]:
    """Return a page's commands."""
    name = str(page.relative_to(ROOT))
    found = BLOCK.finditer(page.read_text())
    return [Block(name, block["how"] or "", block["place"] or "", block["script"]) for block in found]


def telling_words(script: str) -> set[str]:
    """Return what of these commands another test must name to be one that runs them."""
    words = set()
    for line in script.splitlines():
        command = [word for word in shlex.split(line, comments=True)]
        if not command:
            continue
        if Path(command[0]).name != "ansible-playbook":
            words.update(word for word in command[1:] if not word.startswith("-"))
            continue
        for option, value in zip(command[1:], command[2:] + [""]):
            if option in ("-e", "--extra-vars"):
                words.update(re.findall(r'"(\w+)":', value) or [value.partition("=")[0]])
        words.add(Path(command[-1] if "=" not in command[-1] else playbook_of(command)).stem)
    return words


def playbook_of(command: list[str]) -> str:
    """Return the playbook of an ansible-playbook call."""
    return next(word for word in command[1:] if re.search(r"\.yml$|^mala\.", word))
