# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find out on one node why workers cannot reach their server; changes nothing.

    python3 -m hpc_db_host.doctor --wanted FILE [--server]    prints one JSON object

FILE holds the inventory's settings; --server also checks job, state and logs, which are the same on every node.
"""

import argparse
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import time
from typing import Dict, List, Optional

from . import causes, files, lease
from .endpoint import read_endpoint
from .layout import Layout
from .optuna_schema import Optuna, Schema, is_newer, is_older
from .settings import complete

# PostgreSQL's SSLRequest, the first message of a client that wants TLS.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
PORT_SECONDS = 5.0
PROBE_SECONDS = 120.0
PAUSE_SECONDS = 1.0

HOST_IT = "the playbook hpc_db.yml"
HOST_IT_AGAIN = "the playbooks stop.yml and hpc_db.yml"

# The range of SQLAlchemy versions that the client package and Optuna's schema need.
OLDEST_SQLALCHEMY, NEWEST_SQLALCHEMY = (1, 4, 24), (2, 2)


class Report:
    """Findings in the order of the checks."""

    def __init__(self) -> None:
        self.findings = []  # type: List[Dict[str, str]]

    def well(self, check: str, said: str) -> None:
        """Add a check that has passed."""
        self._add("ok", check, said, "")

    def found(self, check: str, said: str, mend: str) -> None:
        """Add a problem, and the setting that fixes it."""
        self._add("found", check, said, mend)

    def skipped(self, check: str, why: str) -> None:
        """Add a check that is impossible because of a problem that another finding reports."""
        self._add("skipped", check, why, "")

    def _add(self, state: str, check: str, said: str, mend: str) -> None:
        told = {"state": state, "check": check, "said": said, "mend": mend}
        self.findings.append({key: files.printable(value) for key, value in told.items()})


def read_wanted(path: str) -> dict:
    """Return the inventory's settings, with those that hpc_db.yml has written last."""
    with open(path) as stream:
        wanted = json.load(stream)
    settings = complete(files.read_json(Layout(wanted["root"]).settings) or {})
    wanted.update(
        config=settings["config"], tls="sslmode" in settings["service"],
        databases=[wanted["owner"]] + settings["databases"], plugin="plugin=" in wanted["url"],
        max_connections=_configured(settings["config"]),
        lease_ttl=settings["lease_ttl"], silent=0.0,
    )
    if wanted["endpoint"] and os.path.isdir(Layout(wanted["root"]).run):
        still = _lease(wanted).still() or 0.0
        wanted["silent"] = still if still > wanted["lease_ttl"] else 0.0
    return wanted


def _lease(wanted: dict) -> lease.Lease:
    return lease.Lease(Layout(wanted["root"]).run, {"pid": os.getpid()}, lambda _holder: False)


def _is_dead(wanted: dict) -> bool:
    """Return whether a server that does not answer has also stopped renewing its lease; wait up to the TTL to know."""
    seen = _lease(wanted)
    beat = "" if wanted["silent"] else seen.beat()
    limit = time.monotonic() + wanted["lease_ttl"] - (seen.still() or 0.0)
    while beat and seen.beat() == beat:
        if time.monotonic() > limit:
            wanted["silent"] = seen.still() or wanted["lease_ttl"]
            break
        time.sleep(PAUSE_SECONDS)
    return bool(wanted["silent"])


def _configured(path: str) -> int:
    """Return max_connections of a configuration file: its last entry, or PostgreSQL's default."""
    try:
        with open(path) as stream:
            found = re.findall(r"^max_connections\s*=\s*'?(\d+)", stream.read(), re.MULTILINE)
    except OSError:
        found = []
    return int(found[-1]) if found else 100


def look_at_server(wanted: dict) -> Report:
    """Run the checks whose results are the same on every node."""
    report = Report()
    _look_at_job(report, wanted)
    _look_at_modes(report, wanted)
    _look_at_logs(report, wanted)
    return report


def _look_at_job(report: Report, wanted: dict) -> None:
    job, state, serves = wanted["job"], wanted["state"] or {}, bool(wanted["endpoint"])
    said = "no server job is queued or running"
    if job:
        where = " on %s" % job["node"] if job["node"] else ""
        why = " (%s)" % job["reason"] if job["reason"] and job["state"] != "RUNNING" else ""
        said = "job %s %s%s%s" % (job["id"], job["state"], where, why)
    if serves and wanted["silent"]:
        report.found("job", "%s, but the server has sent no heartbeat for %.0f s: its node may be dead" % (
            said, wanted["silent"]), "wait until the scheduler has ended the job; then %s, if no other job is queued" %
            HOST_IT)
    elif serves:
        report.well("job", said)
    elif job and job["state"] == "RUNNING":
        report.found("job", "%s, but the server is down: it is still starting, or has stopped" % said,
                     "wait, or see %s" % Layout(wanted["root"]).job_log)
    elif job:
        report.found("job", "%s, so the server is down" % said,
                     "wait; if it never starts: server_job_options (partition, time, mem)")
    elif wanted.get("rests"):
        report.well("job", "no server runs; the next worker's job starts it")
    else:
        report.found("job", "%s, so the server is down" % said, HOST_IT)
    if state.get("state") in ("failed", "unhealthy"):
        meaning, mend = causes.explain(state["reason"], wanted)
        report.found("state", "%s: %s" % (state["state"], _with_words(meaning, state["reason"])), mend)
    elif serves and not wanted["silent"]:
        report.well("state", "%s: %s" % (state.get("state"), state.get("reason")))


def _with_words(meaning: str, words: str) -> str:
    return meaning if meaning == words else "%s (%s)" % (meaning, words)


def _look_at_modes(report: Report, wanted: dict) -> None:
    private = ("", "conf", "data", "log", "run", "secrets", "conf/server.key", "secrets/pgpass")
    paths = [os.path.join(wanted["root"], name) if name else wanted["root"] for name in private]
    opened = [path for path in paths if os.path.exists(path) and os.stat(path).st_mode & 0o077]
    if opened:
        report.found("modes", "open to others: %s" % ", ".join(opened), "chmod go= %s" % " ".join(opened))
    else:
        report.well("modes", "nothing below %s is open to others" % wanted["root"])


def _look_at_logs(report: Report, wanted: dict) -> None:
    """Report fatal events, except those before the last change of the settings, which may have fixed the cause."""
    changed = [_changed(path) for path in (wanted["config"], Layout(wanted["root"]).hba)]
    since = max([time.time() - 3600 * wanted["log_hours"]] + changed)
    events = causes.read_logs(Layout(wanted["root"]).log, since, wanted)
    for event in events:
        report.found("log", event.text(), event.mend)
    if not events:
        report.well("log", "nothing fatal since %s UTC" % time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(since)))


def _changed(path: str) -> float:
    try:
        return os.path.getmtime(path)
    except OSError:
        return 0.0


def look_from_here(wanted: dict) -> Report:
    """Run the checks whose results may differ between nodes."""
    report = Report()
    if not os.path.isdir(wanted["root"]):
        report.found("files", "%s does not exist" % wanted["root"],
                     "instance_root: use a folder on a file system that login and compute nodes share")
        return report
    layout = Layout(wanted["root"])
    # The playbook has found on the login node whether the server is live; if it is not, the file is stale.
    endpoint = read_endpoint(layout) if wanted["endpoint"] else None
    if wanted["endpoint"] and not endpoint:
        report.found("files", "%s is missing on this node, but the login node has just read it" % layout.endpoint,
                     "instance_root: use a folder on a file system that login and compute nodes share")
        return report
    entry = _look_at_service(report, wanted, endpoint)
    _look_at_passwords(report, entry.get("passfile", layout.pgpass))
    if endpoint is None:
        _skip_network(report, "the server is down")
    else:
        _look_at_network(report, wanted, endpoint["host"], int(endpoint["port"]))
    serves = endpoint is not None and not wanted["silent"]
    side = _look_at_python(report, wanted, "management", wanted["python_side"], "", serves, {})
    if wanted["environment"]:
        _look_at_python(report, wanted, "workers", wanted["environment"], "client_environment", serves, side)
    return report


def _look_at_service(report: Report, wanted: dict, endpoint: Optional[dict]) -> Dict[str, str]:
    """Check the service entry, which libpq reads at each connect; return it."""
    path = os.environ.get("PGSERVICEFILE") or os.path.expanduser("~/.pg_service.conf")
    entry = read_section(path, wanted["instance"])
    where = "[%s] in %s" % (wanted["instance"], path)
    unset = "unset PGSERVICEFILE in the job; it hides ~/.pg_service.conf" if os.environ.get("PGSERVICEFILE") else ""
    if endpoint is None:
        if entry:
            report.found("service", "%s points to a server that is down" % where, HOST_IT)
        else:
            report.skipped("service", "the server is down, so the entry is not needed")
    elif not entry:
        shared = "%s; if the login node has it, the nodes do not share the home directory" % HOST_IT_AGAIN
        report.found("service", "%s is missing" % where, unset or shared)
    elif (entry.get("host"), entry.get("port")) != (str(endpoint["host"]), str(endpoint["port"])):
        report.found("service", "%s points to %s port %s, but the server is on %s port %s" % (
            where, entry.get("host"), entry.get("port"), endpoint["host"], endpoint["port"]), unset or HOST_IT_AGAIN)
    else:
        report.well("service", "%s points to %s port %s" % (where, entry["host"], entry["port"]))
    return entry


def read_section(path: str, name: str) -> Dict[str, str]:
    """Return the parameters of a libpq service: the first section of that name; empty if there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            text = stream.read()
    except OSError:
        return {}
    inside, found = False, {}  # type: bool, Dict[str, str]
    for line in text.splitlines():
        heading = re.match(r"\s*\[([^\]]*)", line)
        if heading and inside:
            break
        if heading:
            inside = heading.group(1) == name
        elif inside and "=" in line and not line.lstrip().startswith("#"):
            key, _sign, value = line.partition("=")
            found[key.strip()] = value.strip()
    return found


def _look_at_passwords(report: Report, path: str) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        report.found("passwords", "%s: %s" % (path, error.strerror), HOST_IT)
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        report.found("passwords", "%s has mode %04o: libpq ignores it, and others may read it" % (path, mode),
                     "chmod 600 %s; then the playbook rotate.yml, if others could enter its folder" % path)
    elif found.st_uid != os.geteuid():
        report.found("passwords", "%s belongs to another user" % path, HOST_IT)
    else:
        report.well("passwords", "only you can read %s (%04o)" % (path, mode))


def _look_at_network(report: Report, wanted: dict, host: str, port: int) -> None:
    if host.startswith("/"):
        _look_at_socket(report, os.path.join(host, ".s.PGSQL.%d" % port))
        return
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        if _is_dead(wanted):
            _skip_network(report, "the server sends no heartbeat, and %s cannot be resolved" % host)
            return
        report.found("name", "%s cannot be resolved: %s" % (host, error.strerror or error),
                     "server_address: a name or an address that every node can resolve")
        for check in ("port", "TLS"):
            report.skipped(check, "the name cannot be resolved")
        return
    elsewhere = host not in (socket.gethostname(), "localhost", "127.0.0.1", "::1")
    if elsewhere and all(address.startswith("127.") or address == "::1" for address in addresses):
        report.found("name", "%s resolves to %s, which is this node itself" % (host, ", ".join(addresses)),
                     "server_address: a name or an address that leads every node to the server")
    else:
        report.well("name", "%s resolves to %s" % (host, ", ".join(addresses)))
    try:
        began = time.monotonic()
        with socket.create_connection((host, port), PORT_SECONDS) as connection:
            wanted["silent"] = 0.0  # it answers, so the file's time was misleading: clocks differ
            report.well("port", "%s port %d answers after %.0f ms" % (host, port, 1000 * (time.monotonic() - began)))
            _look_at_tls(report, wanted, connection)
    except OSError as error:
        if _is_dead(wanted):
            _skip_network(report, "the server sends no heartbeat, and nothing answers")
            return
        meaning, mend = causes.explain(error.strerror or str(error), wanted)
        report.found("port", "%s port %d: %s" % (host, port, _with_words(meaning, error.strerror or str(error))), mend)
        report.skipped("TLS", "nothing answers")


def _skip_network(report: Report, why: str) -> None:
    for check in ("name", "port", "TLS"):
        if check not in [told["check"] for told in report.findings]:
            report.skipped(check, why)


def _look_at_socket(report: Report, path: str) -> None:
    report.skipped("name", "the server listens on a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PORT_SECONDS)
        try:
            connection.connect(path)
        except OSError as error:
            report.found("port", "%s: %s" % (path, error.strerror or error),
                         "server_address: a host name, if workers are on other nodes; else %s" % HOST_IT_AGAIN)
        else:
            report.well("port", "%s answers" % path)
    report.skipped("TLS", "a socket needs none")


def _look_at_tls(report: Report, wanted: dict, connection: socket.socket) -> None:
    """Check TLS and the server's certificate: a port that we have left may belong to somebody else's server."""
    try:
        import ssl
    except ImportError:
        report.skipped("TLS", "this node's Python was built without TLS")
        return
    try:
        connection.sendall(SSL_REQUEST)
        answer = connection.recv(1)
        if answer != b"S":
            if wanted["tls"]:
                report.found("TLS", "the server offers no TLS", "postgres_tls: %s" % HOST_IT_AGAIN)
            else:
                report.well("TLS", "off, as postgres_tls says")
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with context.wrap_socket(connection) as encrypted:
            theirs, version = encrypted.getpeercert(True), encrypted.version()
    except OSError as error:  # includes SSLError
        report.found("TLS", "the handshake failed: %s" % error, "postgres_tls: %s" % HOST_IT_AGAIN)
        return
    path = Layout(wanted["root"]).certificate
    try:
        with open(path) as stream:
            ours = ssl.PEM_cert_to_DER_cert(stream.read())
    except (OSError, ValueError):
        ours = b""
    if theirs != ours:
        report.found("TLS", "the server's certificate is not %s: another user's server, or a new certificate" % path,
                     HOST_IT_AGAIN)
    else:
        report.well("TLS", "%s, with the certificate of this instance" % version)


def _look_at_python(
    report: Report, wanted: dict, check: str, python: str, setting: str, serves: bool, side: dict
) -> dict:
    """Check an environment by connecting from it. ``side`` is the management environment's result, for comparison."""
    url = wanted["url"] if setting else wanted["plain_url"]
    # Report a server that does not answer at once, without waiting for it.
    url += "&hpc_db_patience=0" if "plugin=" in url else ""
    try:
        held = ask_python(python_of(python), url)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        report.found(check, "%s does not run: %s" % (python, error), setting or HOST_IT)
        return {}
    wrong = missing_from(held, wanted, setting) or mismatch(held, setting, side)
    words = held.get("error", "")
    names = (("Python", "python"), ("psycopg2", "driver"), ("SQLAlchemy", "sqlalchemy"), ("Optuna", "optuna"),
             ("hpc-db-client", "hpc-db-client"))
    versions = ", ".join("%s %s" % (name, held[key]) for name, key in names if held.get(key))
    for said, mend in wrong:
        report.found(check, "%s: %s" % (python, said), mend)
    if not serves and not wrong:
        report.well(check, "%s; not connected, since the server is down" % versions)
    elif serves and words:
        meaning, mend = causes.explain(words, wanted)
        report.found(check, "%s cannot connect: %s" % (python, _with_words(meaning, words)), mend)
    elif serves and not wrong:
        used, largest = held["used"], held["max_connections"]
        report.well(check, "%s; connected, %d of %d connections are used" % (versions, used, largest))
        if not setting and largest != wanted["max_connections"]:
            report.found("connections", "the server still allows %d, but its configuration says %d" % (
                largest, wanted["max_connections"]), HOST_IT_AGAIN)
    return held


def python_of(environment: str) -> str:
    """Return the Python of an environment, which is given by its folder or by its Python."""
    path = os.path.expanduser(environment)
    return os.path.join(path, "bin", "python") if os.path.isdir(path) else path


def ask_python(python: str, url: str) -> dict:
    """Run probe.py with an environment's Python; return its result."""
    probe = os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py")
    # These are set for the import of this package, and must not affect other environments.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python, probe, url], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=PROBE_SECONDS, check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ValueError((done.stderr.strip().splitlines() or ["exit code %d" % done.returncode])[-1])
    return json.loads(lines[-1])


def missing_from(held: dict, wanted: dict, setting: str) -> List[tuple]:
    """Return missing or unsuitable packages of an environment, each with its fix."""
    into = "%s: %s installs it there" % (setting, HOST_IT) if setting else "postgres_python_packages"
    if _numbers(held["python"]) < [3, 9]:
        return [("Python %s is too old, workers need 3.9" % held["python"], setting or "postgres_python")]
    wrong = []
    if not held["driver"]:
        wrong.append(("psycopg2 cannot be imported: %s" % held["why"], into))
    if not held["sqlalchemy"]:
        wrong.append(("SQLAlchemy is missing", into))
    elif setting and not list(OLDEST_SQLALCHEMY) <= _numbers(held["sqlalchemy"]) < list(NEWEST_SQLALCHEMY):
        wrong.append(("SQLAlchemy %s, but the plugin needs 1.4.24 to 2.1" % held["sqlalchemy"],
                      "%s: install SQLAlchemy>=1.4.24,<2.2 there" % setting))
    if not held["optuna"]:
        wrong.append(("Optuna is missing", "%s: install optuna>=3.2 there" % setting if setting else into))
    if setting and wanted["plugin"] and not held["hpc-db-client"]:
        wrong.append(("hpc-db-client is missing, but the URL's plugin=hpc_db needs it", into))
    return wrong


def mismatch(held: dict, setting: str, side: dict) -> List[tuple]:
    """Return reasons why the environment's Optuna cannot work on the studies, each with its fix."""
    where = setting or "postgres_python_packages"
    schema = Schema(*held["schema"]) if held.get("schema") else None
    optuna = Optuna(held["optuna"], held.get("revisions") or [])
    if schema and is_newer(schema, optuna):
        return [("Optuna %s does not support the tables of Optuna %s" % (optuna.version, schema.library),
                 "%s: install optuna==%s there" % (where, schema.library))]
    if schema and is_older(schema, optuna):
        return [("Optuna %s needs newer tables than those of Optuna %s" % (optuna.version, schema.library),
                 "databases_upgrade_schema, or %s: install optuna==%s there" % (where, schema.library))]
    ours, theirs = side.get("optuna", ""), held["optuna"]
    # Optuna 4 writes local time, Optuna 5 writes UTC.
    if ours and {major >= 5 for major in (_numbers(ours)[0], _numbers(theirs)[0])} == {True, False}:
        return [("Optuna %s, but the management environment has %s: only one of them writes UTC" % (theirs, ours),
                 "postgres_python_packages: optuna==%s, or %s: install optuna==%s there" % (theirs, where, ours))]
    return []


def _numbers(version: str) -> List[int]:
    """Return the leading numbers of a version; [0] if there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in found.group().split(".")] if found else [0]


def main() -> int:
    """Print the findings as JSON."""
    parser = argparse.ArgumentParser(prog="hpc_db_host.doctor", description=__doc__)
    parser.add_argument("--wanted", required=True, help="the inventory's settings, as JSON")
    parser.add_argument("--server", action="store_true", help="also check job, state and logs")
    arguments = parser.parse_args()
    wanted = read_wanted(arguments.wanted)
    answer = {"host": socket.gethostname(), "here": look_from_here(wanted).findings}
    if arguments.server:
        answer["server"] = look_at_server(wanted).findings
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
