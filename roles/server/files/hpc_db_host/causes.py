# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the words of PostgreSQL and libpq mean, and which setting mends it."""

import calendar
import collections
import contextlib
import glob
import os
import re
import socket
import threading
import time
from typing import Dict, List, Optional, Tuple  # noqa: F401 - Dict in a type comment

# Of each log this much is read, from its end.
LOG_BYTES = 16 * 1024 * 1024

# A name server that does not answer must not keep us.
LOOKUP_SECONDS = 2.0

# superuser_reserved_connections, which are nobody's but the owner's.
RESERVED = 5

RESTART = "; then the playbooks hpc_db.yml, stop.yml and hpc_db.yml, since it counts from the next start"

# What ends and begins with every planned move says nothing.
HARMLESS = re.compile(
    "the database system is|terminating connection due to (administrator command|unexpected postmaster exit)|"
    "terminating (autovacuum|background|walsender|logical)|connection to client lost|canceling statement"
)
TOO_MANY = re.compile("too many clients already|remaining connection slots are reserved|connections exhausted")
UNKNOWN_RULE = re.compile(
    'no pg_hba.conf entry for host "(?P<host>[^"]*)", user "(?P<user>[^"]*)", database "(?P<database>[^"]*)"'
    "(?P<rest>.*)"
)

# The words, what they mean, and what mends it. Groups of the words may be named in both.
CAUSES = [
    ("password authentication failed for user \"([^\"]*)\"",
     "the password of {0} is not the server's",
     "the playbook hpc_db.yml, which brings both together; workers must use the URL as it is printed"),
    ("no password supplied|expected (?:SASL|password) response, got message type 88",
     "a client knew no password",
     "chmod 600 for the service's passfile, which libpq else ignores; workers must use the URL as it is printed"),
    ("pg_hba.conf rejects connection",
     "a rule forbids a connection",
     "postgres_hba_rules"),
    ("database \"([^\"]*)\" does not exist",
     "there is no database {0}",
     "databases_studies: name it there, then the playbook hpc_db.yml"),
    ("role \"([^\"]*)\" does not exist",
     "a URL names the role {0}, which does not exist",
     "workers must use the URL as it is printed, which needs no user (instance_study_role)"),
    ("idle-in-transaction timeout",
     "a worker was silent inside a transaction for too long, and lost it",
     "postgres_settings: idle_in_transaction_session_timeout, if workers are suspended for longer than that"),
    ("idle-session timeout",
     "workers lose their connections between trials",
     "postgres_settings: leave idle_session_timeout out"),
    ("No space left on device",
     "the disk is full",
     "instance_root: free space there, or move the instance to a larger file system"),
    ("Disk quota exceeded|quota exceeded|disk full",
     "the quota is used up, or the disk full",
     "instance_root: free space there, or move the instance to a larger file system"),
    ("was terminated by signal 9|out of memory|Cannot allocate memory|could not fork",
     "the hosting job's memory is too small",
     "mem in server_job_options (instance_memory), or fewer databases_workers"),
    ("could not (?:bind|create any TCP/IP sockets)|Address already in use",
     "the server cannot listen where it should",
     "postgres_listen_addresses, postgres_port"),
    ("could not (?:resize|open|create) shared memory",
     "the compute node has too little shared memory (/dev/shm)",
     "postgres_settings: dynamic_shared_memory_type: mmap"),
    ("certificate|private key",
     "the server's certificate or its key cannot be used",
     "postgres_tls: chmod 600 conf/server.key, or remove conf/server.* and run the playbook hpc_db.yml"),
    ("configuration parameter|invalid value for parameter|configuration file .* contains errors|must be less than",
     "a parameter of PostgreSQL is wrong",
     "postgres_settings"),
    ("database files are incompatible",
     "the data directory was made by another PostgreSQL",
     "postgres_major, or the playbook upgrade.yml"),
    ("lock file .* already exists|pre-existing shared memory block",
     "another server has the data directory",
     "instance_root: two instances need two; end what else runs there"),
    ("checkpoint record|invalid (?:page|record|magic number)|could not read block",
     "the data directory is damaged",
     "the playbook restore.yml, with restore_from: newest"),
    ("authentication timeout|due to timeout",
     "clients took too long to say who they are",
     "databases_workers: fewer that start at once, or postgres_settings: authentication_timeout"),
    ("unsupported frontend protocol|invalid length of startup packet",
     "something else than a PostgreSQL client has spoken to the port",
     "postgres_networks: only those of the cluster"),
    ("definition of service \"([^\"]*)\" not found",
     "libpq does not find the service {0}",
     "unset PGSERVICEFILE, or the playbook hpc_db.yml if the server should serve"),
    ("syntax error in service file|invalid connection option|unrecognized option",
     "the environment's libpq is too old for the service entry",
     "a driver with libpq 13 or newer (16 with postgres_tls: false), such as psycopg2-binary>=2.9.8"
     " (client_environment, postgres_python_packages)"),
    ("could not translate host name|Name or service not known|failure in name resolution",
     "the server's name cannot be resolved here",
     "server_address: a name or an address that every node knows"),
    ("channel binding",
     "TLS is not as the service entry asks: a libpq without OpenSSL, or a stranger's server",
     "postgres_tls, or another driver (client_environment, postgres_python_packages)"),
    ("server does not support SSL",
     "the server has no TLS, but the service entry asks for it",
     "postgres_tls" + RESTART),
    ("Connection refused|timeout expired|timed out|No route to host|Network is unreachable|unreachable",
     "the server cannot be reached",
     "postgres_listen_addresses, server_address, or the networks between the nodes"),
    ("did not come back within",
     "the server does not answer",
     "the playbook hpc_db.yml"),
]

LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* UTC \[\d+\] (?:\S*@\S* (?P<client>\S+) )?"
    r"(?P<level>FATAL|PANIC|LOG|ERROR):  (?P<words>.*)"
)
# What is not fatal for one client, but for all.
GRAVE = re.compile("was terminated by signal 9|No space left on device|Disk quota exceeded")


def explain(words: str, wanted: dict) -> Tuple[str, str]:
    """Return what the words of a server or of libpq mean, and what mends it."""
    rule = UNKNOWN_RULE.search(words)
    if rule:
        return explain_rule(rule, wanted)
    if TOO_MANY.search(words):
        return "too many clients against max_connections %s" % wanted["max_connections"], mend_too_many(wanted)
    for pattern, said, mend in CAUSES:
        found = re.search(pattern, words)
        if found:
            return said.format(*found.groups()), mend
    return words, "see the logs in %s" % os.path.join(wanted["root"], "log")


def explain_rule(rule: "re.Match", wanted: dict) -> Tuple[str, str]:
    """Return why no rule lets a client in."""
    if rule.group("database") not in wanted["databases"]:
        return (
            "%(user)s asked for the database %(database)s, which is none for studies" % rule.groupdict(),
            "databases_studies: name it there, then the playbook hpc_db.yml",
        )
    if wanted["tls"] and re.search("no encryption|SSL off", rule.group("rest")):
        return (
            "a client on %(host)s wanted no TLS" % rule.groupdict(),
            "workers must use the URL as it is printed, whose service asks for TLS (postgres_tls)",
        )
    return (
        "%(user)s may not connect from %(host)s" % rule.groupdict(),
        "postgres_networks: add that host's network, then the playbook hpc_db.yml",
    )


def mend_too_many(wanted: dict) -> str:
    """Return what lets more workers in."""
    fewer = "" if wanted["plugin"] else ", or client_environment, with which each holds fewer connections"
    return "databases_workers (%s): how many there really are%s%s" % (wanted["workers"], fewer, RESTART)


class Event:
    """What a log says of one cause."""

    def __init__(self, said: str, mend: str) -> None:
        self.said = said
        self.mend = mend
        self.times = []  # type: List[int]
        self.clients = collections.Counter()  # type: collections.Counter

    def add(self, when: int, client: Optional[str]) -> None:
        """Count one line."""
        self.times.append(when)
        if client:
            self.clients[client] += 1

    def text(self) -> str:
        """Return it in one line."""
        times = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)) for when in (min(self.times), max(self.times))]
        when = "at %s" % times[0] if times[0] == times[1] else "from %s to %s" % tuple(times)
        clients = [name_of(client) for client, _count in self.clients.most_common(3)]
        more = " and others" if len(self.clients) > len(clients) else ""
        where = " by %s%s" % (", ".join(clients), more) if clients else ""
        return "%s (%d times%s, %s UTC)" % (self.said, len(self.times), where, when)


def name_of(client: str) -> str:
    """Return the name of a client's address, as far as it is known soon."""
    if client == "[local]":
        return "the server's own host"
    names = [client]

    def look_up() -> None:
        with contextlib.suppress(OSError):
            names.append(socket.gethostbyaddr(client)[0].partition(".")[0])

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return names[-1]


def read_logs(folder: str, since: float, wanted: dict) -> List[Event]:
    """Return what was fatal since then, the most frequent cause first."""
    events = {}  # type: Dict[Tuple[str, str], Event]
    refused = Event("", mend_too_many(wanted))
    for path in glob.glob(os.path.join(glob.escape(folder), "postgresql-*.log")):
        if os.path.getmtime(path) < since:
            continue
        for when, client, words in read_fatal(path):
            if when < since:
                continue
            if TOO_MANY.search(words):
                refused.add(when, client)
            else:
                meaning = explain(words, wanted)
                events.setdefault(meaning, Event(*meaning)).add(when, client)
    found = sorted(events.values(), key=lambda event: -len(event.times))
    if refused.times:
        workers = estimate_workers(refused.times, wanted)
        refused.said = "too many clients: about %d workers against max_connections %s" % (
            workers, wanted["max_connections"])
        found.insert(0, refused)
    return found


def read_fatal(path: str) -> List[Tuple[int, Optional[str], str]]:
    """Return time, client's host and words of each line that says what is fatal, and not harmless."""
    with open(path, "rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - LOG_BYTES))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    found = []
    for line in lines:
        said = LINE.match(line)
        if not said or HARMLESS.search(said.group("words")):
            continue
        if said.group("level") in ("FATAL", "PANIC") or GRAVE.search(said.group("words")):
            when = calendar.timegm(time.strptime(said.group("time"), "%Y-%m-%d %H:%M:%S"))
            found.append((when, said.group("client"), said.group("words")))
    return found


def estimate_workers(refused: List[int], wanted: dict) -> int:
    """Return how many workers there were: those that hold all connections, and those that were refused at once.

    A worker holds two connections, and ends when it is refused. One with the plugin holds one, and asks again every
    few seconds.
    """
    together, held = (3, 1) if wanted["plugin"] else (60, 2)
    times = sorted(refused)
    most, first = 0, 0
    for last, when in enumerate(times):
        while when - times[first] >= together:
            first += 1
        most = max(most, last - first + 1)
    return (int(wanted["max_connections"]) - RESERVED) // held + most
