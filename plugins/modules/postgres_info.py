#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: postgres_info
short_description: Read the version of an installed PostgreSQL and check that it is complete
description:
  - Runs each program that this collection needs with C(--version). Fails if a program is missing, does not run, or has
    another version than the rest.
  - Requires O(bindir), O(module_load), or both.
author: mala.hpc_db contributors (@mala-project)
options:
  bindir:
    description:
      - Folder of PostgreSQL's programs, such as C(/usr/lib/postgresql/15/bin).
      - The default is the folder of the C(postgres) on the E(PATH) after O(module_load).
    type: path
  module_load:
    description:
      - Shell line that makes PostgreSQL available, such as C(module load PostgreSQL/16.1). A login shell runs it.
    type: str
  timeout:
    description: Timeout in seconds for the login shell.
    type: int
    default: 120
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
seealso:
  - module: mala.hpc_db.conda_env
"""

EXAMPLES = r"""
- name: Check Debian's PostgreSQL
  mala.hpc_db.postgres_info:
    bindir: /usr/lib/postgresql/15/bin
  register: found

- name: Check the site's PostgreSQL
  mala.hpc_db.postgres_info:
    module_load: module load PostgreSQL/16.1
"""

RETURN = r"""
bindir:
  description: Folder of the programs.
  returned: success
  type: str
library_path:
  description: Value of E(LD_LIBRARY_PATH) that the programs need, as set by O(module_load). Empty if none.
  returned: success
  type: str
version:
  description: Version of the programs.
  returned: success
  type: str
  sample: "16.1"
major:
  description: Major version of the programs.
  returned: success
  type: int
programs:
  description: Installed programs, including those that only an upgrade needs.
  returned: success
  type: list
  elements: str
features:
  description: Build features, as far as they are reported, such as V(tls), V(lz4) or V(icu).
  returned: success
  type: list
  elements: str
"""

import functools
import os
import tempfile
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import (
    LOAD_FAILED,
    OPTIONAL,
    REQUIRED,
    configure_command,
    parse_features,
    parse_search,
    parse_version,
    program_command,
    search_command,
    tls_command,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line

Run = Callable[[list[str]], tuple[int, str, str]]


class Refused(Exception):
    """These programs cannot be used; the message is for the user."""


def read_postgres(params: dict, run: Run) -> dict:
    """Return the installation's data. ``run`` takes an argument list and returns its code and output."""
    bindir, library_path = find_programs(params, run)
    present = [name for name in (*REQUIRED, *OPTIONAL) if is_program(os.path.join(bindir, name))]
    missing = [name for name in REQUIRED if name not in present]
    if missing:
        raise Refused(f"postgres_bindir: {bindir} has no program {', '.join(missing)}; it needs {', '.join(REQUIRED)}")
    found = {name: version_of(bindir, name, library_path, run) for name in REQUIRED}
    if len(set(found.values())) > 1:
        words = ", ".join(f"{name} {version}" for name, (version, _major) in found.items())
        raise Refused(f"postgres_bindir: the programs in {bindir} are of several versions: {words}")
    version, major = found["postgres"]
    with tempfile.TemporaryDirectory() as scratch:
        tls_library = run(tls_command(bindir, library_path, scratch))[1]
    configure = run(configure_command(bindir, library_path))[1]
    return {
        "bindir": bindir,
        "library_path": library_path,
        "version": version,
        "major": major,
        "programs": sorted(present),
        "features": parse_features(configure, tls_library, major),
    }


def find_programs(params: dict, run: Run) -> tuple[str, str]:
    """Return the folder of the programs and the folders of their libraries."""
    bindir, load = params["bindir"] or "", params["module_load"]
    if bindir and not os.path.isabs(bindir):
        raise Refused(f"postgres_bindir: {bindir!r} is not absolute; give a path that begins with / or ~")
    if not load:
        if not bindir:
            raise Refused("postgres_bindir: neither this nor postgres_module_load is set; set one")
        return bindir, ""
    code, stdout, stderr = run(search_command(load, params["timeout"]))
    if code:
        why = {LOAD_FAILED: "failed", 124: f"took more than {params['timeout']} s"}.get(code, f"ended with {code}")
        raise Refused(f"postgres_module_load: {load!r} {why} in a login shell: {' '.join(stderr.split())}")
    found, library_path = parse_search(stdout)
    if not (bindir or found):
        raise Refused(f"postgres_module_load: {load!r} adds no program postgres to the PATH; set postgres_bindir")
    return bindir or found, library_path


def is_program(path: str) -> bool:
    """Return whether the path is an executable file."""
    return os.path.isfile(path) and os.access(path, os.X_OK)


def version_of(bindir: str, program: str, library_path: str, run: Run) -> tuple[str, int]:
    """Return version and major version of a program."""
    code, stdout, stderr = run(program_command(bindir, program, library_path, "--version"))
    version = None if code else parse_version(stdout)
    if not version:
        said = " ".join((stderr or stdout).split()) or f"exit code {code}"
        raise Refused(f"postgres_bindir: {program} in {bindir} does not run: {said}")
    return version


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "bindir": {"type": "path"},
            "module_load": {"type": "str"},
            "timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    try:
        result = read_postgres(module.params, functools.partial(module.run_command, expand_user_and_vars=False))
    except (Refused, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
