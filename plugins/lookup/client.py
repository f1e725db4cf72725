# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: client
short_description: Files of the client package
version_added: 0.1.0
description:
  - Returns the files of the package for workers' environments (C(client) of this collection), for
    M(mala.hpc_db.client_package).
author: mala.hpc_db contributors (@mala-project)
options: {}
"""

EXAMPLES = r"""
- name: Install the client package
  mala.hpc_db.client_package:
    environment: ~/venvs/mala
    project: "{{ client.project }}"
    files: "{{ client.files }}"
  vars:
    client: "{{ lookup('mala.hpc_db.client') }}"
"""

RETURN = r"""
_raw:
  description:
    - One dictionary. C(project) is the text of C(pyproject.toml), and C(files) has the content of each Python file by
      its path.
  type: list
  elements: dict
"""

from pathlib import Path

from ansible.plugins.lookup import LookupBase

PROJECT = Path(__file__).parents[2] / "client"


class LookupModule(LookupBase):  # type: ignore[misc]
    """The files of the client package."""

    def run(self, terms: list, variables: dict | None = None, **kwargs: object) -> list[dict]:
        """Return one dictionary, with the project and its files."""
        sources = PROJECT / "src"
        files = {
            str(path.relative_to(sources)): path.read_text(encoding="utf-8")
            for path in sorted(sources.glob("hpc_db_client/*.py"))
        }
        return [{"project": (PROJECT / "pyproject.toml").read_text(encoding="utf-8"), "files": files}]
