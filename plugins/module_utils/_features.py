# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a build of PostgreSQL can do, asked of its own programs."""

from __future__ import annotations

import os
import re
import shlex

# What PostgreSQL's configure has as --with-NAME. TLS is not among them, since the server itself tells.
_OPTIONAL = set("gssapi icu ldap libcurl libnuma liburing libxml libxslt llvm lz4 pam perl python readline".split())
_OPTIONAL |= set("selinux systemd tcl uuid zlib zstd".split())


def configure_command(bindir: str) -> list[str]:
    return [os.path.join(bindir, "pg_config"), "--configure"]


def tls_command(bindir: str, scratch: str) -> list[str]:
    """Return the call that prints the server's TLS library, if any. ``scratch`` is an empty folder."""
    # -C comes first, since root may ask so, who may not run a server
    return [os.path.join(bindir, "postgres"), "-C", "ssl_library", "-D", scratch, "-c", "config_file=/dev/null"]


def parse_features(configure: str, tls_library: str, major: int) -> list[str]:
    """Return the sorted features of a build; ``configure`` is empty where a build keeps it to itself."""
    features = {"tls"} if tls_library.strip() else set()
    options = re.findall(r"^--(with|without)-([\w-]+)", "\n".join(shlex.split(configure)), re.MULTILINE)
    if options:
        features |= {"readline", "zlib"} | ({"icu"} if major >= 16 else set())  # unless told otherwise
    for word, name in options:
        if name in _OPTIONAL:
            (features.add if word == "with" else features.discard)(name)
    return sorted(features)
