# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings have their types, whichever ansible-core has written them, and each has a default."""

import json

import pytest
from hpc_db_host.settings import DEFAULTS, complete, read_settings


def test_numbers_may_be_text():
    found = complete({"lease_ttl": "30", "restarts": "2", "stop_notice": 60, "dump_minutes": None, "port": "5432"})

    assert (found["lease_ttl"], found["restarts"], found["stop_notice"], found["dump_minutes"]) == (30.0, 2, 60, 60.0)
    assert found["port"] == "5432"  # without a default: the reader of the setting has one
    assert set(found) == {*DEFAULTS, "port"}


def test_file_is_read_with_its_folder(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "settings.json").write_text(json.dumps({"bindir": "/opt/bin", "chain": True}))

    found = read_settings(str(tmp_path))

    assert (found["root"], found["bindir"], found["chain"], found["pooler"]) == (str(tmp_path), "/opt/bin", True, {})


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_instance_that_is_not_there_is_named(content, tmp_path):
    (tmp_path / "host").mkdir()
    if content:
        (tmp_path / "host" / "settings.json").write_text(content)

    with pytest.raises(FileNotFoundError, match="/host/settings.json is missing; run the playbook hpc_db.yml first$"):
        read_settings(str(tmp_path))
