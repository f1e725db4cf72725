# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""``python -m hpc_db up hemera5``: prints the progress to stderr, and the URL or the status page to stdout."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import hpc_db
from hpc_db.servers import Server


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``; a list or mapping is JSON, any other value is text, as in Ansible."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value) if value.startswith(("[", "{")) else value
    except ValueError:
        return name, value


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hpc_db", description=hpc_db.__doc__)
    parser.add_argument("command", choices=["up", "status", "down"])
    parser.add_argument("inventory", nargs="+", help="a folder's name below inventories/, or a path")
    parser.add_argument("-e", dest="settings", metavar="NAME=VALUE", type=setting, action="append", default=[])
    given = parser.parse_args()
    try:
        found = getattr(hpc_db, given.command)(*given.inventory, **dict(given.settings))
    except hpc_db.Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if given.command == "up":  # status has already printed its page
        for server in [found] if isinstance(found, Server) else found:
            print(server.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
