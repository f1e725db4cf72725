# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What PostgreSQL's own programs say of their build."""

from __future__ import annotations

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._features import parse_features

# What pg_config --configure prints, shortened, of builds in the wild.
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
        ("\n", "OpenSSL\n", 18, "tls"),  # meson tells nothing
        ("", "", 18, ""),
    ],
)
def test_features(configure: str, tls_library: str, major: int, features: str) -> None:
    assert " ".join(parse_features(configure, tls_library, major)) == features
