# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/security.md must name every part of Optuna that unpickles data from the storage."""

from __future__ import annotations

import ast
from pathlib import Path

import optuna

ROOT = Path(__file__).resolve().parents[2]


def unpickles(code: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Attribute) and part.attr in ("load", "loads", "Unpickler")
        and isinstance(part.value, ast.Name) and part.value.id in ("pickle", "cloudpickle", "dill", "joblib")
        for part in ast.walk(code)
    )


def test_page_names_every_sampler_and_pruner_that_unpickles() -> None:
    folder = Path(optuna.__file__).parent
    found = {
        part.name
        for kind in ("samplers", "pruners", "terminator", "importance")
        for path in (folder / kind).rglob("*.py")
        for part in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(part, ast.ClassDef) and unpickles(part)
    }
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")

    assert "CmaEsSampler" in found
    assert [name for name in sorted(found) if f"`{name}`" not in page] == []
