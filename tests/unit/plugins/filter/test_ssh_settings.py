# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ssh_settings, from the variables of a host."""

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.ssh_settings import ssh_settings

BARE = {
    "local": False, "program": "ssh", "host": "hemera5", "user": None, "port": None, "identity_file": None,
    "arguments": "",
}


@pytest.mark.parametrize("given, expected", [
    ({}, {}),
    ({"ansible_connection": "local"}, {"local": True}),
    ({"ansible_connection": "ansible.builtin.local"}, {"local": True}),
    ({"ansible_connection": "ssh"}, {}),
    ({"ansible_host": "hemera5.fz-rossendorf.de"}, {"host": "hemera5.fz-rossendorf.de"}),
    ({"ansible_user": "alice", "ansible_ssh_user": "bob"}, {"user": "alice"}),
    ({"ansible_ssh_user": "bob"}, {"user": "bob"}),
    ({"ansible_port": 2222}, {"port": 2222}),
    ({"ansible_private_key_file": "~/.ssh/hpc"}, {"identity_file": "~/.ssh/hpc"}),
    ({"ansible_ssh_private_key_file": "~/.ssh/hpc"}, {"identity_file": "~/.ssh/hpc"}),
    ({"ansible_ssh_executable": "/opt/ssh"}, {"program": "/opt/ssh"}),
    (
        {"ansible_ssh_extra_args": "-4\n", "ansible_ssh_args": "-F other", "ansible_ssh_common_args": "-J gate"},
        {"arguments": "-F other -J gate -4"},
    ),
])
def test_gathers_what_is_given(given: dict, expected: dict) -> None:
    assert ssh_settings({"inventory_hostname": "hemera5", **given}) == {**BARE, **expected}
