# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Explain messages of PostgreSQL and libpq: the cause, and the setting that fixes it."""

import calendar
import collections
import contextlib
import glob
import os
import re
import socket
import threading
import time
from typing import Dict, Iterator, List, Optional, Tuple  # noqa: F401 - Dict in a type comment

from . import files
from .layout import Layout

# How much of a log is read, from its end: for the report, and for the last fatal message.
LOG_BYTES = 16 * 1024 * 1024
LAST_BYTES = 64 * 1024

# Strangers can cause any number of different messages, so only this many of those sent to clients are listed.
MOST_OF_CLIENTS = 20

# Limit for a name server that does not answer.
LOOKUP_SECONDS = 2.0

# superuser_reserved_connections: only the owner can use these.
RESERVED = 5

RESTART = "; then the playbooks hpc_db.yml, stop.yml and hpc_db.yml, since it takes effect at the next start"

# Messages that every planned move causes.
HARMLESS = re.compile(
    "the database system is|terminating connection due to (administrator command|unexpected postmaster exit)|"
    "terminating (autovacuum|background|walsender|logical)|connection to client lost|canceling statement"
)
TOO_MANY = re.compile("too many clients already|remaining connection slots are reserved|connections exhausted")
UNKNOWN_RULE = re.compile(
    'no pg_hba.conf entry for host "(?P<host>[^"]*)", user "(?P<user>.*)", database "(?P<database>.*)"(?P<rest>[^"]*)'
)
# The prefix that libpq and the supervisor put before the server's own message.
BEFORE = re.compile(r'(?:connection to server \w+ "[^"]*"[^"]*? failed: +)?[^"]*?(?:FATAL|PANIC|ERROR): +')
# The part of a message that a client chooses, such as a role name. It may contain quotes, so the match extends to the
# last one.
CHOSEN = re.compile('(?<=").*(?=")|(?<=argument for server process: ).*')

# Each row: a pattern for the message without the client's own text, the cause, and the fix. {0} is the client's text.
CAUSES = [
    ("password authentication failed for user \"\"",
     "the password of {0} is not the server's",
     "the playbook hpc_db.yml, which sets both again; workers must use the printed URL"),
    ("no password supplied|expected (?:SASL|password) response, got message type 88",
     "a client sent no password",
     "chmod 600 for the service's passfile, or libpq ignores it; workers must use the printed URL"),
    ("pg_hba.conf rejects connection",
     "a rule in pg_hba.conf rejects a client",
     "postgres_hba_rules"),
    ("database \"\" does not exist",
     "the database {0} does not exist",
     "databases_studies: add it there, then the playbook hpc_db.yml"),
    ("role \"\" does not exist",
     "a URL names the role {0}, which does not exist",
     "workers must use the printed URL, which needs no user (instance_study_role)"),
    ("idle-in-transaction timeout",
     "a worker was idle in a transaction for too long and was disconnected",
     "postgres_settings: idle_in_transaction_session_timeout, if workers are suspended for longer than that"),
    ("idle-session timeout",
     "workers lose their connections between trials",
     "postgres_settings: leave idle_session_timeout out"),
    ("No space left on device",
     "the disk is full",
     "instance_root: free space there, or move the instance to a larger file system"),
    ("Disk quota exceeded|quota exceeded|disk full",
     "the quota is exceeded or the disk is full",
     "instance_root: free space there, or move the instance to a larger file system"),
    ("was terminated by signal 9|out of memory|Cannot allocate memory|could not fork",
     "the server job has too little memory",
     "mem in server_job_options (instance_memory), or fewer databases_workers"),
    ("could not (?:bind|create any TCP/IP sockets)|Address already in use",
     "the server cannot listen on its address and port",
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
     "instance_root: each instance needs its own; stop the other server"),
    ("checkpoint record|invalid (?:page|record|magic number)|could not read block",
     "the data directory is damaged",
     "the playbook restore.yml, with restore_from: newest"),
    ("authentication timeout|due to timeout",
     "clients took too long to authenticate",
     "databases_workers: start fewer at once, or postgres_settings: authentication_timeout"),
    ("unsupported frontend protocol|invalid length of startup packet",
     "a program other than a PostgreSQL client connected to the port",
     "postgres_networks: only those of the cluster"),
    ("definition of service \"\" not found",
     "libpq does not find the service {0}",
     "unset PGSERVICEFILE, or the playbook hpc_db.yml if the server should serve"),
    ("syntax error in service file|invalid connection option|unrecognized option",
     "the environment's libpq is too old for the service entry",
     "a driver with libpq 13 or newer (16 with postgres_tls: false), such as psycopg2-binary>=2.9.8"
     " (client_environment, postgres_python_packages)"),
    ("could not translate host name|Name or service not known|failure in name resolution",
     "the server's name cannot be resolved here",
     "server_address: a name or an address that every node can resolve"),
    ("channel binding",
     "TLS differs from the service entry: libpq has no OpenSSL, or another user's server answers",
     "postgres_tls, or another driver (client_environment, postgres_python_packages)"),
    ("server does not support SSL",
     "the server has no TLS, but the service entry requires it",
     "postgres_tls" + RESTART),
    ("Connection refused|timeout expired|timed out|No route to host|Network is unreachable|unreachable",
     "the server cannot be reached",
     "postgres_listen_addresses, server_address, or the networks between the nodes"),
    ("did not come back within",
     "the server does not answer",
     "the playbook hpc_db.yml"),
]

# log_line_prefix of conf/postgresql.conf: a session's line names the client's host, but nothing that a client sends.
LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d+ UTC postgres\[\d+\] "
    r"(?:(?P<client>\[local\]|[\w.:%-]+) )?(?P<level>[A-Z]+):  (?P<words>.*)", re.ASCII
)
# The same on standard error, before PostgreSQL has read its configuration. It has no clients then.
EARLY_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d+ \S+ (?:postgres)?\[\d+\] "
    r"(?P<level>[A-Z]+):  (?P<words>.*)", re.ASCII
)
# Messages below FATAL that concern all clients.
GRAVE = re.compile("was terminated by signal 9|No space left on device|Disk quota exceeded")


def explain(words: str, wanted: dict) -> Tuple[str, str]:
    """Return cause and fix for a message of libpq or the supervisor."""
    before = BEFORE.match(words)
    return explain_record(words[before.end():] if before else words, wanted)


def explain_record(words: str, wanted: dict) -> Tuple[str, str]:
    """Return cause and fix for a message in the form of the server's log."""
    rule = UNKNOWN_RULE.match(words)
    if rule:
        return explain_rule(rule, wanted)
    fixed = CHOSEN.sub("", words)
    if TOO_MANY.search(fixed):
        return "too many clients against max_connections %s" % wanted["max_connections"], mend_too_many(wanted)
    for pattern, said, mend in CAUSES:
        if re.search(pattern, fixed):
            chosen = CHOSEN.search(words)
            return said.format(chosen.group() if chosen else ""), mend
    return words, "see the logs in %s" % Layout(wanted["root"]).log


def explain_rule(rule: "re.Match", wanted: dict) -> Tuple[str, str]:
    """Return cause and fix if no rule in pg_hba.conf matches a client."""
    if rule.group("database") not in wanted["databases"]:
        return (
            "%(user)s requested the database %(database)s, which is not in databases_studies" % rule.groupdict(),
            "databases_studies: add it there, then the playbook hpc_db.yml",
        )
    if wanted["tls"] and re.search("no encryption|SSL off", rule.group("rest")):
        return (
            "a client on %(host)s connected without TLS" % rule.groupdict(),
            "workers must use the printed URL, whose service requires TLS (postgres_tls)",
        )
    return (
        "%(user)s may not connect from %(host)s" % rule.groupdict(),
        "postgres_networks: add that host's network, then the playbook hpc_db.yml",
    )


def mend_too_many(wanted: dict) -> str:
    """Return the settings that allow more workers."""
    fewer = "" if wanted["plugin"] else ", or set client_environment, so that each holds fewer connections"
    return "databases_workers (%s): set the real number of workers%s%s" % (wanted["workers"], fewer, RESTART)


class Event:
    """All records in the logs with the same cause."""

    def __init__(self, said: str, mend: str) -> None:
        self.said = said
        self.mend = mend
        self.times = []  # type: List[int]
        self.clients = collections.Counter()  # type: collections.Counter

    def add(self, when: int, client: Optional[str]) -> None:
        """Count one record."""
        self.times.append(when)
        if client:
            self.clients[client] += 1

    def text(self) -> str:
        """Return cause, number, clients and time range in one line."""
        times = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)) for when in (min(self.times), max(self.times))]
        when = "at %s" % times[0] if times[0] == times[1] else "from %s to %s" % tuple(times)
        clients = [name_of(client) for client, _count in self.clients.most_common(3)]
        more = " and others" if len(self.clients) > len(clients) else ""
        where = " by %s%s" % (", ".join(clients), more) if clients else ""
        return "%s (%d times%s, %s UTC)" % (self.said, len(self.times), where, when)


def name_of(client: str) -> str:
    """Return the host name of a client's address; the address if the lookup fails or takes too long."""
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
    """Return fatal events since ``since``, the most frequent cause first."""
    events = {}  # type: Dict[Tuple[str, str], Event]
    refused = Event("", mend_too_many(wanted))
    for path in glob.glob(os.path.join(glob.escape(folder), "postgresql-*.log")):
        if os.path.getmtime(path) < since:
            continue
        for when, client, words in read_fatal(path):
            if when < since:
                continue
            if TOO_MANY.search(CHOSEN.sub("", words)):
                refused.add(when, client)
            else:
                meaning = explain_record(words, wanted)
                events.setdefault(meaning, Event(*meaning)).add(when, client)
    found = sorted(events.values(), key=lambda event: -len(event.times))
    rest = [event for event in found if event.clients][MOST_OF_CLIENTS:]
    if rest:
        found = [event for event in found if event not in rest]
        found.append(Event("%d more errors sent to clients" % len(rest), "see the logs in %s" % folder))
        found[-1].times = [when for event in rest for when in event.times]
    if refused.times:
        workers = estimate_workers(refused.times, wanted)
        refused.said = "too many clients: about %d workers against max_connections %s" % (
            workers, wanted["max_connections"])
        found.insert(0, refused)
    return found


def read_fatal(path: str) -> List[Tuple[int, Optional[str], str]]:
    """Return time, client's host and message of each fatal record, except the harmless ones."""
    found = []
    for when, client, level, words in read_records(path, LINE, LOG_BYTES):
        # Below FATAL, a client can make the server log any text.
        grave = client is None and GRAVE.search(CHOSEN.sub("", words))
        if (level in ("FATAL", "PANIC") or grave) and not HARMLESS.match(words):
            found.append((when, client, words))
    return found


def read_records(
    path: str, pattern: "re.Pattern", most: int
) -> "Iterator[Tuple[int, Optional[str], str, str]]":
    """Yield time, client's host, level and message (in one line) of each complete record at the end of a log.

    PostgreSQL writes a tab after a line break inside a message, so continuation lines cannot be taken for records.
    """
    with open(path, "rb") as stream:
        begin = max(0, os.path.getsize(path) - most)
        stream.seek(begin)
        lines = stream.read().decode("utf-8", "replace").split("\n")
    records = []  # type: List[List[str]]
    # Skip the first line if reading began in its middle, and the last one, which may not be complete yet.
    for line in lines[1 if begin else 0:-1]:
        if line.startswith("\t") and records:
            records[-1].append(line[1:])
        else:
            records.append([line])
    for record in records:
        said = pattern.match(record[0])
        if said:
            words = "\n".join([said.group("words")] + record[1:])
            with contextlib.suppress(ValueError):  # an invalid time, in a damaged log
                when = calendar.timegm(time.strptime(said.group("time"), "%Y-%m-%d %H:%M:%S"))
                yield when, said.groupdict().get("client"), said.group("level"), files.printable(words)


def last_words(folder: str) -> str:
    """Return the last fatal message in PostgreSQL's logs; empty if there is none.

    Messages to a client are ignored: they did not end the server.
    """
    logs = [(path, LINE) for path in glob.glob(os.path.join(glob.escape(folder), "postgresql-*.log"))]
    logs += [(os.path.join(folder, name), EARLY_LINE) for name in ("job.log", "bootstrap.log")]
    there = [(os.path.getmtime(path), path, pattern) for path, pattern in logs if os.path.exists(path)]
    for _changed, path, pattern in sorted(there, key=lambda log: log[0], reverse=True):
        fatal = [
            "%s:  %s" % (level, words) for _when, client, level, words in read_records(path, pattern, LAST_BYTES)
            if client is None and level in ("FATAL", "PANIC") and not HARMLESS.match(words)
        ]
        if fatal:
            return fatal[-1]
    return ""


def estimate_workers(refused: List[int], wanted: dict) -> int:
    """Return how many workers there were: those that hold all connections, and those refused at the same time.

    A worker holds two connections, and ends when it is refused. A worker with the plugin holds one connection, and
    retries every few seconds.
    """
    together, held = (3, 1) if wanted["plugin"] else (60, 2)
    times = sorted(refused)
    most, first = 0, 0
    for last, when in enumerate(times):
        while when - times[first] >= together:
            first += 1
        most = max(most, last - first + 1)
    return (int(wanted["max_connections"]) - RESERVED) // held + most
