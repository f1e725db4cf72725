# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bars that remain readable in a log."""

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.gauge import gauge


@pytest.mark.parametrize("parts, total, expected", [
    (0, 10, "[----------]"), (3, 10, "[###-------]"), (10, 10, "[##########]"),
    (1, 1000, "[#---------]"), (999, 1000, "[#########-]"), (12, 10, "[##########]"),
    (5, 0, "[----------]"), (-1, 10, "[----------]"), (2.5, 10, "[##--------]"), ({}, 0, "[----------]"),
    ({"#": 30, ">": 9, "x": 1}, 40, "[#######>>x]"),
    ({"#": 0, ">": 1}, 1, "[>>>>>>>>>>]"),
    ({"#": 100000, ">": 1, "x": 1}, 100002, "[########>x]"),
    ({"#": 1, ">": 1, "x": 1}, 3, "[####>>>xxx]"),
    ({"#": 1, ">": 1}, 100, "[#>--------]"),
])
def test_bar(parts, total, expected):
    assert gauge(parts, total, 10) == expected


def test_a_bar_is_twenty_wide_unless_told():
    assert gauge(55, 100) == "[###########---------]"
