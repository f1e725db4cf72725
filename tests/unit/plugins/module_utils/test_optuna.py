# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Optuna's files and rows; the integration tests have real ones."""

from __future__ import annotations

import math

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils import _optuna
from ansible_collections.mala.hpc_db.plugins.module_utils.host import optuna_schema

CHAIN = [
    'revision = "v0.9.0.a"\ndown_revision = None\n',
    '# revision identifiers, used by Alembic.\nrevision = "v3.0.0.d"\ndown_revision = "v0.9.0.a"\n',
    "revision: str = 'v3.2.0.a'\ndown_revision: str | None = 'v3.0.0.d'\nbranch_labels = None\n",
]
OPTUNA = optuna_schema.Optuna("5.0.0", ["v3.2.0.a", "v3.0.0.d", "v0.9.0.a"])


@pytest.mark.parametrize("steps", [CHAIN, CHAIN[::-1], [CHAIN[1], CHAIN[2], CHAIN[0], "# nothing\n"]])
def test_revisions_come_in_their_order_not_the_files(steps: list[str]) -> None:
    assert optuna_schema.newest_first(steps) == OPTUNA.revisions


@pytest.mark.parametrize("held, value", [
    ('{"a": [Infinity, "\\ud800"]}', {"a": [math.inf, "\ud800"]}), ("1", 1), ('"x"', "x"), ("", ""), ("{cut", "{cut"),
    (None, None), ("[" * 100000, "[" * 100000),
])
def test_attribute_that_is_no_json_is_the_text_that_is_there(held: str, value: object) -> None:
    assert _optuna.attribute(held) == value


def test_no_revisions_leave_the_judgement_to_optuna() -> None:
    unknown = optuna_schema.Optuna("9.0.0", optuna_schema.newest_first([]))

    assert not _optuna.mismatch("mala", optuna_schema.Schema("5.0.0", "v3.2.0.a"), unknown)


@pytest.mark.parametrize("revision, older, newer", [
    ("v3.2.0.a", False, False), ("v3.0.0.d", True, False), ("v0.9.0.a", True, False), ("v6.0.0.a", False, True),
])
def test_schema_is_older_or_newer(revision: str, older: bool, newer: bool) -> None:
    schema = optuna_schema.Schema("x", revision)

    assert (optuna_schema.is_older(schema, OPTUNA), optuna_schema.is_newer(schema, OPTUNA)) == (older, newer)
    assert bool(_optuna.mismatch("mala", schema, OPTUNA)) is (older or newer)


@pytest.mark.parametrize("ahead, steps, all_steps, version, says", [
    (0.0, 0, 0, "5.0.0", ""),
    (-3600.0, 0, 0, "5.0.0", ""),
    (299.0, 0, 0, "5.0.0", ""),  # the nodes' clocks may differ by that
    (7200.0, 0, 0, "5.0.0", "2.0 h ahead of UTC"),
    (7200.0, 0, 0, "4.9.0", ""),  # these versions write local time
    (7200.0, 3, 4, "4.9.0", "3 trials began half an hour or more before"),
    (7200.0, 3, 3, "5.0.0", "3 trials began half an hour or more before"),
    (0.0, 2, 2, "5.0.0", ""),  # few enough to be chance
    (0.0, 7, 100, "5.0.0", ""),  # trials that waited, for example after their job had hit its walltime
])
def test_mixed_clocks_are_warned_about(ahead: float, steps: int, all_steps: int, version: str, says: str) -> None:
    told = _optuna.clock_warnings("mala", [("be", ahead, steps, all_steps)], OPTUNA._replace(version=version))

    assert len(told) == bool(says)
    assert all(says in line and line.startswith("study be in database mala: ") for line in told)
