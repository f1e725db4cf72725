# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""fingerprint, of settings and of a collection's files."""

from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.fingerprint import fingerprint

SETTINGS = {"server_chain": True, "postgres_major": 17}


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    (tmp_path / "roles/server/tasks").mkdir(parents=True)
    (tmp_path / "roles/server/tasks/main.yml").write_text("---\n")
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_is_the_same_for_the_same(collection: Path) -> None:
    before = fingerprint(SETTINGS, collection=collection)
    (collection / "docs/page.md").write_text("new\n")
    (collection / "roles/main.pyc").write_bytes(b"compiled")

    assert fingerprint(dict(reversed(SETTINGS.items())), collection=collection) == before


@pytest.mark.parametrize("name, text", [("roles/server/tasks/main.yml", "--- {}\n"), ("roles/server/new.yml", "---\n")])
def test_is_another_for_another_collection(collection: Path, name: str, text: str) -> None:
    before = fingerprint(SETTINGS, collection=collection)
    (collection / name).write_text(text)

    assert fingerprint(SETTINGS, collection=collection) != before


@pytest.mark.parametrize("settings", [
    {}, {**SETTINGS, "postgres_major": 18}, {**SETTINGS, "postgres_major": "17"},
    {**SETTINGS, "databases_workers": None},
])
def test_is_another_for_other_settings(collection: Path, settings: dict) -> None:
    assert fingerprint(settings, collection=collection) != fingerprint(SETTINGS, collection=collection)


def test_is_the_same_for_settings_without_effect(collection: Path) -> None:
    more = {**SETTINGS, "server_wait": False, "report_file": "x"}

    assert fingerprint(more, collection=collection) == fingerprint(SETTINGS, collection=collection)


def test_is_another_for_another_lock_file_or_python(collection: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "postgres_lock_file": "conda.lock"}
    found = [fingerprint(settings, str(tmp_path), collection=collection)]
    (tmp_path / "conda.lock").write_text("a")
    found.append(fingerprint(settings, str(tmp_path), collection=collection))
    (tmp_path / "conda.lock").write_text("b")
    found.append(fingerprint(settings, str(tmp_path), collection=collection))
    found.append(fingerprint(settings, str(tmp_path), "/usr/bin/python3", collection=collection))

    assert len(set(found)) == 4
