# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""instance, on real directories and as an ordinary user."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.instance import Refused, ensure_instance

NOBODY = 65534


@pytest.fixture
def folder():
    """A folder of the user who runs the test, who must not be root."""
    folder = tempfile.mkdtemp(prefix="instance-")
    was_root = os.geteuid() == 0
    if was_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield Path(folder)
    if was_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def run(command):
    """Like the module's own run: return exit code and error output."""
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    return done.returncode, done.stderr


def ensure(root, check_mode=False, directories=(), files=(), uid=None):
    files = [{"mode": "0600", "validate": [], **file} for file in files]
    params = {"root": str(root), "directories": list(directories), "files": files}
    return ensure_instance(params, run, check_mode, os.geteuid() if uid is None else uid)


def look(folder):
    """Return path, permissions and text of every file."""
    found: dict[str, object] = {".": oct(folder.stat().st_mode & 0o777)}
    for path in sorted(folder.rglob("*")):
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else None
        found[str(path.relative_to(folder))] = (oct(path.lstat().st_mode & 0o777), text)
    return found


WANTED: dict[str, list] = {
    "directories": ["conf", "host", "host/hpc_db_host"],
    "files": [
        {"path": "conf/a.conf", "content": "a = 1\n"},
        {"path": "host/job.sh", "content": "#!/bin/sh\n", "mode": "0700"},
    ],
}


def test_first_run_makes_everything_private_and_the_second_nothing(folder):
    root = folder / "new" / "hpc_db"

    first = ensure(root, **WANTED)
    made = look(root)

    assert made == {
        ".": "0o700", "run": ("0o700", None), "conf": ("0o700", None), "conf/a.conf": ("0o600", "a = 1\n"),
        "host": ("0o700", None), "host/hpc_db_host": ("0o700", None), "host/job.sh": ("0o700", "#!/bin/sh\n"),
    }
    assert (first["changed"], first["root"]) == (True, str(root))
    assert first["changed_files"] == ["conf/a.conf", "host/job.sh"]

    again = ensure(root, **WANTED)

    assert (again["changed"], again["changed_files"], again["diff"]) == (False, [], [])
    assert look(root) == made


@pytest.mark.parametrize("check_mode", [False, True])
def test_files_are_not_open_to_others(check_mode, folder):
    root = folder / "hpc_db"
    ensure(root, directories=["secrets", "host"])
    (root / "secrets" / "pgpass").write_text("*:*:*:study:secret\n")
    (root / "secrets" / "pgpass").chmod(0o640)
    (root / "host" / "job.sh").touch(0o700)
    (root / "host" / "link").symlink_to("job.sh")
    before = look(root)

    result = ensure(root, check_mode, directories=["secrets", "host"])

    assert (result["changed"], result["changed_files"]) == (True, [])
    assert [diff["before_header"] for diff in result["diff"]] == [str(root / "secrets" / "pgpass")]
    closed = {**before, "secrets/pgpass": ("0o600", "*:*:*:study:secret\n")}
    assert look(root) == (before if check_mode else closed)
    assert ensure(root, check_mode, directories=["secrets", "host"])["changed"] is check_mode


def test_check_mode_says_the_same_and_changes_nothing(folder):
    root = folder / "hpc_db"
    planned = ensure(root, check_mode=True, **WANTED)
    assert look(folder) == {".": "0o700"}

    assert planned == ensure(root, **WANTED)


@pytest.mark.parametrize("before, mode, changed", [
    (b"a = 1\n", 0o600, False),
    (b"a = 1\n", 0o644, True),
    (b"a = 2\n", 0o600, True),
    (b"a = 1\r\n", 0o600, True),
    (b"a = 1", 0o600, True),
    (b"\xff\xfe", 0o600, True),
])
@pytest.mark.parametrize("check_mode", [False, True])
def test_only_what_differs_is_written(before, mode, changed, check_mode, folder):
    ensure(folder, directories=["conf"])
    path = folder / "conf" / "a.conf"
    path.write_bytes(before)
    path.chmod(mode)
    inode = path.stat().st_ino

    result = ensure(folder, check_mode, files=WANTED["files"][:1])

    assert (result["changed"], result["changed_files"]) == (changed, ["conf/a.conf"] * changed)
    assert (path.stat().st_ino != inode) is (changed and not check_mode)
    assert path.read_bytes() == (before if check_mode else b"a = 1\n")
    assert sorted(os.listdir(folder / "conf")) == ["a.conf"]


def test_folder_that_others_could_enter_is_closed(folder):
    ensure(folder)
    for path in (folder, folder / "run"):
        path.chmod(0o755)

    assert ensure(folder)["changed"] is True
    assert look(folder) == {".": "0o700", "run": ("0o700", None)}


@pytest.mark.parametrize("prepare, root, uid, message", [
    (None, "x", 0, "instance: the owner is root.*set ansible_user"),
    (None, "a\nb", None, r"instance_root: .* contains '\\n'"),
    (None, "a$(id)", None, r"contains '\$'"),
    (None, "a'b", None, 'contains "\'"'),
    (None, 'a"b', None, "contains '\"'"),
    (None, "a{b", None, "contains '{'"),
    (None, "a%b", None, "contains '%'"),
    (lambda folder: (folder / "conda-meta").mkdir(), "x/y", None, "lies inside the conda environment"),
    (lambda folder: (folder / "x").write_text(""), "x", None, "is not a directory"),
    (lambda folder: (folder / "x").symlink_to("nowhere"), "x", None, "is not a directory"),
    (lambda folder: (folder / "mine").write_text(""), ".", None, "contains other files"),
    (None, ".", 4711, "belongs to another user"),
])
def test_refusals_are_one_line_and_change_nothing(prepare, root, uid, message, folder):
    if prepare:
        prepare(folder)
    before = look(folder)

    with pytest.raises(Refused, match=message) as refused:
        ensure(folder / root, uid=uid, **WANTED)

    assert "\n" not in str(refused.value)
    assert look(folder) == before


@pytest.mark.parametrize("name", ["with space", "a,b=c@d+e", "-x", "j\u00fcrgen"])
def test_unusual_names_are_taken_as_they_are(name, folder):
    assert ensure(folder / name)["root"] == str(folder / name)
    assert look(folder / name) == {".": "0o700", "run": ("0o700", None)}


def judge(script):
    return ["/bin/sh", "-c", script, "sh", "{file}", "{scratch}"]


def test_file_is_judged_aside_before_it_is_replaced(folder):
    script = 'test "$(cat "$1")" = new && test -z "$(ls "$2")" && test "$(stat -c %a "$2")" = 700'
    ensure(folder, files=[{"path": "a", "content": "new", "validate": judge(script)}])

    assert (folder / "a").read_text() == "new"


@pytest.mark.parametrize("check_mode", [False, True])
def test_one_refused_file_keeps_all_as_they_are(check_mode, folder):
    ensure(folder)
    before = look(folder)
    script = r'printf "%s\n" "x LOG:  unknown parameter \"shared_bufers\" in $1" "x FATAL:  errors" >&2; exit 1'

    with pytest.raises(Refused) as refused:
        ensure(folder, check_mode, files=[
            {"path": "good", "content": "good"},
            {"path": "conf", "content": "bad", "validate": judge(script)},
        ])

    assert str(refused.value) == 'conf: unknown parameter "shared_bufers" in conf'
    assert look(folder) == before


@pytest.mark.parametrize("validate", [["/nowhere/postgres", "{file}"], judge("exit 1")])
def test_unchanged_or_unjudgeable_files_are_not_judged(validate, folder):
    ensure(folder, files=[{"path": "a", "content": "new"}])
    content = "newer" if validate[0] == "/nowhere/postgres" else "new"

    ensure(folder, files=[{"path": "a", "content": content, "validate": validate}])

    assert (folder / "a").read_text() == content


def test_major_of_the_studies_is_that_of_the_data_directory_in_use(folder):
    def make(name, version):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "PG_VERSION").write_text(version)

    assert ensure(folder)["major"] is None
    make("17", "17\n")
    (folder / "data" / "18").mkdir()  # initdb was killed
    make("18.new", "18\n")
    assert ensure(folder, check_mode=True)["major"] == 17

    make("19", "19\n")
    (folder / "host").mkdir()
    for used, major in (("17", 17), ("19", 19), ("20", None)):
        (folder / "host" / "settings.json").write_text(json.dumps({"data": str(folder / "data" / used)}))
        assert ensure(folder)["major"] == major


@pytest.mark.parametrize("number", ["EPERM", "EOPNOTSUPP", "ENOSYS", None])
def test_file_system_without_hard_links_is_refused_before_anything_is_made(number, folder, monkeypatch):
    def link(source, target):
        if number:
            raise OSError(getattr(errno, number), "no")
        shutil.copy(source, target)

    monkeypatch.setattr(os, "link", link)
    root = folder / "new" / "hpc_db"

    with pytest.raises(Refused) as refused:
        ensure(root, **WANTED)

    assert str(refused.value) == (
        f"instance_root: {root} is on a file system without hard links; choose a folder on another one"
    )
    assert list(folder.iterdir()) == []


def test_links_are_tried_once(folder, monkeypatch):
    ensure(folder / "hpc_db", **WANTED)
    monkeypatch.delattr(os, "link")

    assert not ensure(folder / "hpc_db", **WANTED)["changed"]
