#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: server_log_info
short_description: Read the server's outages from the supervisor's log
description:
  - Reads the output of an instance's server jobs in C(log/job.log).
  - The supervisor logs when the server starts and stops, but not when the job is killed. Such an end is only known to
    lie between two lines of the log, the later of which is the start of the next job.
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
  diff_mode:
    support: none
seealso:
  - module: mala.hpc_db.hosting_job_info
"""

EXAMPLES = r"""
- name: Read the server's outages
  mala.hpc_db.server_log_info:
    root: ~/hpc_db/hpc_db
  register: log
"""

RETURN = r"""
since:
  description: Start of the log in seconds since 1970. V(null) if there is no log. Only the end of a long log is read.
  returned: success
  type: int
serving:
  description: Whether the server is running, according to the log.
  returned: success
  type: bool
outages:
  description: Times without a running server between two servers, and since the last one. The oldest is first.
  returned: success
  type: list
  elements: dict
  contains:
    began:
      description: Start in seconds since 1970.
      type: int
    ended:
      description: Start of the next server. V(null) if there was none.
      type: int
    certain:
      description: Whether the start is exact. If V(false), it is the time of the last log line before the outage.
      type: bool
    reason:
      description: Reason logged by the supervisor. Empty if it was killed.
      type: str
troubles:
  description: Problems of a running server, such as a full disk, with the same fields.
  returned: success
  type: list
  elements: dict
"""

import datetime
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule

# As the hosting program writes it, see tell() there.
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) (\w+): (.*)")
# Several months of moves; what a server that is ill writes may be much more.
LOG_BYTES = 4 * 1024 * 1024
# Said while the server still serves.
NOTICE = "the walltime is near"


def read_lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield time, state and reason of each line in which the hosting program says how it is."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LOG_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return
    # Whatever else is in there has no line break of its own, but maybe a carriage return.
    for line in text.split("\n"):
        found = LINE.fullmatch(line)
        if found:
            when = datetime.datetime.strptime(found[1], "%Y-%m-%dT%H:%M:%S%z")
            yield int(when.timestamp()), found[2], found[3]


def account(lines: Iterable[tuple[int, str, str]]) -> dict[str, Any]:
    """Return what the lines tell.

    A job that only asks for the lease may write between those of the one that has it, so what counts is what nobody
    says without the lease.
    """
    since: int | None = None
    last = 0
    notice = ""
    serving = False
    outages: list[dict] = []
    troubles: list[dict] = []
    for when, state, reason in lines:
        since = when if since is None else since
        away = not serving and outages and outages[-1]["ended"] is None
        ill = troubles and troubles[-1]["ended"] is None
        if ill and state != "unhealthy":
            troubles[-1]["ended"] = when
        if state == "serving":
            if away:
                outages[-1]["ended"] = when
            serving, notice = True, ""
        elif state == "unhealthy" and serving and not (ill and troubles[-1]["reason"] == reason):
            if ill:
                troubles[-1]["ended"] = when
            troubles.append({"began": when, "ended": None, "certain": True, "reason": reason})
        elif state == "stopping" and reason == NOTICE:
            notice = reason
        elif state == "stopping" and serving:
            outages.append({"began": when, "ended": None, "certain": True, "reason": notice})
            serving = False
        elif state == "starting" and reason == "postgres is starting" and serving:
            outages.append({"began": last, "ended": None, "certain": False, "reason": ""})
            serving = False
        elif away and not outages[-1]["reason"] and (state in ("ended", "failed") or " starts again, as " in reason):
            outages[-1]["reason"] = reason.partition(" starts again, as ")[2] or reason
        last = when
    return {"since": since, "serving": serving, "outages": outages, "troubles": troubles}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={"root": {"type": "path", "required": True}}, supports_check_mode=True)
    lines = read_lines(os.path.join(module.params["root"], "log", "job.log"))
    module.exit_json(changed=False, **account(lines))


if __name__ == "__main__":
    main()
