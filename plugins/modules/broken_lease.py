#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: broken_lease
short_description: Break the lease of a dead server
description:
  - Releases the lease of a server that has ended, if no host or scheduler can confirm this, for example because a host
    or a cluster was renamed, or a scheduler was removed.
  - Watches the heartbeat for longer than C(server_lease_ttl) first, and refuses if the lease is renewed.
  - If the former holder is alive after all, it notices that it has lost the lease and stops PostgreSQL at once.
author: mala.hpc_db contributors (@mala-project)
options:
  root:
    description: Path of the instance directory.
    type: path
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
    details: Returns the holder of the lease without watching the heartbeat.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Break the lease
  mala.hpc_db.broken_lease:
    root: ~/hpc_db/hpc_db
"""

RETURN = r"""
holder:
  description: Holder, or former holder, of the lease in one line. Null if there was none.
  returned: success
  type: str
still:
  description: Seconds since the holder last renewed the lease, at the start of the module. Null if never.
  returned: success
  type: float
watch:
  description: Seconds to watch the heartbeat before the lease is broken. Null if the lease is free.
  returned: success
  type: float
"""

import json
import os
import sys
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import read_settings

Run = Callable[[list[str]], tuple[int, str, str]]


class Refused(Exception):
    """The lease stays unchanged; the message is for the user."""


def ensure_broken(params: dict, run: Run, check_mode: bool) -> dict:
    """Break the lease if it is held. ``run`` takes an argument list and returns code, stdout and stderr."""
    if not os.path.isabs(params["root"]):
        raise Refused(f"root: {params['root']!r} is not absolute")
    read_settings(params["root"])
    returncode, stdout, stderr = run(
        [sys.executable, "-m", "hpc_db_host.break_lease", "look" if check_mode else "break"]
    )
    if returncode:
        raise Refused((stderr.strip().splitlines() or [f"the supervisor ended with {returncode}"])[-1])
    found = json.loads(stdout)
    return {"changed": found["holder"] is not None, **found}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={"root": {"type": "path", "required": True}}, supports_check_mode=True)

    def run(command: list[str]) -> tuple[int, str, str]:
        return module.run_command(
            command, cwd=Layout(module.params["root"]).host, ignore_invalid_cwd=False,
            expand_user_and_vars=False,
        )

    try:
        result = ensure_broken(module.params, run, module.check_mode)
    except (Refused, OSError, ValueError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
