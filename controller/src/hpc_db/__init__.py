# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Have a study's script or notebook bring its database server up: ``hpc_db.up("hemera5").url``."""

from __future__ import annotations

import os
from typing import Any, Union

from hpc_db.playbook import Failed, play
from hpc_db.servers import Server, servers_of

__all__ = ["Failed", "Server", "down", "status", "up"]

# The name of a folder below inventories/, or a path.
Inventory = Union[str, "os.PathLike[str]"]


def up(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> Any:
    """Run the playbook ``hpc_db.yml`` and return the server; a list of them if the inventory has several hosts.

    An inventory is the name of a folder below ``inventories/`` of this checkout, of the working directory or of
    ``folder``, or a path. Of several, the later ones win. ``settings`` are the roles' own, such as
    ``server_wait=False``, and win over all of them.

    It takes seconds where the server is up already, and else as long as the job waits in the queue: at most
    ``server_wait_timeout``. Raises ``Failed`` with the playbook's own line if that is over, a setting is bad, or the
    cluster cannot be reached. An interrupt ends the playbook, not a job that is in the queue by then.
    """
    return one_or_all(servers_of(play("hpc_db", inventories, folder, settings)))


def status(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> Any:
    """Look how the servers are, and change nothing; print the status page and return what ``up`` returns."""
    return one_or_all(servers_of(play("status", inventories, folder, settings)))


def down(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> None:
    """End the hosting job and its successor. The studies stay, and ``up`` brings them back under the same URL."""
    play("stop", inventories, folder, settings)


def one_or_all(servers: list[Server]) -> Server | list[Server]:
    """Return a single server by itself."""
    return servers[0] if len(servers) == 1 else servers
