# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""How far a playbook is: one line a host, rewritten in a terminal and in a notebook; else one line a phase."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, TextIO


class Lines:
    """For a file or a pipe: each phase of each host as it begins."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phases: dict[str, str] = {}

    def now(self, host: str, phase: str, _doing: str) -> None:
        """Say what a host is at: a phase, and what of it."""
        if self._phases.get(host) != phase:
            self._phases[host] = phase
            self.say(f"{host}: {phase}")

    def say(self, text: str) -> None:
        """Say something that stays."""
        print(printable(text, keep="\n"), file=self._stream, flush=True)

    def page(self, text: str) -> None:
        """Print what was asked for, to the standard output."""
        self.end()
        print(printable(text.rstrip("\n"), keep="\n"), flush=True)

    def end(self) -> None:
        """Leave only what stays."""


class Terminal(Lines):
    """For a terminal: the last line is rewritten."""

    def now(self, host: str, phase: str, doing: str) -> None:
        """Say what a host is at."""
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\033[K{printable(f'{host}: {phase}: {doing}')[:width]}")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Say something that stays, in the place of that line."""
        self.end()
        super().say(text)

    def end(self) -> None:
        """Remove the line."""
        self._stream.write("\r\033[K")
        self._stream.flush()


class Notebook(Lines):
    """For a notebook: the cell's output has a line for each host, which is replaced."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        from IPython.display import display

        self._hosts: dict[str, str] = {}
        self._shown = display({"text/plain": ""}, raw=True, display_id=True)

    def now(self, host: str, phase: str, doing: str) -> None:
        """Say what a host is at."""
        line = printable(f"{host}: {phase}: {doing}")
        if self._hosts.get(host) != line:
            self._hosts[host] = line
            self._show()

    def end(self) -> None:
        """Remove these lines."""
        self._hosts = {}
        self._show()

    def _show(self) -> None:
        self._shown.update({"text/plain": "\n".join(self._hosts.values())}, raw=True)


def printable(text: str, keep: str = "") -> str:
    """Return the text without what would move a terminal's cursor, except the characters in ``keep``."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)


def in_notebook() -> bool:
    """Tell whether this is a notebook's kernel. IPython is imported there already."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def progress() -> Lines:
    """Return what fits the place where this runs."""
    if in_notebook():
        return Notebook()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Terminal(sys.stderr)
    return Lines(sys.stderr)
