# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: doctor_report
short_description: Findings of the doctor on a login node and a compute node
version_added: 0.1.0
description:
  - Returns the findings of the doctor for the server, the login node and the compute node.
author: mala.hpc_db contributors (@mala-project)
options:
  _input:
    description: Output of the doctor on the login node. Its last line is a JSON object.
    type: str
    required: true
  job:
    description:
      - Result of M(mala.hpc_db.short_job) with the doctor on a compute node. If the job gave no answer, this is a
        finding. V(null) without compute nodes.
    type: dict
    required: true
  timeout:
    description: Timeout of the job in seconds, for the advice if the job gave no answer.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Print the number of problems on a machine without a scheduler
  ansible.builtin.debug:
    msg: "{{ (looked.stdout | mala.hpc_db.doctor_report(none, 120)).found | length }}"
"""

RETURN = r"""
_value:
  description:
    - C(parts) is the list of server and nodes, each with C(name) and C(findings).
    - C(found) is the list of all findings that are problems. A finding has C(state), C(check), C(said) and, for a
      problem, C(mend).
  type: dict
"""

import json
from typing import Any


def doctor_report(output: str, job: dict[str, Any] | None, timeout: int) -> dict[str, list[dict[str, Any]]]:
    """Return the findings by place, and those that are problems; raise ValueError if the last line is not JSON."""
    here = json.loads(output.splitlines()[-1])
    parts = [
        {"name": "the server", "findings": here["server"]},
        {"name": f"login node {here['host']}", "findings": here["here"]},
    ]
    if job is not None:
        answer = job["answer"] or {"host": "", "here": [no_answer(job["said"], timeout)]}
        parts.append({"name": f"compute node {answer['host']}", "findings": answer["here"]})
    return {
        "parts": parts,
        "found": [finding for part in parts for finding in part["findings"] if finding["state"] == "found"],
    }


def no_answer(said: str, timeout: int) -> dict[str, str]:
    """Return the finding of a job without an answer, whose reason is ``said``."""
    return {
        "state": "found",
        "check": "job",
        "said": f"nothing was checked: {said}",
        "mend": f"doctor_job_options (another partition), doctor_timeout ({timeout}), or server_python",
    }


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict:
        """Return each filter by its name."""
        return {"doctor_report": doctor_report}
