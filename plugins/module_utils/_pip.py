# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls of pip, and names of packages in its format."""

from __future__ import annotations

import inspect
import json
import os
import re
from typing import TYPE_CHECKING

from ansible_collections.mala.hpc_db.plugins.module_utils import _pip_helper

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

# Variables of the user's shell that would make a Python load other packages or libraries.
MISLEADING = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")

OFFLINE = "without internet there: set postgres_staged, postgres_python_wheelhouse or postgres_python_index_url"
# Error messages of pip and the advice for each. Messages that occur together with others come first. {0} is the advice
# if pip reached no index.
ADVICE = (
    ("No space left on device|Disk quota exceeded",
     "a disk or quota is full: that of the folder, of pip's cache (~/.cache/pip) or of TMPDIR"),
    ("ProxyError|Tunnel connection failed|Unable to connect to proxy|407 Proxy|proxy-connection-failed",
     "the proxy refuses the connection: see proxy in pip.conf, http_proxy and https_proxy there"),
    ("CERTIFICATE_VERIFY_FAILED", "pip does not trust the index's certificate: see cert in pip.conf there"),
    ("SSLError|ssl-verification-failed",
     "pip and the index share no TLS version: check its address, and any proxy"),
    ("connection broken by|Max retries exceeded|NewConnectionError|ReadTimeout|Read timed out|"
     "connection-(?:failed|timeout)", "{0}"),
    (r"\b40[13] (?:Client )?Error|Unauthorized|Forbidden|Credentials not correct",
     "the index requires a password: set it in ~/.netrc, or index-url in pip.conf there"),
    ("ResolutionImpossible|conflicting dependencies",
     "the requirements conflict; constraints in pip.conf count as well"),
    ("Location '.*' is ignored",
     "a folder of wheels does not exist: see postgres_python_wheelhouse, or find-links in pip.conf there"),
    ("Could not find a version .*from versions: none",
     "the source offers nothing for this Python and machine, or requires a password"),
    ("Could not find a version|requires a different Python", "the source has only other versions"),
)
# User and password in a URL.
SECRET = re.compile(r"(?<=://)[^\s/@]*(?::[^\s/]*)?@")


class Failed(Exception):
    """The environment cannot be created; the message is for the user."""


def normalise(name: str) -> str:
    """Return a project's name in PEP 503's normalised form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip_command(python: str, arguments: list[str], host: dict[str, str] | None = None) -> list[str]:
    """Return the call of a Python's pip. ``host`` are the markers of another host that pip downloads for."""
    other = [f"--host={json.dumps(host)}"] if host else []
    return [python, "-I", "-c", inspect.getsource(_pip_helper), *other, *arguments]


def source_arguments(wheelhouse: str | None, index_url: str | None) -> list[str]:
    """Return pip's arguments for the source of packages. With a wheelhouse no index is used."""
    if wheelhouse:
        return ["--no-index", f"--find-links={wheelhouse}"]
    return [f"--index-url={index_url}"] if index_url else []


def call(module: AnsibleModule, command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
    """Run a Python or pip; return its exit code, stdout and stderr; raise Failed if the program is missing.

    The program keeps the file descriptors ``pass_fds`` open.
    """
    for name in MISLEADING:
        os.environ.pop(name, None)
    try:
        return module.run_command(command, expand_user_and_vars=False, handle_exceptions=False, pass_fds=pass_fds)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None


def explain(command: list[str], stdout: str, stderr: str, offline: str = OFFLINE) -> str:
    """Return the failed program, the end of its output and a remedy, in one line without passwords.

    ``offline`` is the advice if pip reached no index.
    """
    words = (stderr.strip() or stdout.strip()).splitlines() or ["no output"]
    words = [line for line in words if line.startswith(("ERROR", "×"))] or words[-3:]
    program, hint = " ".join(command[:3]), ""
    if inspect.getsource(_pip_helper) in command:
        program = f"{command[0]} -m pip"
        said = stdout + stderr
        hint = next((f" ({advice.format(offline)})" for pattern, advice in ADVICE if re.search(pattern, said)), "")
    return SECRET.sub("****@", f"{program} … failed: {' '.join(words)}{hint}")
