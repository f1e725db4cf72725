# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda_env with a lock file and as an update, in a channel that gets a newer PostgreSQL meanwhile."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.conda_env_info import look
from test_conda_env import Site, channel, make_site  # noqa: F401 - a fixture

OLD, NEW = {"postgresql": "17.9", "libpq": "17.9"}, {"postgresql": "17.10", "libpq": "17.10"}
PROVIDERS = pytest.mark.parametrize("provider", ["rattler", "conda", "micromamba"])


class GrowingChannel:
    """The local channel, at first without its newest minor version."""

    def __init__(self, folder: Path, whole: Path) -> None:
        self.folder = folder
        self._repodata = json.loads((whole / "linux-64/repodata.json").read_text())
        shutil.copytree(whole / "noarch", folder / "noarch")
        (folder / "linux-64").mkdir()
        for package in (whole / "linux-64").glob("*.tar.bz2"):
            (folder / "linux-64" / package.name).symlink_to(package)
        self.publish(lambda record: record["version"] != "17.10")

    def publish(self, is_there: object = lambda _record: True) -> None:
        packages = {name: record for name, record in self._repodata["packages"].items() if is_there(record)}
        (self.folder / "linux-64/repodata.json").write_text(json.dumps({**self._repodata, "packages": packages}))


@pytest.fixture
def growing(tmp_path: Path, channel: str) -> GrowingChannel:  # noqa: F811
    return GrowingChannel(tmp_path / "growing", Path(channel.removeprefix("file://")))


def site_of(tmp_path: Path, growing: GrowingChannel, provider: str) -> Site:
    return make_site(tmp_path, growing.folder.as_uri(), provider)


def tree(prefix: Path) -> dict[str, str]:
    """Return the checksum and mode of every file, but for the times in the history."""
    return {
        str(path.relative_to(prefix)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.lstat().st_mode:o}"
        for path in prefix.rglob("*")
        if path.is_file() and path.relative_to(prefix) != Path("conda-meta/history")
    }


@PROVIDERS
def test_reproduced_byte_for_byte(tmp_path: Path, growing: GrowingChannel, provider: str) -> None:
    site = site_of(tmp_path, growing, provider)
    assert site.run({})[0]["packages"] == OLD
    lock = look(site.prefix)["lock"]
    remove = {"state": "absent"}

    _removed, made = site.run(remove, {"lock": lock})
    once = tree(site.prefix)
    growing.publish()
    _removed, again, same = site.run(remove, {"lock": lock}, {"lock": lock})

    assert made["packages"] == again["packages"] == OLD
    assert tree(site.prefix) == once
    assert "bin/postgres" in once and site.psql_version().startswith("psql")
    assert same["changed"] is False
    assert site.neighbours() == ["postgresql-17"]


@PROVIDERS
def test_damaged_lock_file_changes_nothing(tmp_path: Path, growing: GrowingChannel, provider: str) -> None:
    site = site_of(tmp_path, growing, provider)
    site.run({})
    lock = look(site.prefix)["lock"]
    sums = re.findall(r"sha256:(\w+)", lock)
    other_bytes = lock.replace(sums[0], "0" * 64)
    elsewhere = lock.replace("libpq-17.9", "libpq-17.8")
    site.run({"state": "absent"})

    *early, mismatch, missing = site.run(
        {"lock": lock[:-10]}, {"lock": lock.replace("@EXPLICIT", "")}, {"lock": lock, "specs": ["postgresql=18"]},
        {"lock": other_bytes}, {"lock": elsewhere},
    )

    assert [result["msg"].partition(", '")[0] for result in early] == [
        "lock: line 5", "lock: it has no line @EXPLICIT, so it is no lock file, or only a part of one",
        "lock: it holds postgresql 17.9, but postgresql=18 is wanted",
    ]
    assert re.match("lock: .*libpq-17.9.*" + "0" * 64, mismatch["msg"])
    assert re.match("lock: .*libpq-17.8", missing["msg"])
    assert not any("\n" in result["msg"] for result in (*early, mismatch, missing))
    assert site.neighbours() == []


def test_lock_file_without_a_dependency_changes_nothing(tmp_path: Path, growing: GrowingChannel) -> None:
    site = site_of(tmp_path, growing, "rattler")
    site.run({})
    lock = re.sub(r".*/libpq-.*\n", "", look(site.prefix)["lock"])
    site.run({"state": "absent"})

    (refused,) = site.run({"lock": lock})

    assert re.match("lock: .*dependency 'libpq ==17.9', which is not in the environment", refused["msg"])
    assert site.neighbours() == []


@PROVIDERS
def test_only_an_update_brings_another_lock_file(tmp_path: Path, growing: GrowingChannel, provider: str) -> None:
    site = site_of(tmp_path, growing, provider)
    site.run({})
    old = look(site.prefix)["lock"]
    growing.publish()
    site.run({"update": True})
    new, before = look(site.prefix)["lock"], tree(site.prefix)

    refused, planned = site.run({"lock": old}, {"lock": old, "update": True, "check": True})

    assert refused["msg"].startswith(f"lock: it differs from {site.prefix}, which has libpq 17.10 ")
    assert "playbooks/update.yml" in refused["msg"]
    assert planned["changed"] and planned["packages"] == OLD
    assert tree(site.prefix) == before

    back, forth = site.run({"lock": old, "update": True}, {"lock": new, "update": True})
    assert back["changed"] and back["packages"] == OLD
    assert forth["changed"] and forth["packages"] == NEW


@PROVIDERS
def test_minor_update(tmp_path: Path, growing: GrowingChannel, provider: str) -> None:
    site = site_of(tmp_path, growing, provider)
    made, none_yet = site.run({}, {"update": True})
    assert made["packages"] == OLD and none_yet["changed"] is False
    (site.prefix / "keep").write_text("precious")
    growing.publish()

    kept, planned, updated, again = site.run({}, {"update": True, "check": True}, {"update": True}, {"update": True})

    assert kept["changed"] is False and kept["packages"] == OLD
    for result in (planned, updated):
        assert result["changed"] and result["packages"] == NEW
        assert '-    "postgresql": "17.9 ' in result["shown"] and '+    "postgresql": "17.10 ' in result["shown"]
    assert again["changed"] is False
    assert site.psql_version() == "psql (PostgreSQL) 17.10"
    assert (site.prefix / "keep").read_text() == "precious"


def test_update_never_goes_back(tmp_path: Path, growing: GrowingChannel) -> None:
    site = site_of(tmp_path, growing, "rattler")
    growing.publish()
    site.run({})
    growing.publish(lambda record: record["version"] != "17.10")

    (refused,) = site.run({"update": True})

    assert re.match(r"specs: nothing in file://.* satisfies postgresql=17 .*postgresql>=17.10: ", refused["msg"])
    assert site.psql_version() == "psql (PostgreSQL) 17.10"
