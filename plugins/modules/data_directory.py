#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: data_directory
short_description: Initialise a PostgreSQL data directory
description:
  - Runs C(initdb) once, with UTF-8, locale C and data checksums regardless of the shell's locale.
  - Connections over a socket authenticate as the system user (V(peer)), all others with SCRAM passwords.
  - The directory is created under a temporary name and renamed, so that an interrupted run leaves no incomplete one.
author: mala.hpc_db contributors (@mala-project)
options:
  path:
    description: Path of the data directory. A directory of another major version is refused.
    type: path
    required: true
  bindir:
    description: Folder of PostgreSQL's programs.
    type: path
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Ensure the data directory is initialised
  mala.hpc_db.data_directory:
    path: ~/hpc_db/hpc_db/data/17
    bindir: ~/hpc_db/hpc_db/postgresql-17/bin
"""

RETURN = r"""
version:
  description: Version of PostgreSQL. Null in check mode while it is not installed.
  returned: success
  type: str
major:
  description: Major version of PostgreSQL. Null in check mode while it is not installed.
  returned: success
  type: int
"""

import os
import shutil
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import ENGLISH, parse_version
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

Run = Callable[[list[str]], str]


class Failed(Exception):
    """The data directory cannot be created or used; the message is for the user."""


def existing_major(path: str) -> str | None:
    """Return the major version of a data directory; None if ``path`` does not exist or is empty."""
    try:
        with open(os.path.join(path, "PG_VERSION"), encoding="ascii") as stream:
            return stream.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise Failed(f"{path} exists and is not a PostgreSQL data directory") from None
        return None


def initdb_command(bindir: str, path: str, major: int) -> list[str]:
    """Return the call that creates a data directory."""
    # PostgreSQL 17 and later have C.UTF-8 built in: order and speed of C, with upper and lower case beyond ASCII.
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []
    return [
        os.path.join(bindir, "initdb"),
        f"--pgdata={path}",
        "--encoding=UTF8",
        "--locale=C",
        *locale,
        "--auth-local=peer",
        "--auth-host=scram-sha-256",
        "--data-checksums",
        "--no-instructions",
    ]


def ensure_data_directory(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the data directory to the wanted state. ``run`` takes an argument list and returns its stdout."""
    path, bindir = params["path"], params["bindir"]
    for folder in (path, bindir):
        if not os.path.isabs(folder):
            raise Failed(f"{folder!r} is not absolute; give a path that begins with / or ~")
    found = existing_major(path)
    installed = os.path.exists(os.path.join(bindir, "postgres"))
    if check_mode and not installed:
        return result(found is None, path, None, None)
    said = run([os.path.join(bindir, "postgres"), "--version"])
    version, major = parse_version(said) or (None, None)
    if version is None or major is None:
        raise Failed(f"postgres --version printed {said.strip()!r}, which contains no version")
    if found not in (None, str(major)):
        raise Failed(f"{path} was made by PostgreSQL {found}, but {bindir} contains {version}; nothing was changed")
    if found is None and not check_mode:
        aside = path + ".unfinished"
        shutil.rmtree(aside, ignore_errors=True)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        run(initdb_command(bindir, aside, major))
        os.rename(aside, path)
    return result(found is None, path, version, major)


def result(changed: bool, path: str, version: str | None, major: int | None) -> dict:
    """Return the module's result."""
    diff = {"before": "" if changed else f"{path}\n", "after": f"{path}\n"}
    return {"changed": changed, "version": version, "major": major, "diff": diff}


def run_command(module: AnsibleModule, command: list[str]) -> str:
    """Run one of PostgreSQL's programs; raise Failed with its error message."""
    try:
        returncode, stdout, stderr = module.run_command(
            command, expand_user_and_vars=False, handle_exceptions=False, environ_update=ENGLISH
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if returncode:
        raise Failed(f"{command[0]} failed: {' '.join(stderr.split())}")
    return stdout


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "required": True}, "bindir": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    os.umask(0o077)
    # initdb reads PGDATA and other PG variables; postgres --version loads libraries
    for name in [name for name in os.environ if name.startswith("PG") or name == "LD_LIBRARY_PATH"]:
        del os.environ[name]
    try:
        outcome = ensure_data_directory(module.params, lambda command: run_command(module, command), module.check_mode)
    except (Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**outcome)


if __name__ == "__main__":
    main()
