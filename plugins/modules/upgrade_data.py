#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: upgrade_data
short_description: Move the studies to another major version of PostgreSQL
description:
  - Dumps the study databases, and upgrades a copy of the data directory with C(pg_upgrade). If C(pg_upgrade) refuses,
    the databases are dumped and restored. Then all rows and each study's best value are compared.
  - Only after that, a single rename puts the new data directory into use. The old one stays unchanged.
  - The module holds the instance's lease, so that no job can start the server. An interruption at any point leaves
    everything unchanged, and the next run starts over.
author: mala.hpc_db contributors (@mala-project)
options:
  root:
    description:
      - Path of the instance directory. It must already contain the new programs, a new data directory
        C(data/MAJOR.new), and C(host/settings-MAJOR.json) with the paths of both.
    type: path
    required: true
  major:
    description:
      - Wanted major version. If the studies are already in it, nothing is done.
      - Going back to an older major version is possible if its data directory was kept. Nothing is converted then.
    type: int
    required: true
  back:
    description: Go back even if trials were added since then. They stay in the newer version's data directory.
    type: bool
    default: false
  patience:
    description: Maximum time in seconds to wait for the holder of the lease.
    type: int
    default: 180
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
    details: Checks only what can be checked without a running server.
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Move the studies to PostgreSQL 18
  mala.hpc_db.upgrade_data:
    root: ~/hpc_db/hpc_db
    major: 18
"""

RETURN = r"""
way:
  description:
    - C(pg_upgrade), C(dump and restore) with the reason, or C(kept) for going back.
    - Null if there was nothing to do, and in check mode.
  returned: success
  type: str
kept:
  description: Data directory that was, or would be, kept unchanged. Null if there was nothing to do.
  returned: success
  type: str
seconds:
  description: Duration in seconds, including the dump.
  returned: changed and not in check mode
  type: float
databases:
  description: Compared contents of each database.
  returned: changed and not in check mode
  type: dict
  contains:
    tables:
      description: Number of rows and a checksum of each table.
      type: dict
    studies:
      description: Direction, number of completed trials and best value of each study, for each objective.
      type: list
      elements: dict
"""

import json
import os
import shutil
import sys
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import read_settings

# Programs of the old installation that the upgrade needs.
PROGRAMS = ["postgres", "psql", "pg_dump", "pg_restore"]
# Bytes of the new data directory in addition to the copy of the old one, with which it shares files.
NEW_BYTES = 100_000_000

Run = Callable[[list[str]], str]


class Refused(Exception):
    """The studies cannot be moved; nothing was changed."""


class Failed(Exception):
    """The operation failed; the message is for the user."""


def major_of(data: str) -> int | None:
    """Return a data directory's major version; None if the folder is not a data directory."""
    try:
        with open(os.path.join(data, "PG_VERSION"), encoding="ascii") as stream:
            return int(stream.read().split(".")[0])
    except (OSError, ValueError):
        return None


def size_of(folder: str) -> int:
    """Return the total size of all files in a folder in bytes."""
    paths = (os.path.join(parent, name) for parent, _folders, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths)


def check(params: dict, used: dict, found: int) -> None:
    """Refuse an upgrade that cannot succeed."""
    root, major, data = params["root"], params["major"], used["data"]
    missing = [name for name in PROGRAMS if not os.path.exists(os.path.join(used["bindir"], name))]
    if missing:
        raise Refused(
            f"{used['bindir']} no longer has {', '.join(missing)}, and only PostgreSQL {found} reads {data}: "
            f"install it again with the playbook hpc_db.yml and postgres_major={found}"
        )
    if major < found:
        if major_of(os.path.join(Layout(root).data, str(major))) != major:
            raise Refused(
                f"postgres_major: {major} is not allowed; PostgreSQL cannot go from {found} to an older major, and no "
                f"data directory of {major} was kept"
            )
        return
    need, free = size_of(data) + NEW_BYTES, shutil.disk_usage(data).free
    if need > free:
        raise Refused(f"{data} cannot be copied: that takes {need >> 20} MB, and {free >> 20} MB are free")


def upgrade_command(params: dict) -> list[str]:
    """Return the call that moves the studies; it prints the compared counts as JSON."""
    command = [sys.executable, "-m", "hpc_db_host", "upgrade", f"--root={params['root']}"]
    settings = Layout(params["root"]).settings_of(params["major"])
    command += [f"--settings={settings}", f"--lease-patience={params['patience']}"]
    return [*command, *(["--back"] if params["back"] else [])]


def ensure_major(params: dict, run: Run, check_mode: bool) -> dict:
    """Bring the studies to the wanted major version. ``run`` takes an argument list and returns its stdout."""
    used = read_settings(params["root"])
    found = major_of(used["data"])
    if found is None:
        raise Refused(f"{used['data']} is not a PostgreSQL data directory; run the playbook hpc_db.yml first")
    changed = found != params["major"]
    result = {"changed": changed, "way": None, "kept": used["data"] if changed else None}
    if changed:
        check(params, used, found)
        if not check_mode:
            result.update(json.loads(run(upgrade_command(params))))
    lines = [f"the studies are in PostgreSQL {major}\n" for major in (found, params["major"])]
    return {**result, "diff": {"before": lines[0], "after": lines[1]}}


def last_words(stderr: str) -> str:
    """Return why the program ended, without the time and state before it."""
    lines = stderr.strip().splitlines() or ["no error message"]
    return lines[-1].partition(" failed: ")[2] or lines[-1]


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "major": {"type": "int", "required": True},
            "back": {"type": "bool", "default": False},
            "patience": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)

    def run(command: list[str]) -> str:
        returncode, stdout, stderr = module.run_command(
            command, cwd=Layout(module.params["root"]).host, ignore_invalid_cwd=False,
            expand_user_and_vars=False,
        )
        if returncode:
            raise Failed(f"killed by signal {-returncode}" if returncode < 0 else last_words(stderr))
        return stdout

    try:
        if not os.path.isabs(module.params["root"]):
            raise Refused(f"root: {module.params['root']!r} is not absolute; give a path that begins with / or ~")
        result = ensure_major(module.params, run, module.check_mode)
    except (Refused, Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
