# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""postgres_info against programs with fixed output; tests/integration has real ones."""

import subprocess

import pytest
from ansible_collections.mala.hpc_db.plugins.modules.postgres_info import Refused, read_postgres

REQUIRED = ("postgres", "initdb", "psql", "pg_dump", "pg_restore")
# Like PostgreSQL 15 with and without TLS: --version, and -C ssl_library -D DIR -c config_file=/dev/null.
PROGRAM = """#!/bin/sh
[ "$1" != -C ] || { [ "$2" = ssl_library ] && [ -d "$4" ] && [ -z "$(ls "$4")" ] && echo "%(tls)s"; exit; }
echo "$0" | grep -q "/%(broken)s$" && { echo "error while loading shared libraries: libpq.so.5:
cannot open" >&2; exit 127; }
[ "$LD_LIBRARY_PATH" = "%(libraries)s" ] || exit 9
echo "${0##*/} (PostgreSQL) %(version)s (Debian)"
"""


@pytest.fixture
def make(tmp_path):
    def make(*programs, version="15.18", tls="OpenSSL", broken="none", libraries=""):
        for name in programs:
            text = PROGRAM % {"version": version, "tls": tls, "broken": broken, "libraries": libraries}
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        return {"bindir": str(tmp_path), "module_load": None, "timeout": 10}

    return make


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("tls", [True, False])
def test_tells_what_is_there(tls, make):
    params = make(*REQUIRED, "pg_upgrade", "createdb", tls="OpenSSL" if tls else "")

    assert read_postgres(params, run) == {
        "bindir": params["bindir"], "library_path": "", "version": "15.18", "major": 15,
        "programs": sorted([*REQUIRED, "pg_upgrade"]), "features": ["tls"] if tls else [],
    }


def test_programs_run_with_the_libraries_of_the_module(make):
    params = make(*REQUIRED, libraries="/site/lib")
    load = f"PATH={params['bindir']}:$PATH; LD_LIBRARY_PATH=/site/lib"

    by_line = read_postgres({**params, "bindir": None, "module_load": load}, run)
    by_both = read_postgres({**params, "module_load": "LD_LIBRARY_PATH=/site/lib"}, run)

    assert by_line == by_both
    assert (by_line["bindir"], by_line["library_path"]) == (params["bindir"], "/site/lib")


@pytest.mark.parametrize("programs, options, changes, says", [
    (REQUIRED[:3], {}, {}, "postgres_bindir: .* has no program pg_dump, pg_restore; it needs postgres, initdb, psql, "),
    (REQUIRED, {"broken": "psql"}, {}, "psql in .* does not run: error while loading .*libpq.so.5: cannot open$"),
    (REQUIRED, {"version": "dev"}, {}, r"postgres in .* does not run: postgres \(PostgreSQL\) dev"),
    (REQUIRED, {}, {"bindir": "bin"}, "postgres_bindir: 'bin' is not absolute"),
    (REQUIRED, {}, {"bindir": None}, "postgres_bindir: neither this nor postgres_module_load"),
    (REQUIRED, {}, {"module_load": "echo no >&2; false"}, "postgres_module_load: .* failed in a login shell: no$"),
    (REQUIRED, {}, {"module_load": "sleep 9", "timeout": 1}, "postgres_module_load: .* took more than 1 s"),
    (REQUIRED, {}, {"bindir": None, "module_load": "PATH=/nowhere"}, "adds no program postgres to the PATH"),
])
def test_refuses_what_cannot_be_used(programs, options, changes, says, make):
    with pytest.raises(Refused, match=says):
        read_postgres({**make(*programs, **options), **changes}, run)


def test_refuses_a_mixture(make):
    make(*REQUIRED)
    params = make("pg_dump", version="14.2")

    with pytest.raises(Refused, match="several versions: postgres 15.18, initdb 15.18, psql 15.18, pg_dump 14.2, "):
        read_postgres(params, run)
