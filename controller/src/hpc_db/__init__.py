# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Start a study's database server from its script or notebook: ``hpc_db.up("hemera5").url``."""

from __future__ import annotations

import os
from typing import Any, Union

from hpc_db.playbook import Failed, play
from hpc_db.servers import Server, servers_of

__all__ = ["Failed", "Server", "down", "status", "up"]

# The name of a folder in inventories/, or a path.
Inventory = Union[str, "os.PathLike[str]"]


def up(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> Any:
    """Run the playbook ``hpc_db.yml`` and return the server; a list of servers if the inventory has several hosts.

    An inventory is a path, or the name of a folder in ``folder``; by default in ``inventories/`` of the working
    directory or of this checkout. Later inventories override earlier ones. ``settings`` are settings of the roles,
    such as ``server_wait=False``, and override all inventories.

    The call takes seconds if the server is running; otherwise it waits for the job, at most ``server_wait_timeout``.
    Raises ``Failed`` with the playbook's message after that time, for an invalid setting, or if the cluster cannot be
    reached. An interrupt ends the playbook, but not a job that is already in the queue.
    """
    return one_or_all(servers_of(play("hpc_db", inventories, folder, settings)))


def status(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> Any:
    """Print the status page and return the same as ``up``, without changing anything."""
    return one_or_all(servers_of(play("status", inventories, folder, settings)))


def down(*inventories: Inventory, folder: Inventory | None = None, **settings: Any) -> None:
    """End the server job and its successor. The studies stay; after ``up`` they have the same URL."""
    play("stop", inventories, folder, settings)


def one_or_all(servers: list[Server]) -> Server | list[Server]:
    """Return the only server, or the list if there are several."""
    return servers[0] if len(servers) == 1 else servers
