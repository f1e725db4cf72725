# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run pip with only those of the user's settings that say where packages come from.

``python -I -c SOURCE [--host=MARKERS] PIP_ARGUMENTS`` runs in the interpreter that has pip; tools/setup uses it too.
Settings about where and how to install (user, target, prefix, require-virtualenv, ...) are meant for other
installations and are ignored.

``--host`` gives the markers of another host in JSON: pip itself always evaluates the markers of requirements for the
host that it runs on, even if it downloads for another platform.
"""

from __future__ import annotations

import json
import os
import sys

# The last ones are aliases that pip also accepts.
SOURCES = (
    "index-url", "extra-index-url", "find-links", "no-index", "constraint", "uploaded-prior-to",
    "trusted-host", "proxy", "cert", "client-cert", "keyring-provider", "timeout", "retries", "resume-retries",
    "cache-dir", "no-cache-dir", "pypi-url", "default-timeout",
)


def read_sources(verb: str) -> dict[str, str]:
    """Return the relevant settings from pip's own files and variables, with pip's order of precedence."""
    from pip._internal.configuration import Configuration
    from pip._internal.exceptions import ConfigurationError

    configuration = Configuration(isolated=False)
    configuration.load()
    found = {}
    for section in ("global", verb, ":env:"):
        for name in SOURCES:
            try:
                value = configuration.get_value(f"{section}.{name}")
            except ConfigurationError:
                continue
            if value:
                found[name] = value
    return found


def main(arguments: list[str]) -> int:
    try:
        from pip._internal.cli.main import main as run_pip
        from pip._internal.exceptions import PipError
        from pip._vendor.packaging import markers
    except ImportError as error:
        raise SystemExit(f"ERROR: {sys.executable} has no pip: {error}") from None
    if arguments[0].startswith("--host="):
        host = {**markers.default_environment(), **json.loads(arguments.pop(0).partition("=")[2])}
        markers.default_environment = lambda: dict(host)
    try:
        sources = read_sources(next((word for word in arguments if not word.startswith("-")), ""))
    except PipError as error:
        raise SystemExit(f"ERROR: {error}") from None
    if any(word.startswith("--index-url=") for word in arguments):
        sources.pop("no-index", None)
    for name in [each for each in os.environ if each.startswith("PIP_")]:
        del os.environ[name]
    os.environ["PIP_CONFIG_FILE"] = os.devnull
    os.environ.update((f"PIP_{name.upper().replace('-', '_')}", value) for name, value in sources.items())
    return run_pip(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
