# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where log folders are on the workstation."""

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.log_folders import log_folders

FOUND = [
    {"item": {"name": "be", "path": "~/be"}, "stat": {"path": "/home/alice/be"}},
    {"item": {"name": "al", "path": "/al"}, "stat": {"path": "/al"}},
]


@pytest.mark.parametrize("method, folder", [("mount", "mounts"), ("copy", "copies")])
def test_folders_are_brought_to_the_workstation(method, folder):
    found = log_folders(FOUND, {"local": False}, method, "/r")

    assert found["links"] == {"be": f"/r/{folder}/be", "al": f"/r/{folder}/al"}
    assert found.pop(method) == [
        {"name": "be", "src": "/home/alice/be", "dest": f"/r/{folder}/be"},
        {"name": "al", "src": "/al", "dest": f"/r/{folder}/al"},
    ]
    assert [found[other] for other in ("mount", "copy") if other in found] == [[]]


@pytest.mark.parametrize("method", ["mount", "copy"])
def test_on_the_cluster_folders_are_used_in_place(method):
    assert log_folders(FOUND, {"local": True}, method, "/r") == {
        "links": {"be": "/home/alice/be", "al": "/al"}, "mount": [], "copy": [],
    }
