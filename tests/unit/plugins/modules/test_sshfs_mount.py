# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""sshfs_mount on a fake machine that keeps its mounts; tests/integration has a real one."""

import os
import signal
import sys

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._sshfs import (
    MOUNT_OPTIONS,
    SSH_OPTIONS,
    Failed,
    Refused,
    explain,
    plan,
    try_command,
)
from ansible_collections.mala.hpc_db.plugins.modules import sshfs_mount
from ansible_collections.mala.hpc_db.plugins.modules.sshfs_mount import MARKER, Hung, Machine, ensure_mount

ME = os.geteuid()
SOURCE = "alice@login:logs/"


class FakeMachine:
    """Answers like sshfs, ssh, fusermount3 and the tables in /proc; its processes end when told to."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "proc/self").mkdir(parents=True)
        (folder / "fuse").touch()
        self.mounts = []  # path, source, type, user
        self.last_pid = 100
        self.calls = []
        self.missing = []
        self.sshfs_says = self.ssh_says = ""
        self.answer = (0, "")
        self.busy = False
        self.deaf_to = ()  # signals that are ignored
        self.write()

    def machine(self):
        return Machine(
            self.run, lambda name: None if name in self.missing else f"/bin/{name}", self.kill,
            self.folder / "proc", self.folder / "fuse", ME, "alice",
        )

    def run(self, command, seconds):
        name = os.path.basename(command[0])
        if command[0] == sys.executable:
            if self.answer == "hung":
                raise Hung
            return self.answer
        self.calls.append(command)
        return getattr(self, name)(command)

    def sshfs(self, command):
        if self.sshfs_says == "hung":
            raise Hung
        if self.sshfs_says:
            return 1, self.sshfs_says
        self.add(command[2], command[1], command)
        return 0, ""

    def ssh(self, command):
        return (255, self.ssh_says) if self.ssh_says else (0, "")

    def fusermount3(self, command):
        if self.busy and "-z" not in command:
            return 1, "fusermount3: failed to unmount: Device or resource busy\n"
        path = command[-1]
        *others, _gone = [mount for mount in self.mounts if mount[0] == path]
        self.mounts = [mount for mount in self.mounts if mount[0] != path] + others
        if not self.busy:
            self.end(*[pid for pid, arguments in self.processes() if path in arguments][:1])
        self.write()
        return 0, ""

    def kill(self, pid, number):
        if number and number not in self.deaf_to:
            self.end(pid)

    # --- events from outside

    def add(self, path, source=SOURCE, command=None, kind="fuse.sshfs", user=ME, state="S"):
        self.mounts.append((path, source, kind, user))
        self.write()
        if command is not None:
            self.last_pid += 1
            process = self.folder / "proc" / str(self.last_pid)
            process.mkdir()
            (process / "cmdline").write_text("\0".join(command) + "\0")
            (process / "stat").write_text(f"{self.last_pid} (sshfs) {state} 1 " + "0 " * 17 + "4711 0\n")

    def write(self):
        lines = [
            f"58 28 0:48 / {path.replace(' ', chr(92) + '040')} ro - {kind} {source} ro,user_id={user},group_id=1\n"
            for path, source, kind, user in self.mounts
        ]
        (self.folder / "proc/self/mountinfo").write_text("".join(lines))

    def processes(self):
        return sorted(
            (int(each.name), (each / "cmdline").read_text().split("\0")) for each in (self.folder / "proc").glob("1*")
        )

    def end(self, *pids):
        for pid in pids:
            for file in ("cmdline", "stat"):
                (self.folder / f"proc/{pid}/{file}").unlink()
            (self.folder / f"proc/{pid}").rmdir()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(sshfs_mount, "PATIENCE", 0.01)
    return FakeMachine(tmp_path.resolve())


def settings(fake, **others):
    return {
        "path": f"{fake.folder}/a/see logs", "state": "mounted", "host": "login", "folder": "logs", "user": "alice",
        "port": None, "identity_file": None, "ssh_config": None, "proxy_jump": [], "ssh_arguments": "",
        "share_connection": False, "read_only": True, "idmap": "user", "options": {}, "alive_interval": 3,
        "alive_count": 2, "connect_timeout": 5, "timeout": 30, "force": False, **others,
    }


def ensure(fake, check_mode=False, **others):
    return ensure_mount(settings(fake, **others), fake.machine(), check_mode)


def mount(fake, **others):
    """Mount as the module itself would."""
    given = settings(fake, **others)
    wanted = plan(given)
    os.makedirs(given["path"], exist_ok=True)
    fake.add(given["path"], wanted.source, ["/usr/bin/sshfs", wanted.source, given["path"], *wanted.options])


def none(fake):
    pass


def dead(fake):
    mount(fake)
    fake.end(101)


def hung(fake):
    mount(fake)
    fake.busy, fake.answer = True, "hung"


def stopped(fake):
    given = settings(fake)
    fake.add(given["path"], command=["sshfs", SOURCE, given["path"]], state="T")
    fake.busy, fake.answer, fake.deaf_to = True, "hung", [signal.SIGTERM]


def stacked(fake):
    mount(fake)
    mount(fake)


def of_another_folder(fake):
    mount(fake, folder="other")


def writable(fake):
    mount(fake, read_only=False)


def by_hand(fake):
    given = settings(fake)
    fake.add(given["path"], "login:logs", ["sshfs", "login:logs", "a/see logs"])


def left_behind(fake):
    mount(fake)
    fake.mounts.clear()
    fake.write()


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(("before", "found"), [
    (none, "none"), (mount, "mounted"), (dead, "dead"), (hung, "hung"), (stopped, "hung"), (stacked, "stacked"),
    (of_another_folder, "other"), (writable, "other"), (by_hand, "other"), (left_behind, "leftover"),
])
@pytest.mark.parametrize("state", ["mounted", "unmounted", "remounted"])
def test_changes_only_what_differs(fake, before, found, state, check_mode):
    before(fake)
    tables = (fake.mounts[:], fake.processes())
    changes = {"mounted": found != "mounted", "unmounted": found != "none", "remounted": True}[state]
    if state == "unmounted" and found in ("hung", "other"):
        found = "hung" if before is stopped else "mounted"  # an unmount does not depend on the source

    result = ensure(fake, check_mode, state=state)

    assert (result["changed"], result["found"]) == (changes, found)
    if check_mode or not changes:
        assert not fake.calls and (fake.mounts, fake.processes()) == tables
        return
    there = state != "unmounted"
    assert [each[:2] for each in fake.mounts] == [(result["mount_point"], SOURCE)] * there
    assert len(fake.processes()) == there
    again = ensure(fake, state="unmounted" if state == "unmounted" else "mounted")
    assert again["changed"] is (fake.answer == "hung" and there)  # the fake would still hang


def test_what_it_runs(fake):
    result = ensure(fake)

    options = (
        "reconnect idmap=user ro ServerAliveInterval=3 ServerAliveCountMax=2 ConnectTimeout=5 BatchMode=yes"
        " StrictHostKeyChecking=yes ControlMaster=no ControlPath=none"
    ).split()
    path = f"{fake.folder}/a/see logs"
    assert fake.calls == [["/bin/sshfs", SOURCE, path, *(word for each in options for word in ("-o", each))]]
    assert result["diff"] == {
        "before": "", "after": f"{SOURCE} on {path}: mounted\n" + "".join(f"  {each}\n" for each in options),
    }


def test_removes_the_folders_that_it_made(fake):
    (fake.folder / "a").mkdir()
    path = f"{fake.folder}/a/b/c"
    ensure(fake, path=path)
    assert os.listdir(path) == [MARKER]

    ensure(fake, path=path, state="unmounted")
    assert os.listdir(fake.folder / "a") == []

    os.makedirs(path)
    ensure(fake, path=path)
    ensure(fake, path=path, state="unmounted")
    assert os.path.isdir(path), "a folder that was there before stays"


def test_keeps_what_came_beside_it(fake):
    ensure(fake)
    (fake.folder / "a/note").touch()

    ensure(fake, state="unmounted")

    assert os.listdir(fake.folder / "a") == ["note"]


def test_a_folder_left_by_a_restart_is_used_and_removed(fake):
    ensure(fake)
    fake.end(101)
    fake.mounts.clear()
    fake.write()

    assert ensure(fake, state="unmounted", check_mode=True)["changed"]
    assert ensure(fake)["found"] == "none"
    ensure(fake, state="unmounted")
    assert not (fake.folder / "a").exists()


@pytest.mark.parametrize("before", [none, mount])
def test_a_link_that_is_down_is_no_reason_to_remount(fake, before):
    before(fake)
    fake.answer = (1, "5 Input/output error\n")

    result = ensure(fake)

    assert result["changed"] is (before is none)
    assert result["answers"] is (before is none)
    if before is mount:
        assert "login does not answer: Input/output error" in result["warning"]


def test_sshfs_that_has_just_died(fake):
    mount(fake)
    fake.answer = (1, "107 Transport endpoint is not connected\n")

    assert ensure(fake, check_mode=True)["found"] == "dead"


@pytest.mark.parametrize("state", ["unmounted", "remounted"])
def test_a_mount_in_use_is_left_alone(fake, state):
    mount(fake)
    fake.busy = True

    with pytest.raises(Failed, match="^path: programs still use .* with force"):
        ensure(fake, state=state)
    assert len(fake.mounts) == len(fake.processes()) == 1

    ensure(fake, state=state, force=True)
    assert len(fake.mounts) == len(fake.processes()) == (state == "remounted")


def test_an_sshfs_that_does_not_end_is_killed(fake):
    hung(fake)
    fake.deaf_to = [signal.SIGTERM]
    ensure(fake, state="unmounted")
    assert not fake.processes()

    hung(fake)
    fake.deaf_to = [signal.SIGTERM, signal.SIGKILL]
    with pytest.raises(Failed, match=r"sshfs \(PID 102\) does not end"):
        ensure(fake, state="unmounted")


def test_refuses_a_folder_that_holds_something(fake):
    folder = fake.folder / "a/see logs"
    folder.mkdir(parents=True)
    for name in "dbca":
        (folder / name).touch()

    for check_mode in (True, False):
        with pytest.raises(Refused, match=r"is not empty, .* \(a, b, c, …\)"):
            ensure(fake, check_mode)
    dead(fake)
    with pytest.raises(Refused, match="is not empty"):  # a file appeared there while nothing was mounted
        ensure(fake)
    assert not fake.mounts and len(os.listdir(folder)) == 4


@pytest.mark.parametrize(("mount", "reason"), [
    ({"kind": "nfs4"}, r"alice@login:logs/ \(nfs4\) is mounted at .* already"),
    ({"user": ME + 1}, "another user has mounted alice@login:logs/"),
    ({"below": ""}, "lies inside of the mount"),
])
@pytest.mark.parametrize("state", ["mounted", "unmounted"])
def test_refuses_what_others_have_mounted(fake, mount, reason, state):
    mount = dict(mount)
    fake.add(f"{fake.folder}/a{mount.pop('below', '/see logs')}", **mount)

    with pytest.raises(Refused, match=f"^path: .*{reason}"):
        ensure(fake, state=state)
    assert not fake.calls


def test_tells_what_to_install(fake):
    for name, package in (("sshfs", "the package sshfs"), ("fusermount3", "the package fuse3")):
        fake.missing = ["fusermount", name]
        with pytest.raises(Refused, match=f"install {package}.*copying instead of mounting needs neither"):
            ensure(fake, check_mode=True)
    fake.missing = []
    (fake.folder / "fuse").unlink()
    with pytest.raises(Refused, match="FUSE is missing"):
        ensure(fake)
    assert not (fake.folder / "a").exists()


@pytest.mark.parametrize(("ssh", "message"), [
    ("No ED25519 host key is known for login and you have requested strict checking.\nHost key verification failed.",
     r"^host: the host key of login, .* log in once .* \(No ED25519 .*\)$"),
    ("@@@@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n@@@@@@@\nHost key verification failed.",
     r"^host: login has another host key .* \(WARNING: .* CHANGED!\)$"),
    ("alice@login: Permission denied (publickey).", "^identity_file: login requires a key"),
    ("ssh: Could not resolve hostname login: Name or service not known", "^host: cannot resolve the name of login"),
    ("ssh: connect to host login port 22: No route to host", "^host: login cannot be reached"),
])
def test_says_why_ssh_fails_in_one_line_and_leaves_nothing(fake, ssh, message):
    fake.ssh_says = ssh
    fails_and_leaves_nothing(fake, "read: Connection reset by peer", message)


@pytest.mark.parametrize(("sshfs", "message"), [
    ("alice@login:logs/: No such file or directory", "^folder: the folder alice@login:logs/ does not exist "),
    ("alice@login:logs/: Permission denied", "^folder: alice@login:logs/ may not be read "),
    ("fuse: failed to exec fusermount3: No such file or directory", "^path: FUSE .* install the package fuse3 "),
    ("fuse: device not found, try 'modprobe fuse' first", "^path: FUSE cannot be used here"),
    ("something\nnew", "^host: something new$"),
    ("hung", "^timeout: login has not accepted the login within 30 s$"),
])
def test_says_why_sshfs_fails_in_one_line_and_leaves_nothing(fake, sshfs, message):
    fails_and_leaves_nothing(fake, sshfs, message)


def fails_and_leaves_nothing(fake, sshfs, message):
    fake.sshfs_says = sshfs

    with pytest.raises(Failed, match=message) as failed:
        ensure(fake)
    assert "\n" not in str(failed.value)
    assert not (fake.folder / "a").exists() and not fake.mounts


def test_silence_is_told_too():
    assert explain("", "login", SOURCE) == "host: sshfs failed without a message"


@pytest.mark.parametrize(("given", "source", "options", "ssh"), [
    ({"user": None}, "login:logs/", [], ["login"]),
    ({"folder": "~"}, "alice@login:./", [], []),
    ({"folder": "~/my logs/"}, "alice@login:my logs/", [], []),
    ({"folder": "/"}, "alice@login:/", [], []),
    ({"folder": "-oProxyCommand=x,y"}, "alice@login:-oProxyCommand=x,y/", [], []),
    ({"host": "fe80::1"}, "alice@[fe80::1]:logs/", [], ["alice@fe80::1"]),
    ({"port": 2222}, SOURCE, ["port=2222"], ["-oPort=2222"]),
    ({"ssh_arguments": "-l bob -p 22", "port": 2222}, SOURCE, ["port=2222"], ["-oPort=2222"]),
    ({"ssh_arguments": "-J a,b@c:22 -oServerAliveInterval=9 -C"}, SOURCE,
     [r"ProxyJump=a\,b@c:22", "Compression=yes"], ["-oProxyJump=a,b@c:22", "-oCompression=yes"]),
    ({"ssh_arguments": "-J b", "proxy_jump": ["x@a", "[::1]:7"]}, SOURCE,
     [r"ProxyJump=x@a\,[::1]:7"], ["-oProxyJump=x@a,[::1]:7"]),
    ({"ssh_arguments": """-o 'identityfile "/a b,c"' -4 -A -o ControlPersist=60s"""}, SOURCE,
     [r'IdentityFile="/a b\,c"', "AddressFamily=inet"], ['-oIdentityFile="/a b,c"', "-oAddressFamily=inet"]),
    ({"options": {"follow_symlinks": True, "noexec": False, "compression": True, "dcache_timeout": 5}}, SOURCE,
     ["compression=yes", "dcache_timeout=5", "follow_symlinks"], []),
])
def test_follows_the_inventory(fake, given, source, options, ssh):
    usual, wanted = plan(settings(fake)), plan(settings(fake, **given))

    assert wanted.source == source
    assert [word for word in wanted.options if word not in usual.options] == options
    assert [word for word in wanted.ssh if word not in usual.ssh] == ssh
    assert try_command(wanted)[-3] == "--"


def test_reads_the_configuration_that_the_inventory_names(fake):
    config = fake.folder / "ssh_config,x"
    config.touch()

    for given in ({"ssh_arguments": f"-F {config}"}, {"ssh_config": str(config), "ssh_arguments": "-F /nowhere"}):
        wanted = plan(settings(fake, **given))
        assert wanted.options[:2] == ["-F", str(config)] and wanted.ssh[:2] == ["-F", str(config)]


def test_shares_a_connection_only_when_told(fake):
    assert not [word for word in plan(settings(fake, share_connection=True)).options if "Control" in word]


@pytest.mark.parametrize("text", ["-oProxyCommand=x", "a,-b", "a\nb", "a b", "$(x)", "{", "", "ä\tö", "a`b`", "a/b"])
@pytest.mark.parametrize("name", ["host", "user", "proxy_jump"])
def test_refuses_what_could_be_an_option_or_a_command(fake, name, text):
    with pytest.raises(Refused, match=f"^{name}: ") as refused:
        ensure(fake, **{name: [text] if name == "proxy_jump" else text})
    assert "\n" not in str(refused.value) and not fake.calls


@pytest.mark.parametrize(("given", "reason"), [
    ({"path": "logs"}, "^path: "),
    ({"path": "/a\nb"}, "^path: "),
    ({"path": "/"}, "^path: "),
    ({"folder": "a\nb"}, "^folder: "),
    ({"identity_file": '/a",ProxyCommand=x'}, "^identity_file: "),
    ({"identity_file": "/a%h"}, "^identity_file: "),
    ({"ssh_config": "/nowhere"}, "^ssh_config: the file '/nowhere' does not exist"),
    ({"ssh_config": "/etc/passwd; touch x"}, "^ssh_config: .* cannot be passed on by ssh"),
    ({"port": 0}, "^port: .*1 to 65535"),
    ({"timeout": 0}, "^timeout: 0 is too little"),
    ({"options": {"allow_other": True}}, "^options: 'allow_other' is not among .* auto_cache, compression,"),
    ({"options": {"ro,ssh_command": "x"}}, "^options: "),
    ({"options": {"dcache_timeout": "5,ssh_command=x"}}, "^options: dcache_timeout is '5,ssh_command=x'; allowed"),
    ({"options": {"compression": "maybe"}}, "^options: compression is 'maybe'; allowed is yes or no"),
    ({"ssh_arguments": "-o proxycommand=x"}, "^ssh_arguments: ProxyCommand runs a program"),
    ({"ssh_arguments": "-o LocalCommand=x"}, "^ssh_arguments: 'LocalCommand' is not among"),
    ({"ssh_arguments": "-o 'Port 22,ssh_command=x'"}, "^ssh_arguments: Port is"),
    ({"ssh_arguments": "-L 1:b:2"}, "^ssh_arguments: '-L' is not an ssh argument"),
    ({"ssh_arguments": "touch x"}, "^ssh_arguments: 'touch' is not an ssh argument"),
    ({"ssh_arguments": "-J -oProxyCommand=x"}, "^ssh_arguments: ProxyJump is"),
    ({"ssh_arguments": "'"}, "^ssh_arguments: .* cannot be split"),
])
def test_refuses_bad_input_before_anything_changes(fake, given, reason):
    with pytest.raises(Refused, match=reason) as refused:
        ensure(fake, **given)
    assert "\n" not in str(refused.value)
    assert not fake.calls and not (fake.folder / "a").exists()


def test_every_known_option_is_documented():
    for name in (*MOUNT_OPTIONS, *SSH_OPTIONS):
        assert f"C({name})" in sshfs_mount.DOCUMENTATION, name


class FakeMac(FakeMachine):
    """Programs print its tables, and umount needs no helper."""

    def machine(self):
        return super().machine()._replace(proc=self.folder / "none", fuse=self.folder / "none")

    def run(self, command, seconds):
        if command == ["mount"]:
            return 0, "".join(f"{each[1]} on {each[0]} (macfuse, mounted by alice)\n" for each in self.mounts)
        if command[0] == "ps":
            started = "Mon Nov 23 03:42:06 2026"
            return 0, "".join(f"{pid} {ME} S {started} {' '.join(words)}\n" for pid, words in self.processes())
        return super().run(command, seconds)

    def umount(self, command):
        return self.fusermount3([word.replace("-f", "-z") for word in command])


def test_on_macos(tmp_path, monkeypatch):
    monkeypatch.setattr(sshfs_mount, "PATIENCE", 0.01)
    fake = FakeMac(tmp_path.resolve())

    assert [ensure(fake)["changed"] for _run in range(2)] == [True, False]
    fake.end(101)
    assert ensure(fake)["found"] == "dead"
    fake.busy, fake.answer = True, "hung"
    assert [ensure(fake, state="unmounted")["changed"] for _run in range(2)] == [True, False]
    assert not fake.mounts and not (fake.folder / "a").exists()
    assert [os.path.basename(command[0]) for command in fake.calls] == ["sshfs", "umount", "sshfs", "umount", "umount"]
