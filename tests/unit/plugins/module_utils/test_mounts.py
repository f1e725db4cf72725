# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of mounts and processes, in the formats of Linux and macOS."""

import os
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._mounts import (
    Mount,
    parse_mount,
    parse_mountinfo,
    parse_processes,
    read_processes,
    real_path,
    users,
)

MOUNTINFO = r"""
23 28 0:21 / /proc rw,nosuid shared:13 - proc proc rw
58 28 0:48 / /home/alice/a\040b\011c\134d ro,nosuid,nodev,relatime shared:31 master:2 - fuse.sshfs """ + (
    r"""alice@login:logs\040of\040mine/ ro,user_id=20001,group_id=20001
59 28 0:49 / /home/alice/log-s rw - fuse.sshfs login:./ rw,user_id=1000,group_id=7
60 28 0:50 / /mnt rw,relatime - nfs4 server:/export/user_id=5 rw,vers=4.2
not a line of it
"""
)
MACOS = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
alice@login:logs of (mine)/ on /Users/alice/see (them)/now (macfuse, nodev, nosuid, read-only, mounted by alice)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
"""


def test_reads_mountinfo():
    assert parse_mountinfo(MOUNTINFO) == [
        Mount("/proc", "proc", "proc", ""),
        Mount("/home/alice/a b\tc\\d", "fuse.sshfs", "alice@login:logs of mine/", "20001"),
        Mount("/home/alice/log-s", "fuse.sshfs", "login:./", "1000"),
        Mount("/mnt", "nfs4", "server:/export/user_id=5", ""),
    ]


def test_reads_what_macos_prints():
    assert parse_mount(MACOS) == [
        Mount("/", "apfs", "/dev/disk3s1s1", ""),
        Mount("/Users/alice/see (them)/now", "macfuse", "alice@login:logs of (mine)/", "alice"),
        Mount("/System/Volumes/Data/home", "autofs", "map auto_home", ""),
    ]
    assert [mount.is_sshfs for mount in parse_mount(MACOS)] == [False, True, False]


def test_reads_what_ps_prints():
    (process,) = parse_processes(
        "  71   501 Ss   Mon Nov 23 03:42:06 2026     sshfs login:./ /Users/alice/logs -o ro\n"
        "  72   501 Z    Mon Nov 23 03:42:06 2026     (sshfs)\n"
    )
    assert process == (71, 501, "Mon Nov 23 03:42:06 2026", False, "sshfs login:./ /Users/alice/logs -o ro".split())


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this machine has no /proc")
def test_finds_this_process(tmp_path):
    (me,) = (each for each in read_processes(Path("/proc")) if each.pid == os.getpid())
    assert (me.uid, me.stopped) == (os.geteuid(), False)
    assert me.arguments == Path("/proc/self/cmdline").read_text().split("\0")[:-1]

    with (tmp_path / "file").open("w"):
        assert users(str(tmp_path), Path("/proc"))[0].endswith(f"(PID {os.getpid()})")
    assert users(f"{tmp_path}/fi", Path("/proc")) == []


@pytest.mark.parametrize(("given", "found"), [
    ("{here}/real/x", "{here}/real/x"),
    ("{here}/link/x", "{here}/real/x"),
    ("{here}/relative//y/../x/", "{here}/real/x"),
    ("{here}/up/real/x", "{here}/real/x"),
    # a FUSE mount is not accessed, nor any path behind it
    ("{here}/link/mount", "{here}/real/mount"),
    ("{here}/link/mount/link/x", "{here}/real/mount/link/x"),
])
def test_follows_links_up_to_mounts(tmp_path, given, found):
    here = tmp_path.resolve()
    (here / "real/mount/link").mkdir(parents=True)
    for name, target in {"link": here / "real", "relative": "./real", "up": f"../{here.name}"}.items():
        (here / name).symlink_to(target)
    (here / "real/mount/x").symlink_to("y")
    mounts = [Mount(f"{here}/real/mount", "fuse.sshfs", "login:./", ""), Mount(f"{here}/real", "ext4", "disk", "")]

    assert real_path(given.format(here=here), mounts) == found.format(here=here)


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(OSError, match="lead nowhere"):
        real_path(f"{tmp_path}/a", [])
