# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL's programs, wherever they are: how to find them, and to ask what they are."""

from __future__ import annotations

import os
import re
import shlex

# What the collection runs, and what a major upgrade runs besides.
REQUIRED = ("postgres", "initdb", "psql", "pg_dump", "pg_restore")
OPTIONAL = ("pg_controldata", "pg_ctl", "pg_dumpall", "pg_resetwal", "pg_upgrade")

# What those are told whose words are read here, for run_command's environ_update.
ENGLISH = {"LC_ALL": "C"}

# The exit code of a login shell whose site's line has failed.
LOAD_FAILED = 93
# A login shell prints whatever it likes besides.
FOUND = "hpc_db found "

# What PostgreSQL's configure has as --with-NAME. TLS is not among them, since the server itself tells.
_OPTIONAL = set("gssapi icu ldap libcurl libnuma liburing libxml libxslt llvm lz4 pam perl python readline".split())
_OPTIONAL |= set("selinux systemd tcl uuid zlib zstd".split())


def search_command(module_load: str, timeout: int) -> list[str]:
    """Return the call of a login shell that prints where postgres is after the site's line, and its libraries."""
    script = (
        f"{{ {module_load}\n}} >&2 || exit {LOAD_FAILED}\n"
        f'printf "\\n{FOUND}%s\\n" "$(type -P postgres)" "$LD_LIBRARY_PATH"'
    )
    # What the caller has loaded says nothing about what a job will have.
    return ["timeout", "--kill-after=10", str(timeout), "env", "-u", "LD_LIBRARY_PATH", "bash", "-lc", script]


def parse_search(stdout: str) -> tuple[str, str]:
    """Return the folder of postgres, or nothing, and the folders of its libraries."""
    said = [line[len(FOUND) :] for line in stdout.splitlines() if line.startswith(FOUND)]
    program, libraries = said if len(said) == 2 else ("", "")
    # An empty entry would be the working directory.
    kept = [folder for folder in libraries.split(":") if folder.startswith("/")]
    return os.path.dirname(program), ":".join(kept)


def program_command(bindir: str, program: str, library_path: str, *arguments: str) -> list[str]:
    """Return the call of one of PostgreSQL's programs with these libraries and no others."""
    libraries = [f"LD_LIBRARY_PATH={library_path}"] if library_path else ["-u", "LD_LIBRARY_PATH"]
    return ["env", *libraries, os.path.join(bindir, program), *arguments]


def parse_version(text: str) -> tuple[str, int] | None:
    """Return version and major version from what a program's ``--version`` prints; None if it names none."""
    found = re.search(r"\(PostgreSQL\) ((\d+)\S*)", text)
    return (found.group(1), int(found.group(2))) if found else None


def tls_command(bindir: str, library_path: str, scratch: str) -> list[str]:
    """Return the call that prints the server's TLS library, if any. ``scratch`` is an empty directory."""
    # -C comes first, since root may ask so, who may not run a server
    options = ["-C", "ssl_library", "-D", scratch, "-c", f"config_file={os.devnull}"]
    return program_command(bindir, "postgres", library_path, *options)


def configure_command(bindir: str, library_path: str) -> list[str]:
    """Return the call that prints how PostgreSQL was built; not every installation has the program."""
    return program_command(bindir, "pg_config", library_path, "--configure")


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
