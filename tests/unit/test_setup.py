# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options that tools/setup uses exist in the pip that comes with an old Python."""

from __future__ import annotations

import re
from pathlib import Path

SETUP = (Path(__file__).resolve().parents[2] / "tools" / "setup").read_text()
# From ``pip install --help`` and ``pip download --help`` of pip 20.3.4, which Debian 11 puts into new environments.
OF_BOTH = "-q --requirement -r --no-deps --no-binary --only-binary --no-build-isolation --no-index --find-links".split()
OLD_PIP = {
    "install": {*OF_BOTH, "--editable", "--force-reinstall", "--target", "--upgrade"},
    "download": {*OF_BOTH, "--dest", "-d", "--platform", "--python-version", "--implementation", "--abi"},
}


def test_old_pip_knows_all_options() -> None:
    calls = re.findall(r"^ *(?:\[\[.*\]\] \|\| )?pip \S+ (install|download) (.*(?:\\\n.*)*)", SETUP, re.MULTILINE)
    assert len(calls) >= 8
    for verb, arguments in calls:
        used = set(re.findall(r"(?<= )--?[a-z-]+", f" {arguments}".replace("-qq", "-q")))
        assert used <= OLD_PIP[verb], (verb, used - OLD_PIP[verb])


def test_no_pip_is_called_as_its_user_has_set_it_up() -> None:
    assert not re.search(r"-m pip|bin/pip", SETUP)


def test_old_pip_is_replaced_before_a_project_without_setup_py_is_installed() -> None:
    assert SETUP.count("--editable") == 1
    assert re.search(r'install -qq "pip>=21\.3" && pip \S+ install -qq "\$\{@:4\}"', SETUP)
