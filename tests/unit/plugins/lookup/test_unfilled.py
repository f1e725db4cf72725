# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lookup finds settings that are still to be filled in, and nothing else."""

import pytest
from ansible_collections.mala.hpc_db.plugins.lookup.unfilled import unfilled

SAYS = "FILL_IN must be replaced by your own value"


@pytest.mark.parametrize("variables, paths", [
    ({"server_job_options": {"account": "FILL_IN", "time": "1:00"}, "databases_workers": 3}, [
        "server_job_options.account"]),
    ({"databases_studies": [{"name": "a"}, {"name": "FILL_IN"}]}, ["databases_studies[1].name"]),
    ({"ansible_ssh_common_args": "-o ProxyJump=FILL_IN@gate", "ansible_user": "FILL_IN", "ansible_ssh_user": "FILL_IN"},
     ["ansible_ssh_common_args", "ansible_user"]),
    ({"hostvars": {"other": {"ansible_user": "FILL_IN"}}, "groups": {"FILL_IN": []}}, []),
    ({"instance_root": "{{ undefined_elsewhere }}/x", "ansible_user": "fill_in", "nothing": None}, []),
])
def test_names_each_setting(variables, paths, tmp_path):
    found = unfilled({**variables, "inventory_dir": str(tmp_path)})

    assert found == [f"{path}: {SAYS}, in the inventory" for path in paths]


@pytest.mark.parametrize("line, comment", [
    ("    account: FILL_IN # your project", ": your project"),
    ("  - account: 'FILL_IN'", ""),
])
def test_names_file_line_and_comment(line, comment, tmp_path, monkeypatch):
    (tmp_path / "group_vars").mkdir()
    file = tmp_path / "group_vars" / "all.yml"
    file.write_text(f"---\n# account: FILL_IN in a comment\nmy_account: FILL_IN\naccount: other\n{line}\n")
    variables = {"server_job_options": {"account": "FILL_IN"}, "inventory_dir": str(tmp_path)}

    (far,) = unfilled(variables)
    monkeypatch.chdir(tmp_path)
    (near,) = unfilled(variables)

    assert far == f"server_job_options.account: {SAYS}, in {file} line 5{comment}"
    assert near == f"server_job_options.account: {SAYS}, in group_vars/all.yml line 5{comment}"
