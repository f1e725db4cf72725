# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a role documents is what it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).parents[2] / "roles").iterdir() if path.is_dir())

pytestmark = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def read(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def documented(role: Path) -> dict[str, dict[str, Any]]:
    return read(role / "meta/argument_specs.yml")["argument_specs"]["main"].get("options", {})


def options_of(options: dict[str, dict[str, Any]], inside: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every option by its path, those of dictionaries and of lists of dictionaries too."""
    for name, option in options.items():
        yield inside + name, option
        yield from options_of(option.get("options", {}), f"{inside}{name}.")


def test_defaults_are_the_documented_ones(role: Path) -> None:
    options, defaults = documented(role), read(role / "defaults/main.yml")
    in_words = {name for name in defaults if "{{" in str(defaults[name]) and "default" not in options[name]}

    assert {name: value for name, value in defaults.items() if name not in in_words} == {
        name: option["default"] for name, option in options.items() if "default" in option
    }


def test_every_option_has_a_description_and_a_type(role: Path) -> None:
    for name, option in options_of(documented(role)):
        assert option.get("description"), name
        assert option.get("type"), name


def test_readme_exists(role: Path) -> None:
    assert (role / "README.md").is_file()
