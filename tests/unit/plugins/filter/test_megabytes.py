# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory sizes in the notation of Slurm and of PostgreSQL."""

import pytest
from ansible_collections.mala.hpc_db.plugins.filter.megabytes import megabytes


@pytest.mark.parametrize("memory, bare, expected", [
    ("16G", 1024, 16384), ("1000M", 1024, 1000), (1000, 1024, 1000), ("1000", 1024, 1000), ("2T", 1024, 2097152),
    ("512K", 1024, 0), ("4MB", 1, 4), ("64kB", 1, 0), (4096, 1, 4), ("1.5 GB", 8, 1536), (16384, 8, 128),
    ("12Q", 1024, 0), ("a lot", 1024, 0), ("", 8, 0), ("-1", 1, 0), ("16G\n", 1024, 16384), ("1G 2", 1024, 0),
])
def test_megabytes(memory, bare, expected):
    assert megabytes(memory, bare) == expected
