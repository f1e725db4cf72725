# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For tests: keep the archives of modules that Ansible builds, from one run of a playbook to the next.

Ansible packs each module with everything that it imports, in a temporary folder of the run. That takes a third of the
controller's time. Here the folder is a link to one that stays as long as the plugins stay the same.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import ansible
from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: module_cache
type: aggregate
short_description: Keep built modules between runs
description: Only for tests.
"""
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("plugins/modules", "plugins/module_utils", "requirements")


def key() -> str:
    """Return a checksum of what the archives are made of."""
    paths = sorted(path for each in SOURCES for path in (ROOT / each).rglob("*") if path.suffix != ".pyc")
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.is_file()]
    return hashlib.sha256(repr((ansible.__version__, sys.version, stats)).encode()).hexdigest()[:16]


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Link the folder when the run begins."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "module_cache"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        folder = Path.home() / ".cache" / "mala.hpc_db-modules" / key()
        folder.mkdir(parents=True, exist_ok=True)
        Path(constants.DEFAULT_LOCAL_TMP, "ansiballz_cache").symlink_to(folder)
