# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finding and querying PostgreSQL's programs."""

import os
import subprocess

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._postgres import (
    LOAD_FAILED,
    parse_features,
    parse_search,
    parse_version,
    search_command,
)


@pytest.mark.parametrize("text, expected", [
    ("postgres (PostgreSQL) 17.10\n", ("17.10", 17)),
    ("postgres (PostgreSQL) 18beta1 (Debian 18~beta1-1)\n", ("18beta1", 18)),
    ("bash: postgres: not found\n", None),
])
def test_version(text, expected):
    assert parse_version(text) == expected


@pytest.mark.parametrize("load, code, found", [
    ("export PATH={bin}:$PATH LD_LIBRARY_PATH=/a/lib:", 0, ("{bin}", "/a/lib")),
    ("echo hpc_db found >&2; PATH={bin}:$PATH; LD_LIBRARY_PATH=:.:/a:../b:/c", 0, ("{bin}", "/a:/c")),
    ("PATH=/nowhere", 0, ("", "")),
    ("PATH={bin}:$PATH # as the site says", 0, ("{bin}", "")),
    ("false", LOAD_FAILED, ("", "")),
    ("exit 3", 3, ("", "")),
    ("(", 2, ("", "")),
])
def test_login_shell_finds_what_the_line_brings(load, code, found, tmp_path):
    (tmp_path / "postgres").symlink_to("/bin/true")
    (tmp_path / ".bash_profile").write_text("echo welcome; PATH=/usr/bin:/bin\n")
    environment = {"HOME": str(tmp_path), "PATH": os.defpath, "LD_LIBRARY_PATH": "/of/the/caller"}

    done = subprocess.run(
        search_command(load.format(bin=tmp_path), 10), env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert parse_search(done.stdout) == tuple(each.format(bin=tmp_path) for each in found)


# Output of pg_config --configure, shortened, of real builds.
CONDA_FORGE = (
    " '--prefix=/p' '--with-readline' '--with-libraries=/p/lib' '--with-includes=/p/include' '--with-openssl'"
    " '--with-uuid=e2fs' '--with-libxml' '--with-libxslt' '--with-gssapi' '--with-system-tzdata=/p/share/zoneinfo'"
    " 'PG_SYSROOT=undefined'\n"
)
WHEEL = " '--prefix=/p' '--without-readline' '--without-icu' 'PKG_CONFIG_PATH=/usr/lib/pkgconfig'\n"


@pytest.mark.parametrize(
    ("configure", "tls_library", "major", "features"),
    [
        (CONDA_FORGE, "OpenSSL\n", 17, "gssapi icu libxml libxslt readline tls uuid zlib"),
        (CONDA_FORGE, "OpenSSL\n", 15, "gssapi libxml libxslt readline tls uuid zlib"),
        (WHEEL, "\n", 18, "zlib"),
        (" '--with-extra-version= (my own)' '--with-lz4' '--enable-nls=de --with-pam'\n", "", 18,
         "icu lz4 readline zlib"),
        ("\n", "OpenSSL\n", 18, "tls"),  # a meson build reports no options
        ("", "", 18, ""),
    ],
)
def test_features(configure, tls_library, major, features):
    assert " ".join(parse_features(configure, tls_library, major)) == features
