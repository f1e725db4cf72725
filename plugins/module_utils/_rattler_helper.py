# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Solve and install an environment by py-rattler: ``python -I -c SOURCE REQUEST``.

Runs alone, in an interpreter that has rattler, and answers in one line, in the words of conda's own JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


async def fulfil(request: dict) -> dict:
    import rattler

    metadata = Path(request["prefix"]) / "conda-meta"
    cache = Path(request["cache"]) if request["cache"] else None
    # The one that is used otherwise neither tries again nor looks for the user's credentials.
    client = rattler.networking.Client.authenticated_client()
    installed = [rattler.PrefixRecord.from_path(path) for path in sorted(metadata.glob("*.json"))]
    solved = await rattler.solve(
        sources=request["channels"],
        specs=request["specs"],
        locked_packages=installed,
        gateway=rattler.Gateway(cache_dir=cache and cache / "repodata", client=client),
        virtual_packages=rattler.VirtualPackage.detect(overrides=rattler.VirtualPackageOverrides.from_env()),
    )
    if not request["dry_run"]:
        await rattler.install(
            solved,
            target_prefix=request["prefix"],
            cache_dir=cache and cache / "pkgs",
            installed_packages=installed,
            show_progress=False,
            client=client,
            execute_link_scripts=False,
        )
        for path in metadata.glob("*.json"):  # rattler's 0600 would hide the environment from other users
            path.chmod(0o644)
    actions = {"UNLINK": list(map(describe, installed)), "LINK": list(map(describe, solved))}
    return {"success": True, "actions": actions}


def describe(record: Any) -> dict:
    return {"dist_name": f"{record.name.normalized}-{record.version}-{record.build}"}


def main() -> None:
    try:
        answer = asyncio.run(fulfil(json.loads(sys.argv[1])))
    except BaseException as error:  # a panic of rattler's is no Exception
        answer = {"success": False, "exception_name": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the interpreter may crash while it ends, after all work is done


if __name__ == "__main__":
    main()
