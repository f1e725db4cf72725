# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What finds and asks PostgreSQL's programs."""

import os
import subprocess

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import (
    LOAD_FAILED,
    parse_search,
    parse_version,
    search_command,
)


@pytest.mark.parametrize("text, expected", [
    ("postgres (PostgreSQL) 17.10\n", ("17.10", 17)),
    ("postgres (PostgreSQL) 18beta1 (Debian 18~beta1-1)\n", ("18beta1", 18)),
    ("bash: postgres: not found\n", None),
])
def test_version(text, expected):
    assert parse_version(text) == expected


@pytest.mark.parametrize("load, code, found", [
    ("export PATH={bin}:$PATH LD_LIBRARY_PATH=/a/lib:", 0, ("{bin}", "/a/lib")),
    ("echo hpc_db found >&2; PATH={bin}:$PATH; LD_LIBRARY_PATH=:.:/a:../b:/c", 0, ("{bin}", "/a:/c")),
    ("PATH=/nowhere", 0, ("", "")),
    ("PATH={bin}:$PATH # as the site says", 0, ("{bin}", "")),
    ("false", LOAD_FAILED, ("", "")),
    ("exit 3", 3, ("", "")),
    ("(", 2, ("", "")),
])
def test_login_shell_finds_what_the_line_brings(load, code, found, tmp_path):
    (tmp_path / "postgres").symlink_to("/bin/true")
    (tmp_path / ".bash_profile").write_text("echo welcome; PATH=/usr/bin:/bin\n")
    environment = {"HOME": str(tmp_path), "PATH": os.defpath, "LD_LIBRARY_PATH": "/of/the/caller"}

    done = subprocess.run(
        search_command(load.format(bin=tmp_path), 10), env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert parse_search(done.stdout) == tuple(each.format(bin=tmp_path) for each in found)
