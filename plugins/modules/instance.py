#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: instance
short_description: Create an instance directory with its folders and text files
description:
  - Creates the directory of one user's PostgreSQL server, with its folders (mode 0700) and text files.
  - All files are written in one call, because every additional task costs a round trip over ssh.
  - Files with O(files[].validate) are validated before they are replaced. If one is refused, no file is replaced.
author: mala.hpc_db contributors (@mala-project)
options:
  root:
    description:
      - Path of the instance directory, on a file system that login and compute nodes share. A leading C(~) is the
        user's home directory.
      - It is refused if it is inside a conda environment, belongs to another user, contains other files, or would be
        created on a file system without hard links, which the lease needs.
    type: path
    required: true
  directories:
    description: Folders to create, relative to O(root). Only this user can access them and their files.
    type: list
    elements: str
    default: []
  files:
    description: Text files to write.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path of the file, relative to O(root).
        type: str
        required: true
      content:
        description: Content of the file.
        type: str
        required: true
      mode:
        description: Permissions of the file in octal notation.
        type: str
        default: "0600"
      validate:
        description:
          - Command that must succeed before the file is replaced, as a list of arguments.
          - C({file}) is replaced by the path of the new file, C({scratch}) by an empty directory (mode 0700).
          - The validation is skipped if its program does not exist, as in check mode before the first run.
        type: list
        elements: str
        default: []
extends_documentation_fragment:
  - mala.hpc_db.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Ensure the instance directory exists
  mala.hpc_db.instance:
    root: ~/hpc_db/hpc_db
    directories: [run, log]
    files:
      - path: conf/postgresql.conf
        content: "{{ lookup('ansible.builtin.template', 'postgresql.conf.j2') }}"
        validate: [/opt/pg/bin/postgres, -C, shared_buffers, -D, "{scratch}", -c, "config_file={file}"]
"""

RETURN = r"""
root:
  description: Absolute path of the instance directory.
  returned: success
  type: str
owner:
  description: User who owns the instance.
  returned: success
  type: str
major:
  description:
    - Major version of PostgreSQL that wrote the studies' data directory. It may differ from the wanted one.
    - Null if there is no data directory yet.
  returned: success
  type: int
changed_files:
  description: Files that were, or would be, written, relative to the instance directory.
  returned: success
  type: list
  elements: str
"""

import contextlib
import errno
import glob
import json
import os
import pwd
import re
import shutil
import stat
import tempfile
from typing import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import write_atomically
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout

# These paths are written into service files, job scripts and postgresql.conf: characters that one of them could misread
# are refused.
UNSAFE = re.compile(r"[^\w./+@=, -]")

# Error codes by which a file system reports that it has no hard links.
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)

Run = Callable[[list[str]], tuple[int, str]]


class Refused(Exception):
    """The settings cannot be applied; nothing was changed."""


def check_root(root: str, uid: int) -> None:
    """Refuse a directory that is not, and must not become, an instance directory."""
    if uid == 0:
        raise Refused(
            "instance: the owner is root, but PostgreSQL does not run as root: "
            "set ansible_user (on this machine: ansible_become_user) to the user who owns the studies"
        )
    unsafe = UNSAFE.search(root)
    if unsafe:
        raise Refused(
            f"instance_root: {root!r} contains {unsafe.group()!r}; allowed are letters, digits, space and ./+@=,_-"
        )
    folder = root
    while folder != os.path.dirname(folder):
        if os.path.isdir(os.path.join(folder, "conda-meta")):
            raise Refused(
                f"instance_root: {root} lies inside the conda environment {folder}, which an update may replace; "
                "choose a folder outside of it"
            )
        folder = os.path.dirname(folder)
    if not os.path.lexists(root):
        return
    if not os.path.isdir(root):
        raise Refused(f"instance_root: {root} exists and is not a directory")
    if os.stat(root).st_uid != uid:
        raise Refused(f"instance_root: {root} belongs to another user")
    if os.listdir(root) and not os.path.isdir(Layout(root).run):
        reason = "contains other files and is not an instance directory"
        raise Refused(f"instance_root: {root} {reason}; choose a new folder")


def check_links(root: str) -> None:
    """Refuse a new instance on a file system without hard links, such as vfat, exFAT and some FUSE and SMB mounts."""
    folder = root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        scratch = tempfile.mkdtemp(prefix=".hpc_db-", dir=folder)
    except OSError:
        return  # the instance directory cannot be created either, and that error gives the reason
    try:
        one, other = (os.path.join(scratch, name) for name in ("one", "other"))
        with open(one, "wb"):
            os.link(one, other)
        counted = os.stat(other).st_nlink == 2  # the attributes of the first name may be cached
    except OSError as error:
        counted = error.errno not in NO_HARD_LINKS
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not counted:
        raise Refused(
            f"instance_root: {root} is on a file system without hard links; choose a folder on another one"
        )


def ensure_directory(path: str, check_mode: bool) -> bool:
    """Ensure that a folder exists with mode 0700; return whether this is a change."""
    if os.path.isdir(path) and os.stat(path).st_mode & 0o777 == 0o700:
        return False
    if not check_mode:
        os.makedirs(path, mode=0o700, exist_ok=True)
        os.chmod(path, 0o700)
    return True


def open_files(folder: str) -> list[str]:
    """Return the files that others have permissions on: libpq and PostgreSQL refuse such password and key files."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
        with contextlib.suppress(FileNotFoundError):  # logs and dumps may be deleted at any time
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode) and about.st_mode & 0o077:
                found.append(path)
    return found


def close_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.chmod(path, os.stat(path).st_mode & 0o700)


def current_text(path: str) -> str | None:
    """Return the text of ``path``; None if the file does not exist."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def major_of(root: str) -> int | None:
    """Return the major version of the data directory in use; None if there is none yet."""
    try:
        with open(Layout(root).settings, encoding="utf-8") as stream:
            used = [json.load(stream)["data"]]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        # The first run was interrupted, so the settings do not name the directory in use yet.
        used = glob.glob(os.path.join(glob.escape(Layout(root).data), "[0-9]*"))
    versions = [current_text(os.path.join(path, "PG_VERSION")) for path in used if path.rpartition("/")[2].isdigit()]
    return max((int(version.partition(".")[0]) for version in versions if version), default=None)


def validate(wanted: dict, run: Run) -> None:
    """Let the program that will read the file validate it; raise Refused with its error message."""
    command = wanted["validate"]
    if not command or not os.path.exists(command[0]):
        return
    scratch = tempfile.mkdtemp(prefix="hpc_db-")
    try:
        candidate = os.path.join(scratch, os.path.basename(wanted["path"]))
        empty = os.path.join(scratch, "empty")
        os.mkdir(empty, 0o700)
        with open(candidate, "w", encoding="utf-8") as stream:
            stream.write(wanted["content"])
        arguments = [word.replace("{file}", candidate).replace("{scratch}", empty) for word in command]
        returncode, stderr = run(arguments)
        if returncode:
            words = stderr.replace(candidate, wanted["path"]).strip().splitlines()
            # PostgreSQL names the parameters first; its last line only reports that the file has errors.
            named = [line.split("  ", 1)[-1] for line in words if "LOG:" in line and "skipping missing" not in line]
            raise Refused(f"{wanted['path']}: {'; '.join(named or words)}")
    finally:
        shutil.rmtree(scratch)


def ensure_files(root: str, files: list[dict], run: Run, check_mode: bool) -> list[dict]:
    """Bring the files to the wanted state; return a diff for each that changed."""
    changes = []
    for wanted in files:
        path = os.path.join(root, wanted["path"])
        mode = int(wanted["mode"], 8)
        before = current_text(path)
        if before != wanted["content"]:
            validate(wanted, run)
            changes.append((path, wanted, before or ""))
        elif os.stat(path).st_mode & 0o777 != mode:
            changes.append((path, wanted, before))
    if not check_mode:
        for path, wanted, _before in changes:
            write_atomically(path, wanted["content"], int(wanted["mode"], 8))
    return [
        {"before": before, "after": wanted["content"], "before_header": wanted["path"], "after_header": wanted["path"]}
        for _path, wanted, before in changes
    ]


def ensure_instance(params: dict, run: Run, check_mode: bool, uid: int) -> dict:
    """Bring the instance directory to the wanted state. ``run`` takes an argument list; returns code and stderr."""
    if not os.path.isabs(params["root"]):
        raise Refused(f"instance_root: {params['root']!r} is not absolute; give a path that begins with / or ~")
    root = os.path.abspath(params["root"])
    check_root(root, uid)
    for name in [*params["directories"], *(wanted["path"] for wanted in params["files"])]:
        if not os.path.normpath(os.path.join(root, name)).startswith(root + os.sep) or not name.isprintable():
            raise Refused(f"{name!r} is not a path inside {root}")
    for wanted in params["files"]:
        if not re.fullmatch("0?[0-7]{3}", wanted["mode"]):
            raise Refused(f"mode: {wanted['mode']!r} is not a mode; write for example 0600")
    if not check_mode and not os.path.isdir(Layout(root).run):
        check_links(root)
    # "run" comes first: it distinguishes an instance directory from any other folder.
    folders = [root] + [os.path.join(root, name) for name in ["run", *params["directories"]]]
    made = [path for path in folders if ensure_directory(path, check_mode)]
    opened = [path for folder in folders[1:] for path in open_files(folder)]
    for path in [] if check_mode else opened:
        close_file(path)
    closed = [(path, "0700") for path in made] + [(path, "closed to others") for path in opened]
    diffs = [
        {"before": "", "after": "", "before_header": path, "after_header": f"{path} ({how})"} for path, how in closed
    ]
    diffs += ensure_files(root, params["files"], run, check_mode)
    return {
        "changed": bool(diffs),
        "root": root,
        "major": major_of(root),
        "changed_files": [diff["before_header"] for diff in diffs[len(closed):]],
        "diff": diffs,
    }


def main() -> None:
    """Run the module."""
    file_options = {
        "path": {"type": "str", "required": True},
        "content": {"type": "str", "required": True},
        "mode": {"type": "str", "default": "0600"},
        "validate": {"type": "list", "elements": "str", "default": []},
    }
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "directories": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "dict", "default": [], "options": file_options},
        },
        supports_check_mode=True,
    )
    user = pwd.getpwuid(os.geteuid())

    def run(command: list[str]) -> tuple[int, str]:
        returncode, _stdout, stderr = module.run_command(command, cwd="/", expand_user_and_vars=False)
        return returncode, stderr

    try:
        result = ensure_instance(module.params, run, module.check_mode, user.pw_uid)
    except (Refused, OSError) as error:
        module.fail_json(msg=one_line(error))
    module.exit_json(owner=user.pw_name, **result)


if __name__ == "__main__":
    main()
