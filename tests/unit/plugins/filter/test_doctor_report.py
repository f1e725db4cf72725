# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The doctor's findings by place; a job without an answer is a problem."""

import json

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.doctor_report import doctor_report

OK = {"state": "ok", "check": "root", "said": "private", "mend": ""}
FOUND = {"state": "found", "check": "log", "said": "damaged", "mend": "restore.yml"}
HERE = "Welcome to mini\n" + json.dumps({"host": "login", "server": [OK, FOUND], "here": [OK]})


@pytest.mark.parametrize("job, names, found", [
    (None, ["the server", "login node login"], [FOUND]),
    ({"answer": {"host": "c1", "here": [OK]}, "said": ""}, ["the server", "login node login", "compute node c1"],
     [FOUND]),
    ({"answer": {"host": "c1", "here": [FOUND]}, "said": ""}, ["the server", "login node login", "compute node c1"],
     [FOUND, FOUND]),
])
def test_findings_are_by_place(job, names, found):
    report = doctor_report(HERE, job, 120)

    assert [part["name"] for part in report["parts"]] == names
    assert [part["findings"] for part in report["parts"]][:2] == [[OK, FOUND], [OK]]
    assert report["found"] == found


def test_job_without_an_answer_is_a_problem():
    report = doctor_report(HERE, {"answer": None, "said": "it did not start within 120 s"}, 120)

    assert report["parts"][2] == {"name": "compute node ", "findings": [report["found"][1]]}
    assert report["found"][1] == {
        "state": "found", "check": "job", "said": "nothing was checked: it did not start within 120 s",
        "mend": "doctor_job_options (another partition), doctor_timeout (120), or server_python",
    }
