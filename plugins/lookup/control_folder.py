# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: control_folder
short_description: Folder with a sufficiently short path for ssh's control sockets
version_added: 0.1.0
description:
  - Ansible shares one open connection per host through a socket in a folder. The length of a socket's path is limited.
    If the home directory's path is too long, ssh refuses every connection (C(ControlPath too long)).
  - Returns the folder that Ansible is configured to use (C(control_path_dir), by default C(~/.ansible/cp)) if its path
    is short enough. Otherwise creates and returns a private folder in E(XDG_RUNTIME_DIR) or C(/tmp).
author: mala.hpc_db contributors (@mala-project)
options:
  _terms:
    description: None.
"""

EXAMPLES = r"""
- name: Connect from a home directory of any length
  hosts: all
  vars:
    ansible_control_path_dir: "{{ lookup('mala.hpc_db.control_folder') }}"
  tasks: []
"""

RETURN = r"""
_raw:
  description: Path of the folder.
  type: list
  elements: str
"""

import contextlib
import os
import stat

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.loader import connection_loader
from ansible.plugins.lookup import LookupBase

# A socket's path has at most 103 bytes on macOS and 107 on Linux. Ansible adds a slash and 10 digits, ssh a dot and 16
# letters.
LONGEST = 103 - 11 - 17
FALLBACK = "/tmp"


def short_folder(configured: str, runtime: str, fallback: str = FALLBACK) -> str:
    """Return the configured folder, or a shorter one below another folder; raise OSError if that is impossible."""
    if fits(os.path.expanduser(configured)):
        return configured
    # After su, the variable may contain another user's folder.
    with contextlib.suppress(OSError):
        if runtime and fits(folder := own_folder(runtime)):
            return folder
    return own_folder(fallback)


def fits(folder: str) -> bool:
    return len(os.fsencode(folder)) <= LONGEST


def own_folder(parent: str) -> str:
    """Return a private folder there: access to the socket in it is access to our account on the other machine."""
    about = os.stat(parent)
    if about.st_uid != os.geteuid() and not about.st_mode & stat.S_ISVTX:
        raise PermissionError(f"{parent} is not this user's")
    folder = os.path.join(parent, f"hpc_db-cp-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) != 0o700:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


class LookupModule(LookupBase):  # type: ignore[misc]
    """Finds the folder for the user who runs Ansible."""

    def run(self, terms: list, variables: dict | None = None, **kwargs: object) -> list[str]:
        """Return a list with the folder."""
        # The setting is known only once the plugin is loaded.
        connection_loader.get("ssh", class_only=True)
        configured = constants.config.get_config_value("control_path_dir", plugin_type="connection", plugin_name="ssh")
        try:
            return [short_folder(configured, os.environ.get("XDG_RUNTIME_DIR", ""))]
        except OSError as error:
            raise AnsibleLookupError(
                f"ANSIBLE_SSH_CONTROL_PATH_DIR: {configured} is too long for ssh's control sockets, and {error}; name a"
                f" folder of your own of at most {LONGEST} bytes"
            ) from None
