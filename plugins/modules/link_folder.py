#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: link_folder
short_description: Create a folder that contains only the given symbolic links
author: mala.hpc_db contributors (@mala-project)
description:
  - Creates missing links, corrects links with another target, and removes all other links.
  - Never accesses the target of a link, because it may be a mount that hangs.
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
extends_documentation_fragment:
  - mala.hpc_db.attributes
options:
  path:
    description:
      - Absolute path of the folder. It is created if needed, and only this user can access it.
      - A folder that contains anything other than links is refused.
    type: path
    required: true
  links:
    description: Absolute path of the target of each link, by the link's name.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Combine two folders into one
  mala.hpc_db.link_folder:
    path: ~/logs
    links:
      beryllium: /home/alice/be/logs
      aluminium: /home/alice/al/logs
"""

RETURN = r"""
before:
  description: Previous targets of the links, by name.
  returned: success
  type: dict
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line


class Failed(Exception):
    """The folder cannot be created or changed; the message is for the user."""


def look(folder: Path) -> dict[str, str]:
    """Return the current targets of the links."""
    try:
        return {name: os.readlink(folder / name) for name in sorted(os.listdir(folder))}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failed(f"path: {error.filename} is no link; give a folder of links, or a new one") from None


def check_params(params: dict) -> None:
    """Refuse invalid parameters."""
    if not os.path.isabs(params["path"]):
        raise Failed(f"path: {params['path']!r} is not absolute; give a path that begins with / or ~")
    for name, target in params["links"].items():
        if "/" in name or name in ("", ".", ".."):
            raise Failed(f"links: {name!r} cannot be the name of a link; allowed is a name without /")
        if not os.path.isabs(str(target)):
            raise Failed(f"links: {name} leads to {target!r}, which is not absolute; give a path that begins with /")


def ensure_links(params: dict, check_mode: bool) -> dict:
    """Bring the folder to the wanted state."""
    check_params(params)
    folder, wanted = Path(params["path"]), params["links"]
    before = look(folder)
    changed = before != wanted
    if changed and not check_mode:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in before:
            if before[name] != wanted.get(name):
                (folder / name).unlink()
        for name in wanted:
            if before.get(name) != wanted[name]:
                (folder / name).symlink_to(wanted[name])
    return {"changed": changed, "before": before, "diff": {"before": before, "after": dict(sorted(wanted.items()))}}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "required": True}, "links": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    os.umask(0o077)
    try:
        result = ensure_links(module.params, module.check_mode)
    except (Failed, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
