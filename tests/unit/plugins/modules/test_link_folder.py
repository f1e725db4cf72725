# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""link_folder on real folders, with broken links."""

import os

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.link_folder import Failed, ensure_links


def links_of(folder):
    return {name: os.readlink(folder / name) for name in os.listdir(folder)} if folder.exists() else {}


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("before, wanted, changed", [
    ({}, {"a": "/x/it's a", "b c": "/y"}, True),
    ({"a": "/x"}, {"a": "/x"}, False),
    ({"a": "/x", "b": "/y"}, {"a": "/y"}, True),
    ({"a": "/x"}, {}, True),
    ({}, {}, False),
])
def test_only_the_wanted_links_are_there(before, wanted, changed, check_mode, tmp_path):
    folder = tmp_path / "root" / "logs"
    ensure_links({"path": str(folder), "links": before}, check_mode=False)

    result = ensure_links({"path": str(folder), "links": wanted}, check_mode)

    assert (result["changed"], result["before"]) == (changed, before)
    assert result["diff"] == {"before": before, "after": wanted}
    assert links_of(folder) == (before if check_mode else wanted)


def test_nobody_else_sees_them(tmp_path):
    ensure_links({"path": str(tmp_path / "logs"), "links": {"a": "/x"}}, check_mode=False)

    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("make", [
    lambda folder: (folder.mkdir(), (folder / "a").mkdir()), lambda folder: (folder.mkdir(), (folder / "b").touch()),
    lambda folder: folder.touch(),
])
def test_what_is_no_link_is_left_alone(make, tmp_path):
    make(tmp_path / "logs")

    with pytest.raises(Failed, match="^path: .* is no link; give a folder of links, or a new one$"):
        ensure_links({"path": str(tmp_path / "logs"), "links": {"a": "/x"}}, check_mode=False)

    assert (tmp_path / "logs").exists()


@pytest.mark.parametrize("path, links, message", [
    ("logs", {}, "path: 'logs' is not absolute"),
    ("/logs", {"a/b": "/x"}, "links: 'a/b' cannot be the name of a link"),
    ("/logs", {"..": "/x"}, "links: '..' cannot be"),
    ("/logs", {"": "/x"}, "links: '' cannot be"),
    ("/logs", {"a": "x"}, "links: a leads to 'x', which is not absolute"),
])
def test_bad_input_is_refused(path, links, message):
    with pytest.raises(Failed, match=f"^{message}"):
        ensure_links({"path": path, "links": links}, check_mode=False)
