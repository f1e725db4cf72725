#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find wordings that are hard to read in task names, and in the documentation of settings and plugins.

Usage: tools/lint_words.py. Prints each text with such a wording and the advice; exit code 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ("DOCUMENTATION", "FILTER", "RETURN")

#: The advice by the pattern of a wording. Task names are also searched for the patterns in TASK_WORDS.
WORDS = {
    r"(^|[.;:!?] )(What|Whatever|Who|Whoever|One that|Those who) ": "begin with the subject, not with a clause",
    r"(?i)\b(whatever|whoever|whomever)\b": "name the thing or the person",
    r"(?i)\bwhat (follows|one|the \w+ says)\b": "name the thing",
    r"(?i)\bmeanwhile\b": "say when, or leave it out",
    r"(?i)\bbeside\b": "next to, in addition to, with",
    r"(?i)\blets? nobody\b|\bnobody (but|else)\b|\bmay nothing\b": "say who may, or use only",
    r"(?<!there )(?<!There )\b(is|are) no (?!longer|more|less|later|earlier)": "is not a",
    r"(?i)\bsee to it\b": "ensure",
    r"(?i)\b(all is|all are|how all) ": "name what, and how it is",
    r"(?i)\bfor all (that|one)\b|\bfor ever\b|\bfor good\b": "permanently, always, as far as known",
    r"(?i)\bas \w+ has it\b": "name the rule",
    r"(?i)\bmay take for\b|\btakes? part in\b": "needs, uses",
    r"(?i)\bwhether to\b": "use the imperative: the option's effect if it is true",
    r"(?i)\b(is|are) given up\b|\bno sign of life\b": "expires, may be replaced, does not answer",
}
TASK_WORDS = {
    r"^(Keep|Have|Look|Say|See|Note|Let|Give|Make|Tell|Know|Mend)\b": "Ensure, Check, Read, Write, Print, ...",
    r"(?i)\bwhat\b": "name the thing",
    r"^[^A-Z]": "begin with a verb in upper case",
    r"\.$": "no full stop",
}


def task_names(content: Any) -> Iterator[str]:
    """Yield the name of each task and play in a YAML file, also of tasks in blocks."""
    for task in content if isinstance(content, list) else []:
        if isinstance(task.get("name"), str):
            yield task["name"]
        for inside in ("block", "rescue", "always", "pre_tasks", "tasks", "post_tasks", "handlers"):
            yield from task_names(task.get(inside))


def descriptions(content: Any) -> Iterator[str]:
    """Yield the texts of all descriptions in documentation, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("description", "short_description") and not isinstance(value, dict):
                yield from [value] if isinstance(value, str) else value
            else:
                yield from descriptions(value)
    elif isinstance(content, list):
        for each in content:
            yield from descriptions(each)


def plugin_texts(path: Path) -> Iterator[str]:
    """Yield the descriptions of a plugin or of a documentation fragment."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in DOCUMENTED:
            yield from descriptions(yaml.safe_load(ast.literal_eval(node.value)))


def texts() -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Yield each text with its file and the patterns that it must not contain."""
    for path in sorted([*ROOT.glob("roles/*/tasks/**/*.yml"), *ROOT.glob("playbooks/*.yml")]):
        for name in task_names(yaml.safe_load(path.read_text(encoding="utf-8"))):
            yield path, name, {**WORDS, **TASK_WORDS}
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        for text in descriptions(yaml.safe_load(path.read_text(encoding="utf-8"))):
            yield path, text, WORDS
    for path in sorted(ROOT.glob("plugins/*/*.py")):
        for text in plugin_texts(path):
            yield path, text, WORDS


def main() -> int:
    """Print the wordings; return the exit code."""
    found = 0
    for path, text, words in texts():
        for pattern, advice in words.items():
            match = re.search(pattern, " ".join(text.split()))
            if match:
                found += 1
                print(f"{path.relative_to(ROOT)}: {match[0].strip()!r} ({advice}): {' '.join(text.split())}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
