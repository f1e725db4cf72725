# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""data_directory against an initdb that can be killed; tests/integration has the real one."""

import os
import subprocess

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.data_directory import (
    Failed,
    ensure_data_directory,
    initdb_command,
    run_command,
)


class FakePrograms:
    """Answers like postgres and initdb."""

    def __init__(self, version="17.10", killed=False):
        self.version, self.killed = version, killed
        self.calls = []

    def __call__(self, command):
        program = os.path.basename(command[0])
        self.calls.append(program)
        if program == "postgres":
            return f"postgres (PostgreSQL) {self.version}\n"
        path = next(word for word in command if word.startswith("--pgdata=")).partition("=")[2]
        os.mkdir(path)  # fails if the directory exists; initdb accepts only an empty one
        if self.killed:
            raise KeyboardInterrupt
        with open(os.path.join(path, "PG_VERSION"), "w", encoding="ascii") as stream:
            stream.write(self.version.partition(".")[0] + "\n")
        return ""


@pytest.fixture
def params(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "postgres").touch()
    return {"path": str(tmp_path / "data" / "17"), "bindir": str(tmp_path / "bin")}


def test_first_run_makes_it_and_the_second_nothing(params, tmp_path):
    programs = FakePrograms()

    first = ensure_data_directory(params, programs, check_mode=False)
    again = ensure_data_directory(params, programs, check_mode=False)

    assert (first["changed"], first["version"], first["major"]) == (True, "17.10", 17)
    assert first["diff"] == {"before": "", "after": f"{params['path']}\n"}
    unchanged = {"before": f"{params['path']}\n", "after": f"{params['path']}\n"}
    assert again == {**first, "changed": False, "diff": unchanged}
    assert programs.calls == ["postgres", "initdb", "postgres"]
    assert os.listdir(tmp_path / "data") == ["17"]


@pytest.mark.parametrize("installed, version", [(True, "17.10"), (False, None)])
def test_check_mode_makes_nothing(installed, version, params, tmp_path):
    if not installed:
        (tmp_path / "bin" / "postgres").unlink()
    programs = FakePrograms()

    result = ensure_data_directory(params, programs, check_mode=True)

    assert (result["changed"], result["version"]) == (True, version)
    assert "initdb" not in programs.calls
    assert not (tmp_path / "data").exists()


def test_interrupted_initdb_is_done_again(params, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ensure_data_directory(params, FakePrograms(killed=True), check_mode=False)
    assert not os.path.exists(params["path"])

    assert ensure_data_directory(params, FakePrograms(), check_mode=False)["changed"] is True
    assert os.listdir(tmp_path / "data") == ["17"]


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("found, version", [("15", "17.10"), ("17", "18.0"), ("9.6", "17.10"), ("", "17.10")])
def test_other_major_is_refused(found, version, check_mode, params):
    os.makedirs(params["path"])
    with open(os.path.join(params["path"], "PG_VERSION"), "w", encoding="ascii") as stream:
        stream.write(f"{found}\n")
    programs = FakePrograms(version)

    with pytest.raises(Failed, match=f"was made by PostgreSQL {found}, but .* contains {version}; nothing was changed"):
        ensure_data_directory(params, programs, check_mode)
    assert programs.calls == ["postgres"]


@pytest.mark.parametrize("make", [
    lambda path: os.makedirs(f"{path}/mine"), os.mkfifo, lambda path: os.symlink("nowhere", path),
])
def test_folder_of_somebody_else_is_refused(make, params):
    os.makedirs(os.path.dirname(params["path"]))
    make(params["path"])

    with pytest.raises(Failed, match="exists and is not a PostgreSQL data directory"):
        ensure_data_directory(params, FakePrograms(), check_mode=False)


def test_empty_folder_is_taken(params):
    os.makedirs(params["path"])

    assert ensure_data_directory(params, FakePrograms(), check_mode=False)["changed"] is True


def test_version_that_is_none_is_refused(params):
    with pytest.raises(Failed, match="printed 'bash: postgres: not found', which contains no version"):
        ensure_data_directory(params, lambda _command: "bash: postgres: not found\n", check_mode=False)


@pytest.mark.parametrize("major, builtin", [(16, False), (17, True), (18, True)])
def test_locale_never_depends_on_the_shell(major, builtin):
    command = initdb_command("/bin", "/data", major)

    assert {"--locale=C", "--encoding=UTF8", "--auth-local=peer", "--auth-host=scram-sha-256"} <= set(command)
    assert ("--locale-provider=builtin" in command) is builtin


class FakeModule:
    """The part of AnsibleModule's run_command that the module uses."""

    def run_command(self, command, **_options):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command, message", [
    (["/nowhere/initdb"], "^/nowhere/initdb: No such file or directory$"),
    (["sh", "-c", "echo a >&2; echo b >&2; exit 1"], "^sh failed: a b$"),
])
def test_failure_is_one_line(command, message):
    with pytest.raises(Failed, match=message):
        run_command(FakeModule(), command)
