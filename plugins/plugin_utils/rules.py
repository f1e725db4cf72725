# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the settings of each role may contain, beyond their types and choices.

The rules read settings only, so they are checked on the workstation, before any connection. What depends on the cluster
or on files is checked by the roles' tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers import SCHEDULERS
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.slurm import parse_time

OCTET = r"(25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})"
IPV4 = rf"({OCTET}\.){{3}}{OCTET}/(3[0-2]|[12]?[0-9])"
IPV6 = r"[0-9a-fA-F]*:[0-9a-fA-F:]*/(12[0-8]|1[01][0-9]|[1-9]?[0-9])"
NETWORK = f"all|samenet|samehost|{IPV4}|{IPV6}"
WORD = "[A-Za-z0-9][A-Za-z0-9._-]*"
PATH = r"~?/[^\r\n]*"
CONNECTIONS = "[1-9][0-9]{0,5}"
SHARE = r"[1-9][0-9]?(\.[0-9]+)?%"
# Not a bare number, which is how YAML reads a time without quotes.
TIME = r"[0-9]+-[0-9]+(:[0-9]+){0,2}|[0-9]+(:[0-9]+){1,2}"
PORT = "a port from 1024 to 65535"
LOCAL = ("127.0.0.1", "localhost", "::1")


class Rule(NamedTuple):
    """What one setting may contain, and whether it does."""

    setting: str
    is_kept: bool
    #: The allowed values.
    allowed: str
    #: What is shown as given; by default the setting's value.
    given: str | None = None


def broken(roles: Iterable[str], settings: Mapping[str, Any]) -> list[str]:
    """Return an error for each of these roles' rules that a setting breaks."""
    errors = []
    for role in roles:
        for rule in RULES[role](SimpleNamespace(**settings)):
            if not rule.is_kept:
                given = listed(settings[rule.setting]) if rule.given is None else rule.given
                errors.append(f"{rule.setting}: {given} is not allowed; {rule.allowed}")
    return errors


def instance(given: Any) -> list[Rule]:
    """Return the rules of the role instance."""
    return [
        Rule("instance_name", fits("[a-z][a-z0-9_]{0,39}", given.instance_name),
             "lower case letters, digits and underscores, a letter first, at most 40 characters"),
        Rule("instance_cluster", fits(WORD, given.instance_cluster),
             "letters, digits and ._- after a letter or a digit"),
        Rule("instance_study_role", fits("(?!pg_)[a-z][a-z0-9_]{0,62}", given.instance_study_role),
             "lower case letters, digits and underscores, a letter first, not beginning with pg_"),
        Rule("instance_memory", fits("[1-9][0-9]*[KMGT]?", given.instance_memory),
             "the server job's memory as a number with K, M, G or T, such as 16G (megabytes without a letter)"),
    ]


def databases(given: Any) -> list[Rule]:
    """Return the rules of the role databases."""
    return [Rule("databases_workers", given.databases_workers > 0, "a number of processes, 1 or more")]


def postgres(given: Any) -> list[Rule]:
    """Return the rules of the role postgres."""
    provider = f"with postgres_provider {given.postgres_provider}"
    is_embedded, is_conda = given.postgres_provider == "embedded", given.postgres_provider in ("rattler", "conda")
    hashed = [each for each in given.postgres_python_packages if "--hash" in each]
    refused = refused_in_hba(given.postgres_hba_rules)
    return [
        Rule("postgres_port", is_port(given.postgres_port), PORT),
        Rule("postgres_major", given.postgres_major >= 14, "14 or newer"),
        Rule("postgres_major", not is_embedded or given.postgres_major == 18,
             "18, which the provider embedded contains", f"{given.postgres_major} {provider}"),
        Rule("postgres_tls", not is_embedded or not given.postgres_tls,
             "false, since the provider embedded has no TLS", f"{given.postgres_tls} {provider}"),
        Rule("postgres_lock_file", is_conda or not given.postgres_lock_file,
             "only conda packages (rattler, conda) have a lock file", f"{given.postgres_lock_file} {provider}"),
        Rule("postgres_python_provider", is_conda or given.postgres_python_provider == "pip",
             "pip, since other providers than rattler and conda install no conda packages",
             f"{given.postgres_python_provider} {provider}"),
        Rule("postgres_staged", given.postgres_provider == "rattler" or not given.postgres_staged,
             "only with the provider rattler, whose packages the workstation can download",
             f"{given.postgres_staged} {provider}"),
        Rule("postgres_python_packages", not given.postgres_staged or not hashed,
             "requirements without hashes, since this collection adds some without",
             f"{listed(given.postgres_python_packages)} with postgres_staged"),
        Rule("postgres_listen_addresses", not is_embedded or given.postgres_listen_addresses in LOCAL,
             "127.0.0.1, since the provider embedded has no TLS", f"{given.postgres_listen_addresses} {provider}"),
        Rule("postgres_listen_addresses", fits("[A-Za-z0-9.:*, -]*", given.postgres_listen_addresses),
             "*, or host names and addresses separated by commas"),
        Rule("postgres_max_connections", fits(CONNECTIONS, given.postgres_max_connections),
             "a number of connections, 1 or more"),
        Rule("postgres_networks", fits(NETWORK, *given.postgres_networks),
             "all, samenet, samehost, or networks such as 10.1.0.0/16"),
        Rule("postgres_settings", fits("[a-z_][a-z0-9_.]*", *given.postgres_settings),
             "names of PostgreSQL's parameters, in lower case"),
        Rule("postgres_settings", "log_line_prefix" not in given.postgres_settings,
             "not set, since the doctor reads only lines with this collection's prefix",
             f"log_line_prefix: {given.postgres_settings.get('log_line_prefix')}"),
        Rule("postgres_settings", "lc_messages" not in given.postgres_settings,
             "not set, since clients and the doctor parse PostgreSQL's English messages",
             f"lc_messages: {given.postgres_settings.get('lc_messages')}"),
        Rule("postgres_hba_rules", not refused, "values of one line, and names without quotes", listed(refused)),
    ]


def server(given: Any) -> list[Rule]:
    """Return the rules of the role server."""
    # 107 bytes minus the rest of the path, "/hpc_db-NAME-12345678/.s.PGSQL.65535".
    longest = 75 - len(given.instance_name)
    has_pooler = given.postgres_provider in ("rattler", "conda") or given.server_pooler_program != ""
    limit = whole(given.postgres_max_connections) - 10
    unknown = {"samenet", "samehost"} & set(given.postgres_networks)
    can_share = SCHEDULERS[given.server_scheduler].can_share
    return [
        Rule("server_placement", given.server_placement == "job" or can_share,
             "job, since this scheduler kills all processes of a job at the end of its script",
             f"{given.server_placement} with server_scheduler {given.server_scheduler}"),
        Rule("server_candidates", 1 <= given.server_candidates <= 100, "1 to 100 jobs"),
        Rule("server_workers_shared_buffers", fits("[1-9][0-9]*(kB|MB|GB)", given.server_workers_shared_buffers),
             "a size with kB, MB or GB, such as 512MB"),
        Rule("server_python", fits(r"([A-Za-z0-9/]|~/)[^\r\n]*", given.server_python),
             "the name of a Python, or its path, which begins with / or ~/"),
        Rule("server_address", fits("([A-Za-z0-9:][A-Za-z0-9.:-]*)?", given.server_address),
             "a host name, an address, socket, or nothing"),
        Rule("server_socket_parent", fits(r"/[\w./+@= -]*", given.server_socket_parent),
             "an absolute path of letters, digits, space and ./+@=_-"),
        Rule("server_socket_parent", len(given.server_socket_parent.encode()) <= longest,
             f"at most {longest} bytes, since a socket's path has at most 107"),
        Rule("server_lease_ttl", given.server_lease_ttl >= 5, "5 seconds or more, 90 on NFS"),
        Rule("server_stop_notice", 1 <= given.server_stop_notice <= 65535, "1 to 65535 seconds"),
        Rule("server_handover_after",
             fits(rf"({SHARE}|{TIME})?", given.server_handover_after) and is_minute(given.server_handover_after),
             "a share of the walltime such as 50%, a time in quotes from '0:01:00', or nothing"),
        Rule("server_pooler_program", fits(f"({PATH})?", given.server_pooler_program),
             "a path that begins with / or ~/, or nothing"),
        Rule("server_pooler_program", not given.server_pooler or has_pooler,
             "the path of a PgBouncer, since only the providers rattler and conda install one",
             f"nothing with postgres_provider {given.postgres_provider}"),
        Rule("server_pooler_port", is_port(given.server_pooler_port), PORT),
        Rule("server_pooler_connections", fits(CONNECTIONS, given.server_pooler_connections),
             "a number of connections, 1 or more"),
        Rule("server_pooler_connections",
             not given.server_pooler or whole(given.server_pooler_connections) <= limit,
             "at most postgres_max_connections minus 10, which remain for others",
             f"{given.server_pooler_connections} of postgres_max_connections {given.postgres_max_connections}"),
        Rule("postgres_networks", not given.server_pooler or not unknown,
             "all, or networks such as 10.1.0.0/16, which PgBouncer supports",
             f"{listed(given.postgres_networks)} with server_pooler"),
        Rule("server_proxy_port", is_port(given.server_proxy_port), PORT),
        Rule("server_proxy_connections", 1 <= given.server_proxy_connections <= 1000, "1 to 1000 connections"),
    ]


def workers(given: Any) -> list[Rule]:
    """Return the rules of the role workers."""
    return [
        Rule("workers_number", given.workers_number > 0, "a number of processes, 1 or more"),
        Rule("workers_job_name", fits(WORD, given.workers_job_name) and given.workers_job_name != given.server_job_name,
             "letters, digits and ._- after a letter or a digit, and not the server job's name"),
        Rule("workers_url", fits(r"(postgresql[^\s{}]*)?", given.workers_url),
             "a URL that begins with postgresql, without spaces and braces"),
        Rule("workers_study", fits(r"[^\r\n]+", given.workers_study), "one line"),
        Rule("workers_trials", given.workers_trials > 0, "a number of trials, 1 or more"),
        Rule("workers_python", fits(f"({PATH})?", given.workers_python),
             "the path of a Python, which begins with / or ~/"),
        Rule("workers_program", fits(f"({PATH})?", given.workers_program),
             "the path of a Python program, which begins with / or ~/"),
        Rule("workers_patience", given.workers_patience >= 0, "0 seconds or more"),
        Rule("workers_max_wait", given.workers_max_wait >= 0, "0 seconds or more"),
        Rule("workers_outage", given.workers_outage > 0, "1 second or more"),
        Rule("workers_wait_time", given.workers_wait_time >= 0, "0 seconds or more"),
    ]


def dashboard(given: Any) -> list[Rule]:
    """Return the rules of the role dashboard."""
    shown, port = given.dashboard_databases, given.dashboard_port
    every = [each["name"] for each in given.databases_studies if each["tables"] == "optuna"]
    return [
        Rule("dashboard_databases", shown != [] and set(shown) <= set(every),
             f"names in databases_studies with Optuna's tables ({listed(every)})"),
        Rule("dashboard_port", port == 0 or 1024 <= port <= 65536 - len(shown),
             "a port from 1024 to 65535, with a following port for each further database, or 0 for any free ports"),
        Rule("dashboard_root", fits(r"(~/|/)[^\r\n]*", given.dashboard_root),
             "an absolute path, or one that begins with ~/"),
        Rule("dashboard_timeout", given.dashboard_timeout > 0, "1 second or more"),
    ]


def tensorboard(given: Any) -> list[Rule]:
    """Return the rules of the role tensorboard."""
    names = [each["name"] for each in given.tensorboard_logs]
    paths = [each["path"] for each in given.tensorboard_logs]
    return [
        Rule("tensorboard_logs", names != [],
             "name the folders on the cluster, such as [{name: be, path: ~/beryllium/logs}]", "nothing"),
        Rule("tensorboard_logs", fits(WORD, *names) and len(set(names)) == len(names),
             "unique names of letters, digits, '.', '_' and '-', a letter or digit first", listed(names)),
        Rule("tensorboard_logs", all(re.match("~?/", path) for path in paths), "each path begins with / or ~/",
             listed(paths)),
        Rule("tensorboard_reload_interval", given.tensorboard_reload_interval > 0, "1 second or more"),
    ]


RULES: dict[str, Callable[[Any], list[Rule]]] = {
    role.__name__: role for role in (instance, databases, postgres, server, workers, dashboard, tensorboard)
}


def fits(pattern: str, *texts: str) -> bool:
    """Return whether all texts match the whole pattern."""
    return all(re.fullmatch(pattern, str(text)) for text in texts)


def is_minute(text: str) -> bool:
    """Return whether this is a time of at least a minute, or no time."""
    seconds = parse_time(text)
    return seconds is None or seconds >= 60


def is_port(number: int) -> bool:
    """Return whether this is a port that needs no privilege."""
    return 1024 <= number <= 65535


def whole(text: str) -> int:
    """Return the number in a text, or 0 for another text, which breaks another rule."""
    return int(text) if fits(CONNECTIONS, text) else 0


def refused_in_hba(rules: list[dict[str, Any]]) -> list[str]:
    """Return the values that pg_hba.conf could read as something else: names are in quotes there, others are not."""
    names = [name for rule in rules for key in ("databases", "users") for name in rule.get(key) or []]
    others = [rule.get(key) or "" for rule in rules for key in ("address", "options")]
    return [each for each in names if not fits(r'[^"\r\n]+', each)] + [
        each for each in others if not fits(r"[^\r\n]*", each)
    ]


def listed(value: Any) -> str:
    """Return a value as it is shown in an error: a list or the names of a dictionary with commas."""
    if isinstance(value, (list, dict)):
        return ", ".join(map(listed, value)) or "an empty list"
    return str(value) or "nothing"
