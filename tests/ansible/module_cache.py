# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For tests: keep the archives of modules that Ansible builds, and let hosts read and start them quickly.

Ansible packs each module with everything that it imports, in a temporary folder of the run. That takes a third of the
controller's time. Here the folder is a link to one that stays as long as the plugins stay the same.

The host would compile everything in the archive whenever it runs the module, which takes a third of the module's time.
Here the archive also has what Python compiles, for hosts with the controller's version of Python.

A Python whose program comes through a pipe reads it byte by byte. Here it reads it at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import ansible
from ansible import constants
from ansible.executor import module_common
from ansible.plugins.callback import CallbackBase
from ansible.plugins.shell import ShellBase

DOCUMENTATION = """
name: module_cache
type: aggregate
short_description: Keep built modules between runs
description: Only for tests.
"""
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("plugins/modules", "plugins/module_utils", "requirements")
# Not compared with the source's time.
UNCHECKED = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)

build_command = ShellBase.build_module_command


def key() -> str:
    """Return a checksum of what the archives are made of."""
    paths = sorted(path for each in SOURCES for path in (ROOT / each).rglob("*") if path.suffix != ".pyc")
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.is_file()]
    return hashlib.sha256(repr((ansible.__version__, sys.version, stats)).encode()).hexdigest()[:16]


class Compiled(zipfile.ZipFile):
    """An archive in which each Python file also is as Python compiles it."""

    def writestr(self, file: Any, data: bytes | str, *args: Any, **kwargs: Any) -> None:
        """Add the file, and if it is Python, the compiled one."""
        super().writestr(file, data, *args, **kwargs)
        name = getattr(file, "filename", file)
        if name.endswith(".py"):
            code = compile(data, name, "exec", dont_inherit=True)
            super().writestr(f"{name}c", UNCHECKED + marshal.dumps(code))


def read_at_once(shell: ShellBase, env_string: str, shebang: str, cmd: str, arg_path: str | None = None) -> str:
    """Return the command that runs a module; without ``cmd``, Python gets it through a pipe."""
    command = build_command(shell, env_string, shebang, cmd, arg_path)
    return command if cmd else f"{command} -c 'import sys; exec(sys.stdin.buffer.read())'"


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Link the folder when the run begins."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "module_cache"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        ShellBase.build_module_command = read_at_once
        module_common.zipfile = types.SimpleNamespace(**{**vars(zipfile), "ZipFile": Compiled})
        folder = Path.home() / ".cache" / "mala.hpc_db-modules" / key()
        folder.mkdir(parents=True, exist_ok=True)
        Path(constants.DEFAULT_LOCAL_TMP, "ansiballz_cache").symlink_to(folder)
