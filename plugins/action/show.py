# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable


class ActionModule(ActionBase):  # type: ignore[misc]
    """Print a text unchanged, except for control characters."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        spec = {"text": {"type": "str", "required": True}, "about": {"type": "dict"}}
        params = self.validate_argument_spec(spec)[1]
        Display().display(printable(params["text"], keep="\n"))
        return dict(result, changed=False, text=params["text"], about=params["about"])
