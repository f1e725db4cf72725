# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

from ansible.module_utils.common.text.converters import to_text
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mala.hpc_db.plugins.module_utils._rsync import (
    OLDEST,
    VANISHED,
    Transfer,
    parse_progress,
    parse_stats,
    parse_version,
    pull_command,
    version_command,
)

# Seconds until the first line about a transfer, and between two.
FIRST_PAUSE = 1.0
PAUSE = 5.0
INSTEAD = "or mount the folder instead (tensorboard_method: mount)"


class CopyFailed(Exception):
    """The folder cannot be copied; the message is for the user."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """Bring a folder from the target to this machine, and show the progress."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = dict(super().run(tmp, task_vars), changed=False)
        spec = {
            "src": {"type": "str", "required": True},  # whose ~ would not be this machine's
            "dest": {"type": "path", "required": True},
            "label": {"type": "str"},
        }
        params = self.validate_argument_spec(spec)[1]
        name = (task_vars or {}).get("inventory_hostname", "")
        label = params["label"] or os.path.basename(params["src"].rstrip("/"))

        def say(line: str) -> None:
            Display().display(f"[{name}] {label}: {line}")

        try:
            for option in ("src", "dest"):
                if not os.path.isabs(params[option]):
                    raise CopyFailed(f"{option}: {params[option]!r} is not absolute; give a path that begins with /")
            check_rsync()
            ssh, host = self._ssh()
            command = pull_command(ssh, host, params["src"], params["dest"], self._task.check_mode)
            if not self._task.check_mode:
                make_folder(Path(params["dest"]))
            transfer = copy(command, say)
        except (CopyFailed, OSError, ValueError) as error:
            return dict(result, failed=True, msg=f"{label}: {' '.join(str(error).split())}")
        return dict(result, changed=transfer.changed, files=transfer.files, size=transfer.size)

    def _ssh(self) -> tuple[list[str], str]:
        """Return the call of ssh as Ansible's own connection makes it, without a host, and the host."""
        if self._connection.transport != "ssh":
            raise CopyFailed(f"ansible_connection: {self._connection.transport} brings no folder; allowed is ssh")
        program = self._connection.get_option("ssh_executable")
        words = [to_text(word) for word in self._connection._build_command(program, "ssh")]
        # The play's own connection is shared if there is one, so that nobody is asked for anything again. A new one is
        # not kept: it would hold rsync's output open. What sshpass brings comes before the program.
        alone = ["-o", "ControlMaster=no", "-o", "BatchMode=yes"]
        return [program, *alone, *words[words.index(program) + 1:]], self._connection.get_option("host")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone."""
    for folder in [*reversed(path.parents), path]:
        folder.mkdir(mode=0o700, exist_ok=True)


def check_rsync() -> None:
    """Refuse an rsync that is missing here, or too old to tell how far it is."""
    try:
        version = parse_version(subprocess.run(version_command(), capture_output=True, text=True, check=False).stdout)
    except FileNotFoundError:
        raise CopyFailed(f"there is no rsync on this machine: install the package rsync, {INSTEAD}") from None
    if version < OLDEST:
        found, oldest = (".".join(map(str, each)) for each in (version, OLDEST))
        raise CopyFailed(
            f"rsync on this machine is {found}, but {oldest} or newer is needed: install the package rsync "
            f"(on macOS: brew install rsync), {INSTEAD}"
        )


def copy(command: list[str], say: Callable[[str], None], clock: Any = time) -> Transfer:
    """Run rsync, say how far it is, and return what it has brought."""
    # What the user's shell says about rsync is not meant for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    start = clock.monotonic()
    next_line = start + FIRST_PAUSE
    text, rest = [], ""
    with tempfile.TemporaryFile() as complaints, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
        env={**environment, "LC_ALL": "C"}, umask=0o077,
    ) as process:
        try:
            # By itself read() would wait until it has all that was asked for.
            for chunk in iter(lambda: process.stdout.read1(65536), b""):  # type: ignore[union-attr]
                *lines, rest = re.split(r"[\r\n]", rest + chunk.decode(errors="replace"))
                text += lines
                progress = [found for found in map(parse_progress, lines) if found]
                if progress and clock.monotonic() >= next_line:
                    done, percent, speed = progress[-1]
                    say(f"{megabytes(done)}, {percent} %, {speed}")
                    next_line = clock.monotonic() + PAUSE
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
        complaints.seek(0)
        if code not in (0, VANISHED):
            raise CopyFailed(explain(code, complaints.read().decode(errors="replace")))
    transfer = parse_stats("\n".join(text))
    if transfer.changed and "--dry-run" not in command:
        say(f"{transfer.files} files, {megabytes(transfer.size)} in {clock.monotonic() - start:.0f} s")
    return transfer


def megabytes(size: int) -> str:
    """Return a size for people."""
    return f"{size / 1e6:.1f} MB"


def explain(code: int, complaints: str) -> str:
    """Return why rsync has failed."""
    if code == 127 or "rsync: command not found" in complaints or "rsync: not found" in complaints:
        return f"there is no rsync on the cluster: have the package rsync installed there, {INSTEAD}"
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    return f"rsync ended with {code}: {'; '.join(lines[-3:]) or 'it said nothing'}"
