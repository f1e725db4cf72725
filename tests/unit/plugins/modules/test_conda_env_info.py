# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda_env_info on environments that are complete, incomplete, damaged or missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import CondaError
from ansible_collections.mala.hpc_db.plugins.modules.conda_env_info import look

URL = "https://host/conda-forge/noarch/libpq-17.2-h_0.conda"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    metadata = tmp_path / "postgresql-17/conda-meta"
    metadata.mkdir(parents=True)
    record = {"name": "libpq", "version": "17.2", "build": "h_0", "url": URL, "sha256": "a" * 64}
    (metadata / "libpq-17.2-h_0.json").write_text(json.dumps(record))
    return metadata.parent


def test_packages_and_lock_file(prefix: Path) -> None:
    found = look(prefix)

    assert found["changed"] is False and found["packages"] == {"libpq": ["17.2", "h_0"]}
    assert found["lock"].endswith(f"@EXPLICIT\n{URL}#sha256:{'a' * 64}\n")


def test_no_environment_or_half_of_one(prefix: Path) -> None:
    prefix.with_name("postgresql-17.unfinished").touch()

    for path in (prefix, prefix / "missing"):
        assert look(path) == {"changed": False, "prefix": str(path), "packages": None, "lock": None}


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damage_is_told(prefix: Path, text: str) -> None:
    (prefix / "conda-meta/postgresql-17.2-h_0.json").write_text(text)

    with pytest.raises(CondaError, match="prefix: a file in .*/conda-meta is damaged; remove"):
        look(prefix)


def test_path_that_is_not_absolute() -> None:
    with pytest.raises(CondaError, match="prefix: 'here' is not absolute"):
        look(Path("here"))
