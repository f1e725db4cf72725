# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The servers in a playbook's results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Server:
    """The state of a server at the end of a playbook."""

    #: The cluster's name in the inventory.
    cluster: str
    #: The instance's name.
    name: str
    #: The URL for Optuna's ``storage``. It does not depend on where the server runs, and contains no password.
    url: str
    #: ``serving``, ``absent``, or the scheduler's state of the job, such as ``pending``.
    state: str
    #: The server's node, or the folder of its socket; None while it does not serve.
    host: str | None
    port: int | None
    #: The server job's id; None if there is no job.
    job: str | None
    #: The URL of each database by its name.
    urls: dict[str, str] = field(default_factory=dict)


def servers_of(results: Iterable[tuple[str, dict[str, Any]]]) -> list[Server]:
    """Return the servers in the tasks' results, which are pairs of a host and a result."""
    return [server_of(cluster, result["about"]) for cluster, result in results if result.get("about")]


def server_of(cluster: str, values: dict[str, Any]) -> Server:
    """Return the server described by the role ``server``, which gives an endpoint only if its job runs."""
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
