# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable


class ActionModule(ActionBase):  # type: ignore[misc]
    """Copy a file from the target to this machine, completely or not at all."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = dict(super().run(tmp, task_vars), changed=False)
        spec = {"src": {"type": "str", "required": True}, "dest": {"type": "path", "required": True}}
        params = self.validate_argument_spec(spec)[1]
        src, dest = params["src"], Path(params["dest"])
        if self._task.check_mode:
            return dict(result, skipped=True, msg="a file is not fetched in check mode")
        try:
            # in the same folder, with permissions for this user only
            descriptor, partial = tempfile.mkstemp(prefix=f".{dest.name}.", dir=dest.parent)
            os.close(descriptor)
        except OSError as error:
            return dict(result, failed=True, msg=f"dest: {dest.parent}: {error.strerror}")
        try:
            if dest.exists():  # an identical file is not transferred again
                shutil.copyfile(dest, partial)
            fetched = self._fetch(src, partial, task_vars)
            if fetched.get("failed") and "remote_checksum" in fetched:
                # A shell that prints text (.bashrc) has corrupted the transfer. A module's answer is separated from
                # such text.
                fetched = self._slurp(src, partial, fetched["remote_checksum"], task_vars)
            if fetched.get("failed"):
                return dict(result, failed=True, msg=printable(f"{src}: {fetched.get('msg')}"))
            if fetched["changed"]:
                os.replace(partial, dest)
        except OSError as error:
            return dict(result, failed=True, msg=f"dest: {dest}: {error.strerror}")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        return dict(result, changed=fetched["changed"])

    def _fetch(self, src: str, dest: str, task_vars: dict | None) -> dict:
        task = self._task.copy()
        task.args = {"src": src, "dest": dest, "flat": True, "fail_on_missing": True}
        action = self._shared_loader_obj.action_loader.get(
            "ansible.builtin.fetch", task=task, connection=self._connection, play_context=self._play_context,
            loader=self._loader, templar=self._templar, shared_loader_obj=self._shared_loader_obj,
        )
        return action.run(task_vars=task_vars)

    def _slurp(self, src: str, dest: str, checksum: str, task_vars: dict | None) -> dict:
        read = self._execute_module("ansible.builtin.slurp", module_args={"src": src}, task_vars=task_vars)
        if read.get("failed"):
            return read
        content = base64.b64decode(read["content"])
        if hashlib.sha1(content).hexdigest() != checksum:
            return {"failed": True, "msg": "it changed while it was read"}
        Path(dest).write_bytes(content)
        return {"changed": True}
