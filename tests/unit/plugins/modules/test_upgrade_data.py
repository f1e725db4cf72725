# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""upgrade_data on real directories; molecule/upgrade moves real studies."""

import collections
import json
import shutil
import sys

import pytest
from ansible_collections.mala.hpc_db.plugins.modules import upgrade_data as module
from ansible_collections.mala.hpc_db.plugins.modules.upgrade_data import Refused, ensure_major, last_words

Usage = collections.namedtuple("Usage", "total used free")
COMPARED = {"way": "pg_upgrade", "kept": "/old", "seconds": 1.5, "databases": {}}


@pytest.fixture
def root(tmp_path):
    """An instance directory whose studies are in PostgreSQL 17."""
    for folder in ("host", "bin", "data/17"):
        (tmp_path / folder).mkdir(parents=True)
    for name in module.PROGRAMS:
        (tmp_path / "bin" / name).touch()
    (tmp_path / "data" / "17" / "PG_VERSION").write_text("17\n")
    used = {"data": str(tmp_path / "data" / "17"), "bindir": str(tmp_path / "bin")}
    (tmp_path / "host" / "settings.json").write_text(json.dumps(used))
    return tmp_path


@pytest.fixture
def ensure(root):
    def ensure(major, check_mode=False, back=False):
        def run(command):
            ensure.calls.append(command)
            return json.dumps(COMPARED)

        ensure.calls = []
        params = {"root": str(root), "major": major, "back": back, "patience": 180}
        return ensure_major(params, run, check_mode)

    return ensure


@pytest.mark.parametrize("back, more", [(False, []), (True, ["--back"])])
def test_other_major_is_moved_by_the_hosting_program(back, more, ensure, root):
    result = ensure(18, back=back)

    assert ensure.calls == [[
        sys.executable, "-m", "hpc_db_host", "upgrade", f"--root={root}",
        f"--settings={root}/host/settings-18.json", "--lease-patience=180", *more,
    ]]
    assert result == {
        **COMPARED, "changed": True,
        "diff": {"before": "the studies are in PostgreSQL 17\n", "after": "the studies are in PostgreSQL 18\n"},
    }


def test_check_mode_says_the_same_and_runs_nothing(ensure, root):
    result = ensure(18, check_mode=True)

    assert (result["changed"], result["way"], result["kept"]) == (True, None, f"{root}/data/17")
    assert result["diff"] == ensure(18)["diff"]
    ensure(18, check_mode=True)
    assert ensure.calls == []


@pytest.mark.parametrize("check_mode", [False, True])
def test_wanted_major_is_left_alone(check_mode, ensure):
    result = ensure(17, check_mode)

    assert (result["changed"], result["way"], result["kept"], ensure.calls) == (False, None, None, [])
    assert result["diff"]["before"] == result["diff"]["after"]


def test_older_major_is_gone_back_to_only_if_it_was_kept(ensure, root):
    with pytest.raises(Refused, match="^postgres_major: 16 is not allowed; .* no data directory of 16 was kept$"):
        ensure(16)

    (root / "data" / "16").mkdir()
    (root / "data" / "16" / "PG_VERSION").write_text("16\n")

    assert ensure(16)["changed"] is True


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "bin" / "psql").unlink(), "/bin no longer has psql, .* hpc_db.yml and postgres_major=17$"),
    (lambda root: (root / "host" / "settings.json").unlink(), "settings.json is missing; run the playbook hpc_db.yml"),
    (lambda root: (root / "host" / "settings.json").write_text("{"), "settings.json is missing"),
    (lambda root: shutil.rmtree(root / "data"), "data/17 is not a PostgreSQL data directory"),
])
def test_what_cannot_end_well_is_refused(spoil, message, check_mode, ensure, root):
    spoil(root)

    with pytest.raises((Refused, FileNotFoundError), match=message):
        ensure(18, check_mode)
    assert ensure.calls == []


@pytest.mark.parametrize("more, fits", [(0, True), (-1, False)])
def test_space_for_a_copy_is_needed(more, fits, ensure, root, monkeypatch):
    (root / "data" / "17" / "base").mkdir()
    (root / "data" / "17" / "base" / "1").write_bytes(b"x" * 1_000_000)
    free = module.NEW_BYTES + 1_000_003 + more
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, free))

    if fits:
        assert ensure(18)["changed"] is True
    else:
        with pytest.raises(Refused, match="cannot be copied: that takes 96 MB, and 96 MB are free"):
            ensure(18)


@pytest.mark.parametrize("stderr, told", [
    ("2026-11-22T20:00:00 starting: asking\n2026-11-22T20:00:01 failed: pg_upgrade: no\n", "pg_upgrade: no"),
    ("2026-11-22T20:00:00 ended: stopped by SIGTERM\n", "2026-11-22T20:00:00 ended: stopped by SIGTERM"),
    ("", "no error message"),
])
def test_last_words(stderr, told):
    assert last_words(stderr) == told
