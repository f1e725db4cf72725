# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an instance directory says of itself."""

from __future__ import annotations

import json
import os


def read_settings(root: str) -> dict:
    """Return what the hosting program goes by; raise FileNotFoundError, with what to do, before it was written."""
    path = os.path.join(root, "host", "settings.json")
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        raise FileNotFoundError(f"{path} is missing; run the playbook hpc_db.yml first") from None
