# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first suitable Python of a login node is chosen; a login banner is none."""

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.pythons import pythons


@pytest.mark.parametrize("lines, found, chosen", [
    ([], [], ""),
    (["Welcome!", "python 2.7.5 /usr/bin/python", "pythons 3.11.2 /x"], [], ""),
    (["python 3.6.8 /usr/bin/python3", "python 3.8.1 /opt/python3"], ["3.6.8 /usr/bin/python3", "3.8.1 /opt/python3"],
     ""),
    (["python 3.6.8 /usr/bin/python3", "python 3.9.0 /opt/my python/bin/python3", "python 3.14.1 /usr/bin/python3.14",
      "python 3.6.8 /usr/bin/python3"],
     ["3.6.8 /usr/bin/python3", "3.9.0 /opt/my python/bin/python3", "3.14.1 /usr/bin/python3.14"],
     "/opt/my python/bin/python3"),
    (["python 3.90.0 /new"], ["3.90.0 /new"], "/new"),
])
def test_first_suitable_python_is_chosen(lines, found, chosen):
    assert pythons(lines) == {"found": found, "chosen": chosen}
