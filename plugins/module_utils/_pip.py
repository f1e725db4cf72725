# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calling pip, and reading what it calls packages."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

# Variables of the user's shell that would make pip install elsewhere, or load other libraries.
MISLEADING = "PYTHONPATH PYTHONHOME LD_LIBRARY_PATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV".split()


class Failed(Exception):
    """The environment cannot be made; the message is for the user."""


def normalise(name: str) -> str:
    """Return a project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def source_arguments(wheelhouse: str | None, index_url: str | None) -> list[str]:
    """Return pip's arguments that say where packages come from. With a wheelhouse no index is asked."""
    if wheelhouse:
        return ["--no-index", f"--find-links={wheelhouse}"]
    return [f"--index-url={index_url}"] if index_url else []


def call(module: AnsibleModule, command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
    """Run a Python or pip; return its exit code and what it printed, and raise Failed if it is not there."""
    for name in MISLEADING:
        os.environ.pop(name, None)
    try:
        return module.run_command(
            command, expand_user_and_vars=False, handle_exceptions=False, pass_fds=pass_fds
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None


def last_words(stdout: str, stderr: str) -> str:
    """Return what a pip that failed had to say, in one line."""
    words = (stderr.strip() or stdout.strip()).splitlines() or ["no output"]
    return " ".join([line for line in words if line.startswith("ERROR")] or words[-3:])
