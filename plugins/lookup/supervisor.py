# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: supervisor
short_description: Files of the supervisor, the program in the server job
version_added: 0.1.0
description:
  - Returns the files of the package that the server job runs (C(plugins/module_utils/host) of this collection), for
    O(mala.hpc_db.instance#module:files).
author: mala.hpc_db contributors (@mala-project)
options:
  _terms:
    description: The package's folder, relative to the instance directory.
    required: true
"""

EXAMPLES = r"""
- name: Write the supervisor
  mala.hpc_db.instance:
    root: ~/hpc_db/hpc_db
    directories: [host/hpc_db_host, host/hpc_db_host/schedulers]
    files: "{{ query('mala.hpc_db.supervisor', 'host/hpc_db_host') }}"
"""

RETURN = r"""
_raw:
  description: Path and content of each file.
  type: list
  elements: dict
"""

from pathlib import Path

from ansible.plugins.lookup import LookupBase

PACKAGE = Path(__file__).parents[1] / "module_utils" / "host"


class LookupModule(LookupBase):  # type: ignore[misc]
    """The files of the package, for each of the given folders."""

    def run(self, terms: list, variables: dict | None = None, **kwargs: object) -> list[dict]:
        """Return the files, sorted by path, for each folder."""
        return [
            {"path": f"{folder}/{path.relative_to(PACKAGE)}", "content": path.read_text(encoding="utf-8")}
            for folder in terms for path in sorted(PACKAGE.rglob("*.py"))
        ]
