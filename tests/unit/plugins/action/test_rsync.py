# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""rsync's arguments, and the parsing of its output."""

import pytest
from ansible_collections.mala.hpc_db.plugins.action.folder_copy import (
    Progress,
    Transfer,
    parse_progress,
    parse_stats,
    parse_version,
    pull_command,
    quote,
)

STATS = """
Number of files: 5 (reg: 3, dir: 2)
Number of created files: {created}
Number of deleted files: 0
Number of regular files transferred: {files}
Total file size: 2,345,678 bytes
Total transferred file size: 1,234,567 bytes
Literal data: 1,234,567 bytes
"""


@pytest.mark.parametrize("said, version", [
    ("rsync  version 3.2.7  protocol version 31\nCopyright (C)", (3, 2)),
    ("rsync  version v3.4.1  protocol version 32", (3, 4)),
    ("openrsync: protocol version 29\nrsync version 2.6.9 compatible", (2, 6)),
    ("", (0, 0)),
])
def test_version(said, version):
    assert parse_version(said) == version


def test_paths_are_arguments_after_the_options():
    command = pull_command(["/usr/bin/ssh", "-o", 'User="alice"'], "login", "/home/alice/-x 'y'/", "/logs/a:b", False)

    assert command[-3:] == ["--", "login:/home/alice/-x 'y'/", "/logs/a:b/"]
    assert {"--inplace", "-s", "--timeout=60"} <= set(command)
    shell = [word for word in command if word.startswith("--rsh=")]
    assert len(shell) == 1 and shell[0].endswith(" /usr/bin/ssh -o 'User=\"alice\"'")
    assert "--dry-run" not in command and "--delete" not in command
    assert "--dry-run" in pull_command(["ssh"], "login", "/a", "/b", True)


@pytest.mark.parametrize("host, given", [
    ("login", "login:/a/"), ("login_1.example.org", "login_1.example.org:/a/"), ("2001:db8::1", "[2001:db8::1]:/a/"),
    ("fe80::1%eth0", "[fe80::1%eth0]:/a/"),
    ("-oProxyCommand=x", None), ("a b", None), ("a/b", None), ("a\nb", None), ("a,b", None), ("", None), ("a@b", None),
])
def test_host(host, given):
    if given:
        assert pull_command(["ssh"], host, "/a", "/b", False)[-2] == given
    else:
        with pytest.raises(ValueError, match="^ansible_host: .* is not a host; allowed are"):
            pull_command(["ssh"], host, "/a", "/b", False)


@pytest.mark.parametrize("word, quoted", [
    ("ssh", "ssh"), ("a b", "'a b'"), ("it's", "'it''s'"), ('"', "'\"'"), ("", "''"), ("a\\b", "a\\b"), ("$x", "$x"),
])
def test_quotes_are_those_of_rsync(word, quoted):
    assert quote(word) == quoted


@pytest.mark.parametrize("line, progress", [
    ("    123,456,789  45%   30.00MB/s    0:00:08 (xfr#3, to-chk=5/10)", Progress(123456789, 45, "30.00MB/s")),
    ("              0 100%    0.00kB/s    0:00:00 (xfr#0, to-chk=0/4)", Progress(0, 100, "0.00kB/s")),
    ("Number of files: 5 (reg: 3, dir: 2)", None), ("", None),
])
def test_progress(line, progress):
    assert parse_progress(line) == progress


@pytest.mark.parametrize("files, created, changed", [
    ("1,000", "1,001 (reg: 1,000, dir: 1)", True), ("2", "0", True), ("0", "1 (dir: 1)", True), ("0", "0", False),
])
def test_stats(files, created, changed):
    number = int(files.replace(",", ""))
    assert parse_stats(STATS.format(files=files, created=created)) == Transfer(number, 1234567, changed)


def test_stats_that_are_not_there():
    with pytest.raises(ValueError, match="rsync has not told the number of regular files transferred"):
        parse_stats("")
