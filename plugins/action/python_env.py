# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.mala.hpc_db.plugins.plugin_utils.slices import ActionInSlices


class ActionModule(ActionInSlices):
    """Run the module in slices and show the reason of the wait."""
