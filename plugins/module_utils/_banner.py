# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run ssh without what the login shell prints (in ``.bashrc``, say) before the program there begins.

``python -I _banner.py MARK SSH_COMMAND``: the remote command prints MARK before it begins, see ``announced``.
"""

from __future__ import annotations

import os
import subprocess
import sys

AT_ONCE = 1 << 16
# A banner that is longer than this is none.
LONGEST = 1 << 24


def announced(mark: str, program: str) -> str:
    """Return the remote command, in any shell, that prints ``mark`` and becomes ``program``."""
    return f"printf %s {mark}; exec {program}"


def command(mark: str, ssh: list[str]) -> list[str]:
    """Return the call of ssh that drops everything up to ``mark``."""
    return [sys.executable, "-I", os.path.abspath(__file__), mark, *ssh]


def main(mark: bytes, ssh: list[str]) -> int:
    """Run ssh on our standard input and output; return its exit code."""
    with subprocess.Popen(ssh, stdout=subprocess.PIPE) as running:
        assert running.stdout
        source = running.stdout.fileno()
        said = b""
        while mark not in said and len(said) < LONGEST:
            some = os.read(source, AT_ONCE)
            if not some:
                break
            said += some
        rest = said.partition(mark)[2] or os.read(source, AT_ONCE)
        while rest:
            rest = rest[os.write(1, rest):] or os.read(source, AT_ONCE)
    return running.returncode if running.returncode >= 0 else 128 - running.returncode


if __name__ == "__main__":
    raise SystemExit(main(os.fsencode(sys.argv[1]), sys.argv[2:]))
