# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""A playbook's progress: in a terminal or notebook one line per host, which is rewritten; else one line per phase."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, TextIO


class Lines:
    """Progress in a file or pipe: one line for each phase of each host, when it begins."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phases: dict[str, str] = {}

    def now(self, host: str, phase: str, _doing: str) -> None:
        """Show a host's current phase, and the task in it."""
        if self._phases.get(host) != phase:
            self._phases[host] = phase
            self.say(f"{host}: {phase}")

    def say(self, text: str) -> None:
        """Print permanent text."""
        print(printable(text, keep="\n"), file=self._stream, flush=True)

    def page(self, text: str) -> None:
        """Print the requested output to stdout."""
        self.end()
        print(printable(text.rstrip("\n"), keep="\n"), flush=True)

    def end(self) -> None:
        """Remove temporary output."""


class Terminal(Lines):
    """Progress in a terminal: the last line is rewritten."""

    def now(self, host: str, phase: str, doing: str) -> None:
        """Show a host's current phase and task."""
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\033[K{printable(f'{host}: {phase}: {doing}')[:width]}")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print permanent text in place of the progress line."""
        self.end()
        super().say(text)

    def end(self) -> None:
        """Remove the progress line."""
        self._stream.write("\r\033[K")
        self._stream.flush()


class Notebook(Lines):
    """Progress in a notebook: the cell's output has one line per host, which is replaced."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        from IPython.display import display

        self._hosts: dict[str, str] = {}
        self._shown = display({"text/plain": ""}, raw=True, display_id=True)

    def now(self, host: str, phase: str, doing: str) -> None:
        """Show a host's current phase and task."""
        line = printable(f"{host}: {phase}: {doing}")
        if self._hosts.get(host) != line:
            self._hosts[host] = line
            self._show()

    def end(self) -> None:
        """Remove the progress lines."""
        self._hosts = {}
        self._show()

    def _show(self) -> None:
        self._shown.update({"text/plain": "\n".join(self._hosts.values())}, raw=True)


def printable(text: str, keep: str = "") -> str:
    """Return the text with spaces for non-printable characters, such as cursor movements, except those in ``keep``."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)


def in_notebook() -> bool:
    """Return whether this is a notebook's kernel, which has already imported IPython."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def progress() -> Lines:
    """Return the kind of progress that suits this environment."""
    if in_notebook():
        return Notebook()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Terminal(sys.stderr)
    return Lines(sys.stderr)
