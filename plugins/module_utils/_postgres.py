# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL's programs of any origin: how to find them, and how to read their version and features."""

from __future__ import annotations

import os
import re
import shlex

# Programs that the collection runs, and those that only a major upgrade runs.
REQUIRED = ("postgres", "initdb", "psql", "pg_dump", "pg_restore")
OPTIONAL = ("pg_controldata", "pg_ctl", "pg_dumpall", "pg_resetwal", "pg_upgrade")

# Environment of programs whose output is parsed here, for run_command's environ_update.
ENGLISH = {"LC_ALL": "C"}

# Exit code of a login shell in which the site's line failed.
LOAD_FAILED = 93
# Marks our lines among other output of a login shell.
FOUND = "hpc_db found "

# Features named --with-NAME in PostgreSQL's configure. TLS is not included, because the server itself reports it.
_OPTIONAL = set("gssapi icu ldap libcurl libnuma liburing libxml libxslt llvm lz4 pam perl python readline".split())
_OPTIONAL |= set("selinux systemd tcl uuid zlib zstd".split())


def search_command(module_load: str, timeout: int) -> list[str]:
    """Return the call of a login shell that prints the path of postgres after the site's line, and its library path."""
    script = (
        f"{{ {module_load}\n}} >&2 || exit {LOAD_FAILED}\n"
        f'printf "\\n{FOUND}%s\\n" "$(type -P postgres)" "$LD_LIBRARY_PATH"'
    )
    # The caller's own modules say nothing about those of a job.
    return ["timeout", "--kill-after=10", str(timeout), "env", "-u", "LD_LIBRARY_PATH", "bash", "-lc", script]


def parse_search(stdout: str) -> tuple[str, str]:
    """Return the folder of postgres, or an empty string, and the folders of its libraries."""
    said = [line[len(FOUND) :] for line in stdout.splitlines() if line.startswith(FOUND)]
    program, libraries = said if len(said) == 2 else ("", "")
    # An empty entry would mean the working directory.
    kept = [folder for folder in libraries.split(":") if folder.startswith("/")]
    return os.path.dirname(program), ":".join(kept)


def program_command(bindir: str, program: str, library_path: str, *arguments: str) -> list[str]:
    """Return the call of one of PostgreSQL's programs with these libraries and no others."""
    libraries = [f"LD_LIBRARY_PATH={library_path}"] if library_path else ["-u", "LD_LIBRARY_PATH"]
    return ["env", *libraries, os.path.join(bindir, program), *arguments]


def parse_version(text: str) -> tuple[str, int] | None:
    """Return version and major version from the output of a program's ``--version``; None if there is none."""
    found = re.search(r"\(PostgreSQL\) ((\d+)\S*)", text)
    return (found.group(1), int(found.group(2))) if found else None


def tls_command(bindir: str, library_path: str, scratch: str) -> list[str]:
    """Return the call that prints the server's TLS library, if any. ``scratch`` is an empty directory."""
    # -C comes first, because root is allowed to read a setting, but not to run a server
    options = ["-C", "ssl_library", "-D", scratch, "-c", f"config_file={os.devnull}"]
    return program_command(bindir, "postgres", library_path, *options)


def configure_command(bindir: str, library_path: str) -> list[str]:
    """Return the call that prints the build options; not every installation has the program."""
    return program_command(bindir, "pg_config", library_path, "--configure")


def parse_features(configure: str, tls_library: str, major: int) -> list[str]:
    """Return the sorted features of a build; ``configure`` is empty if the build options are unknown."""
    features = {"tls"} if tls_library.strip() else set()
    options = re.findall(r"^--(with|without)-([\w-]+)", "\n".join(shlex.split(configure)), re.MULTILINE)
    if options:
        features |= {"readline", "zlib"} | ({"icu"} if major >= 16 else set())  # the defaults of configure
    for word, name in options:
        if name in _OPTIONAL:
            (features.add if word == "with" else features.discard)(name)
    return sorted(features)
