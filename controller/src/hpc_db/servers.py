# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""What the playbooks say about servers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Server:
    """A server as a playbook has left it."""

    #: The cluster, as the inventory calls it.
    cluster: str
    #: The instance.
    name: str
    #: For Optuna's ``storage``. It stays the same wherever the server runs, and holds no password.
    url: str
    #: ``serving``, ``absent``, or what the scheduler calls the job, such as ``pending``.
    state: str
    #: Where it serves: a node, or the folder of a socket; None while it does not.
    host: str | None
    port: int | None
    #: The hosting job's id; None if there is no job.
    job: str | None
    #: The URL of each database, by its name.
    urls: dict[str, str] = field(default_factory=dict)


def servers_of(results: Iterable[tuple[str, dict[str, Any]]]) -> list[Server]:
    """Return the servers that the tasks' results tell of, which are pairs of a host and a result."""
    return [server_of(cluster, result["about"]) for cluster, result in results if result.get("about")]


def server_of(cluster: str, values: dict[str, Any]) -> Server:
    """Return the server that the role ``server`` tells of."""
    endpoint, job = values["endpoint"] or {}, values["job"] or {}
    state = "serving" if endpoint else str(job.get("state", "absent")).lower()
    return Server(
        cluster=cluster,
        name=values["name"],
        url=values["url"],
        state=state,
        host=endpoint.get("host"),
        port=int(endpoint["port"]) if endpoint else None,
        job=endpoint.get("job") or job.get("id"),
        urls=values["urls"],
    )
