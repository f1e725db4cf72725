#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: study_report
short_description: Write a report of studies and their server as one HTML file
description:
  - Plots the export of M(mala.hpc_db.study_trials) with C(optuna.visualization) into one self-contained file, which can
    be opened without a network and sent by mail.
  - For large studies, only a part of the trials is plotted, and the report states how many. Parameter importances are
    computed with PED-ANOVA, which needs no scikit-learn.
  - The file is not rewritten if only the remaining time, the used space or the connections have changed.
author: mala.hpc_db contributors (@mala-project)
options:
  path:
    description: Path of the report. An existing file that is not a report is refused.
    type: path
    required: true
  trials:
    description: File written by M(mala.hpc_db.study_trials). If it is missing, the report has no studies.
    type: path
    required: true
  status:
    description:
      - Other contents of the report. RV(ignore:instance), RV(ignore:cluster) and RV(ignore:url) are texts.
        RV(ignore:read) is the time when the studies were read, in seconds since 1970.
      - RV(ignore:job), RV(ignore:endpoint), RV(ignore:state) and RV(ignore:disk) are values of
        M(mala.hpc_db.hosting_job_info). RV(ignore:server) is the result of M(mala.hpc_db.server_info) or null, and
        RV(ignore:log) is RV(mala.hpc_db.hosting_job_info#module:history).
    type: dict
    required: true
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
requirements:
  - optuna
  - plotly
"""

EXAMPLES = r"""
- name: Write the report
  mala.hpc_db.study_report:
    path: ~/report.html
    trials: ~/trials.json.gz
    status:
      instance: hpc_db
      cluster: hemera5
      url: postgresql+psycopg2:///?service=hpc_db
      read: 1795392835
      job: null
      endpoint: null
      state: null
      disk: null
      server: null
      log: {since: null, serving: false, outages: [], troubles: []}
"""

RETURN = r"""
path:
  description: Path of the report.
  returned: success
  type: str
studies:
  description: Number of studies in the report.
  returned: success
  type: int
"""

import gzip
import hashlib
import inspect
import json
import os
import re
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _figures, _report
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import write_atomically

# Stands in the head of every report.
MARK = re.compile(r'<meta name="mala\.hpc_db" content="([0-9a-f]{64})">')
HEAD_BYTES = 1000


class Refused(Exception):
    """The file cannot be written; the message is for the user."""


def read_trials(path: str) -> dict[str, Any]:
    """Return the exported trials; empty if there is no export."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        return {"studies": [], "problems": []}
    except (OSError, EOFError, ValueError) as error:
        raise Refused(f"trials: {path} cannot be read: {error}") from None


def present_mark(path: str) -> str:
    """Return the mark of the existing report; empty if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            found = MARK.search(stream.read(HEAD_BYTES))
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Refused(f"path: {path}: {error.strerror}") from None
    if not found:
        raise Refused(f"path: {path} exists and is not a report; move it away, or choose another report_file")
    return found[1]


def digest_of(status: dict[str, Any], held: dict[str, Any]) -> str:
    """Return a hash of the report's data, without values that change by themselves, and of the drawing code."""
    lasting = {**status, "read": None, "disk": None}
    if status["job"]:
        lasting["job"] = {**status["job"], "time_left": None}
    if status["server"]:  # the supervisor itself connects briefly now and then
        lasting["server"] = status["server"]["version"]
    parts = [inspect.getsource(_figures), inspect.getsource(_report), json.dumps([lasting, held], sort_keys=True)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def render(status: dict[str, Any], held: dict[str, Any], digest: str) -> str:
    """Return the report."""
    try:
        import optuna

        plotly = _figures.plotly_script()
    except ImportError as error:
        raise Refused(f"this Python has no optuna or plotly: {error}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    figures = [_figures.figures_of(study) for study in held["studies"]]
    running = None
    if held["studies"]:
        running = _figures.running_over_time(held["studies"], status["log"], status["read"])
    return _report.page(status, held, running, figures, digest, plotly)


def write(path: str, content: str) -> None:
    """Replace the file by one that others cannot read."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise Refused(f"path: {path}: {error.strerror}; choose another report_file") from None


def ensure_report(params: dict, check_mode: bool) -> dict[str, Any]:
    """Bring the file up to date."""
    path = params["path"]
    if not os.path.isabs(path):
        raise Refused(f"path: {path!r} is not absolute; give a path that begins with / or ~")
    before = present_mark(path)
    held = read_trials(params["trials"])
    digest = digest_of(params["status"], held)
    changed = digest != before
    if changed and not check_mode:
        write(path, render(params["status"], held, digest))
    return {"changed": changed, "path": path, "studies": len(held["studies"])}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "trials": {"type": "path", "required": True},
            "status": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        result = ensure_report(module.params, module.check_mode)
    except Refused as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
