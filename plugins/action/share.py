# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):  # type: ignore[misc]
    """Return a dictionary with more entries."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        spec = {"known": {"type": "dict", "required": True}, "values": {"type": "dict", "required": True}}
        params = self.validate_argument_spec(spec)[1]
        # Some settings contain passwords.
        return dict(params["known"], **params["values"], **result, changed=False, _ansible_verbose_override=True)
