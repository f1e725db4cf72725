# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ansible.module_utils.common.text.converters import to_text
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import printable

# Seconds until the first line about a transfer, and between two lines.
FIRST_PAUSE = 1.0
PAUSE = 5.0
INSTEAD = "or mount the folder instead (tensorboard_method: mount)"
# The first version of rsync that reports the progress of a whole transfer.
OLDEST = (3, 1)
# Seconds without any data after which the connection counts as lost.
SILENCE = 60
# rsync's exit code if files vanished during the transfer. This is not an error, because jobs continue.
VANISHED = 24

# python -I -c THIS MARK SSH_COMMAND: runs ssh without the output before the mark, since a login shell may print
# (.bashrc).
AFTER_MARK = """
import os, subprocess, sys
mark, said = sys.argv[1].encode(), b""
os.set_blocking(1, True)  # rsync has it otherwise
with subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE) as ssh:
    some = b"begin"
    while some and mark not in said:
        some = os.read(ssh.stdout.fileno(), 65536)
        said += some
    rest = said.partition(mark)[2] or os.read(ssh.stdout.fileno(), 65536)
    while rest:
        rest = rest[os.write(1, rest):] or os.read(ssh.stdout.fileno(), 65536)
sys.exit(ssh.returncode if ssh.returncode >= 0 else 128 - ssh.returncode)
"""

_PROGRESS = re.compile(r"\s*([\d,.]+)\s+(\d{1,3})%\s+(\S+/s)\s")


class CopyFailed(Exception):
    """The folder cannot be copied; the message is for the user."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """Copy a folder from the target to this machine, and show the progress."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = dict(super().run(tmp, task_vars), changed=False)
        spec = {
            "src": {"type": "str", "required": True},  # type path would expand ~ to this machine's home
            "dest": {"type": "path", "required": True},
            "label": {"type": "str"},
        }
        params = self.validate_argument_spec(spec)[1]
        name = (task_vars or {}).get("inventory_hostname", "")
        label = params["label"] or os.path.basename(params["src"].rstrip("/"))

        def say(line: str) -> None:
            Display().display(printable(f"[{name}] {label}: {line}"))

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
            return dict(result, failed=True, msg=printable(f"{label}: {' '.join(str(error).split())}"))
        return dict(result, changed=transfer.changed, files=transfer.files, size=transfer.size)

    def _ssh(self) -> tuple[list[str], str]:
        """Return ssh's call as in Ansible's own connection, without the host, and the host."""
        if self._connection.transport != "ssh":
            raise CopyFailed(f"ansible_connection: {self._connection.transport} brings no folder; allowed is ssh")
        program = self._connection.get_option("ssh_executable")
        words = [to_text(word) for word in self._connection._build_command(program, "ssh")]
        # An existing connection of the play is shared, so that the user is not asked for a password again. A new one is
        # not kept, because it would hold rsync's output open. The arguments of sshpass precede the program and are
        # dropped.
        alone = ["-o", "ControlMaster=no", "-o", "BatchMode=yes"]
        return [program, *alone, *words[words.index(program) + 1:]], self._connection.get_option("host")


def make_folder(path: Path) -> None:
    """Create a folder, and missing parents, with permissions for this user only."""
    for folder in [*reversed(path.parents), path]:
        folder.mkdir(mode=0o700, exist_ok=True)


def check_rsync() -> None:
    """Refuse an rsync that is missing on this machine or too old to report its progress."""
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
    """Run rsync, show its progress, and return the transfer's totals."""
    # rsync's variables from the user's shell are not meant for this call.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    start = clock.monotonic()
    next_line = start + FIRST_PAUSE
    text, rest = [], ""
    with tempfile.TemporaryFile() as complaints, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
        env={**environment, "LC_ALL": "C"}, umask=0o077,
    ) as process:
        try:
            # read() would wait until all requested bytes have arrived.
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
    """Return a size in readable form."""
    return f"{size / 1e6:.1f} MB"


def explain(code: int, complaints: str) -> str:
    """Return the reason of rsync's failure."""
    if code == 127 or re.search("rsync: ([Cc]ommand )?not found", complaints):
        return f"there is no rsync on the cluster: have the package rsync installed there, {INSTEAD}"
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    return f"rsync ended with {code}: {'; '.join(lines[-3:]) or 'it said nothing'}"


class Progress(NamedTuple):
    """The progress of a transfer."""

    done: int  # bytes
    percent: int
    speed: str


class Transfer(NamedTuple):
    """The totals of a transfer; in check mode, those that it would have."""

    files: int
    size: int  # bytes
    changed: bool  # true also if only folders are new


def version_command() -> list[str]:
    """Return the call that prints the version."""
    return ["rsync", "--version"]


def parse_version(stdout: str) -> tuple[int, int]:
    """Return major and minor version; for openrsync, those of the rsync that it is compatible with."""
    found = re.search(r"rsync\s+version\s+v?(\d+)\.(\d+)", stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def pull_command(ssh: list[str], host: str, source: str, target: str, dry_run: bool) -> list[str]:
    """Return the call that copies the contents of ``source`` on ``host`` into the folder ``target``.

    ``ssh`` is ssh's call without the host. Raise ValueError for a host that could be read as an option or a path.
    """
    mark = uuid.uuid4().hex
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*", host):
        allowed = "letters, digits, '.', '_', '-', ':' and '%'"
        raise ValueError(f"ansible_host: {host!r} is not a host; allowed are {allowed}")
    return [
        "rsync",
        "--recursive", "--times",
        # Links within the folder stay links; the targets of other links are copied, because they are missing here.
        "--links", "--copy-unsafe-links",
        "--inplace",  # an open file here grows, instead of being replaced
        "-s",  # the remote shell does not interpret the path
        "--no-inc-recursive", "--info=progress2", "--stats",  # the total size is known from the start
        f"--timeout={SILENCE}",
        *(["--dry-run"] if dry_run else []),
        f"--rsh={' '.join(map(quote, after_mark(mark, ssh)))}",
        f"--rsync-path=printf %s {mark}; exec rsync",  # works in any shell
        "--",
        f"{f'[{host}]' if ':' in host else host}:{source.rstrip('/')}/",
        f"{target.rstrip('/')}/",
    ]


def after_mark(mark: str, ssh: list[str]) -> list[str]:
    """Return ssh's call that prints only the remote command's output after the mark."""
    return [sys.executable, "-I", "-c", AFTER_MARK, mark, *ssh]


def quote(word: str) -> str:
    """Return a word of the remote shell's call in rsync's syntax, which has quotes but no escapes."""
    return "'" + word.replace("'", "''") + "'" if not word or re.search(r"[\s'\"]", word) else word


def parse_progress(line: str) -> Progress | None:
    """Parse a line of --info=progress2, such as `` 1,234,567  45%   30.00MB/s    0:00:08 (xfr#3, to-chk=5/10)``."""
    found = _PROGRESS.match(line)
    return Progress(_number(found[1]), int(found[2]), found[3]) if found else None


def parse_stats(stdout: str) -> Transfer:
    """Parse the output of --stats; raise ValueError if it is missing."""

    def value(title: str) -> int:
        found = re.search(rf"^{title}: ([\d,.]+)", stdout, re.MULTILINE)
        if not found:
            raise ValueError(f"rsync has not told the {title.lower()}")
        return _number(found[1])

    files = value("Number of regular files transferred")
    return Transfer(files, value("Total transferred file size"), files + value("Number of created files") > 0)


def _number(text: str) -> int:
    """Parse a number with thousands separators."""
    return int(re.sub(r"\D", "", text))
