# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lock files and minor updates, with a channel that gains a newer PostgreSQL meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import CondaError
from ansible_collections.mala.hpc_db.plugins.modules.conda_env import ensure_env, lock_of
from growing import GROW
from target import ROOT

FAKE = ROOT / "tests/unit/plugins/modules/fake_conda.py"
OLD, NEW = {"libpq": "17.9"}, {"libpq": "17.10"}


@pytest.fixture(scope="module")
def channel() -> Path:
    out = ROOT / ".cache/channel"
    subprocess.run([sys.executable, ROOT / "tests/channel/build.py", "--if-needed", out], check=True)
    return out


class Environment:
    """An environment from the growing channel, managed by one client."""

    def __init__(self, folder: Path, whole: Path, provider: str) -> None:
        self._whole, self._channel, self._provider = whole, folder / "growing", provider
        self.prefix = folder / "with a space" / "postgresql-17"
        self._client = folder / provider
        self._client.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{FAKE}' {provider} \"$@\"\n")
        self._client.chmod(0o755)
        self.publish(hidden="17.10")

    def publish(self, hidden: str) -> None:
        subprocess.run([sys.executable, "-c", GROW, self._whole, self._channel, hidden], check=True)

    def keep(self, check_mode: bool = False, **arguments: Any) -> dict:
        params = {
            "prefix": str(self.prefix), "specs": ["libpq=17"], "channels": [self._channel.as_uri()], "state": "present",
            "provider": "rattler" if self._provider == "rattler" else "conda", "rattler_python": sys.executable,
            "client": str(self._client), "module_load": None, "lock": None, "update": False,
            "lease": None, "archives": None, "host": None, "timeout": 300,
        }
        return ensure_env({**params, **arguments}, self._run, check_mode)

    @property
    def neighbours(self) -> list[str]:
        return sorted(os.listdir(self.prefix.parent)) if self.prefix.parent.exists() else []

    @property
    def lock(self) -> str:
        lock = lock_of({"prefix": str(self.prefix), "host": None})
        assert lock
        return lock

    def lock_of(self, *packages: str) -> str:
        """Return a lock file of those packages in the channel whose names begin with the given words."""
        paths = [path for name in packages for path in self._channel.glob(f"linux-64/{name}*")]
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        return "@EXPLICIT\n" + "".join(f"{path.as_uri()}#sha256:{of}\n" for path, of in zip(paths, sums))

    def files(self) -> dict[str, str]:
        """Return checksum and mode of every file, ignoring the times in conda's history."""
        paths = [path for path in self.prefix.rglob("*") if path.is_file() and path.name != "history"]
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mode:o}" for path in paths]
        return dict(zip((str(path.relative_to(self.prefix)) for path in paths), sums))

    def _run(self, command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        cache = f"{self._channel}.cache"
        environment = {**os.environ, "CONDA_PKGS_DIRS": f"{cache}/pkgs", "RATTLER_CACHE_DIR": cache}
        done = subprocess.run(
            command, pass_fds=pass_fds, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr


def without_records(files: dict[str, str]) -> dict[str, str]:
    return {name: of for name, of in files.items() if not name.startswith("conda-meta/")}


@pytest.mark.parametrize("provider", ["rattler", "conda"])
def test_updated_and_reproduced_byte_for_byte(tmp_path: Path, channel: Path, provider: str) -> None:
    env = Environment(tmp_path, channel, provider)
    assert env.keep()["packages"] == OLD
    solved, lock = env.files(), env.lock
    assert "lib/libpq.so.5.17" in solved
    (env.prefix / "keep").write_text("precious")
    env.publish(hidden="none")

    assert env.keep()["changed"] is False
    for check_mode in (True, False):
        updated = env.keep(check_mode, update=True)
        assert updated["changed"] and updated["packages"] == NEW
    assert env.keep(update=True)["changed"] is False
    with pytest.raises(CondaError, match="lock: it differs from .*, which has libpq 17.10 .*playbooks/update.yml"):
        env.keep(lock=lock)

    assert env.keep(lock=lock, update=True)["packages"] == OLD
    back = env.files()
    assert (env.prefix / "keep").read_text() == "precious" and back.pop("keep")
    assert without_records(back) == without_records(solved)
    assert env.lock == lock
    shutil.rmtree(env.prefix)
    assert env.keep(lock=lock)["packages"] == OLD
    assert env.files() == back
    assert env.keep(lock=lock)["changed"] is False
    assert env.neighbours == ["postgresql-17"]


def test_staged_for_a_host_that_reads_no_channel(tmp_path: Path, channel: Path) -> None:
    env = Environment(tmp_path, channel, "rattler")
    url, archives = f"{tmp_path.as_uri()}/growing", tmp_path / "archives"
    host = {
        "system": "Linux", "machine": "x86_64", "release": "4.18.0-553.el8", "glibc": "2.36", "packages": None,
        "satisfied": False,
    }

    def stage(**arguments: Any) -> dict:
        settings: dict = {"specs": ["postgresql=17"], "state": "staged", "archives": str(archives), "host": host}
        return env.keep(**{**settings, **arguments})

    with pytest.raises(CondaError, match=r"specs: nothing in .* it needs __glibc .*, and the host has glibc 2.17"):
        stage(host={**host, "glibc": "2.17"})
    with pytest.raises(CondaError, match="channels: cannot read file:///nowhere: "):
        stage(channels=["file:///nowhere"])
    assert stage(check_mode=True)["changed"] and not archives.exists()
    lock = stage()["lock"]
    times = {path.name: path.stat().st_mtime_ns for path in archives.iterdir()}
    assert sorted(name.rpartition("-")[0] for name in times) == ["libpq-17.9", "postgresql-17.9"]
    assert len(re.findall(rf"^{url}/linux-64/.*#sha256:", lock, re.MULTILINE)) == 2

    archive = archives / min(times)
    archive.write_bytes(archive.read_bytes()[:-1])  # this package is fetched again, the other one is not
    assert stage()["lock"] == lock
    assert [path.name for path in archives.iterdir() if path.stat().st_mtime_ns == times[path.name]] == [max(times)]

    shutil.rmtree(tmp_path / "growing")
    installed = env.keep(specs=["postgresql=17"], lock=lock, archives=str(archives))
    assert installed["changed"] and installed["version"] == "17.9" and "tls" in installed["features"]
    assert env.lock == lock  # with the channel's URLs
    found = env.keep(check_mode=True, specs=["postgresql=17"], archives=str(archives))
    held = {**host, "packages": found["installed"], "satisfied": found["satisfied"]}
    assert found["satisfied"] is True and found["lock"] == lock
    assert (stage(host=held)["changed"], stage(host=held)["lock"]) == (False, "")
    assert env.keep(specs=["postgresql=17"], archives=str(archives))["changed"] is False

    env.publish(hidden="none")
    unknown = {**held, "satisfied": False}
    assert (stage(host=unknown)["changed"], stage(host=unknown)["lock"]) == (False, "")
    updated = stage(host=held, update=True)
    assert updated["packages"] == {"libpq": "17.10", "postgresql": "17.10"}
    assert not any("17.9" in path.name for path in archives.iterdir())
    archive = next(archives.glob("libpq-*"))
    archive.write_bytes(b"")
    with pytest.raises(CondaError, match="lock: file://.*/libpq-17.10.* has the sha256 e3b0c442"):
        env.keep(specs=["postgresql=17"], lock=updated["lock"], archives=str(archives), update=True)


@pytest.mark.parametrize("provider", ["rattler", "conda", "micromamba"])
def test_damaged_lock_file_changes_nothing(tmp_path: Path, channel: Path, provider: str) -> None:
    env = Environment(tmp_path, channel, provider)
    lock = env.lock_of("libpq-17.9", "postgresql-17.9-relabelled_0")
    sums = re.findall(r"sha256:(\w+)", lock)

    for damaged, says in (
        (lock[:-10], "lock: line 3, '.*, is damaged"),
        (lock.replace(sums[0], "0" * 64), "lock: .*libpq-17.9"),
        (lock.replace("libpq-17.9", "libpq-17.8"), "lock: .*libpq-17.8"),
    ):
        with pytest.raises(CondaError, match=says) as refused:
            env.keep(lock=damaged)
        assert "\n" not in str(refused.value)
    if provider == "rattler":  # conda and mamba install a lock file without checking dependencies
        with pytest.raises(CondaError, match="lock: .*dependency 'libpq ==17.9', which is not in the environment"):
            env.keep(lock=env.lock_of("postgresql-17.9-relabelled_0"), specs=["postgresql=17"])
    assert env.neighbours == []


@pytest.mark.parametrize("provider", ["conda", "micromamba"])
def test_update_that_cannot_be_fetched_leaves_the_environment(tmp_path: Path, channel: Path, provider: str) -> None:
    env = Environment(tmp_path, channel, provider)
    env.keep()
    files = env.files()
    env.publish(hidden="none")
    newer = next((tmp_path / "growing").glob("linux-64/libpq-17.10-*"))
    whole = newer.read_bytes()
    newer.unlink()
    newer.write_bytes(whole[:-1000])

    with pytest.raises(CondaError, match="channels: cannot read "):
        env.keep(update=True)

    assert env.neighbours == ["postgresql-17"] and env.files() == files  # not marked as unfinished: a server may start
    newer.write_bytes(whole)
    assert env.keep(update=True)["packages"] == NEW


def test_cache_that_a_kill_has_left_is_mended_by_the_command_that_is_named(tmp_path: Path, channel: Path) -> None:
    env = Environment(tmp_path, channel, "conda")
    env.keep()
    lock = env.lock
    shutil.rmtree(env.prefix)
    os.truncate(next((tmp_path / "growing.cache/pkgs").glob("libpq-17.9-*/lib/libpq.so.5.17")), 9)

    with pytest.raises(CondaError, match=r"client: the client's cache .*; remove them .* again: rm -r ") as said:
        env.keep(lock=lock)

    assert env.neighbours == []
    subprocess.run(str(said.value).partition("again: ")[2], shell=True, check=True)
    assert env.keep(lock=lock)["packages"] == OLD
