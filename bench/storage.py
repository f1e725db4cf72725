#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure Optuna on every storage that workers can share, one after the other in one run.

Run it as the owner of a running instance, with the Python of the instance; storages that the instance does not have
(``server_pooler``, ``server_proxy``) are left out:

    ~/hpc_db/hpc_db/python/bin/python bench/storage.py --client client/src results.json

Workers are threads with a storage of their own, spread over a few processes that are new for each measurement. All
start together; each asks, suggests three parameters and tells until the time is over, without any pause. A worker ends
at its first error, as does a worker whose ``study.optimize`` raises.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import pwd
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORKERS = [1, 20, 60, 120, 200, 1000]
# Seconds of a measurement, from the start of all workers; the rate is that of the second half.
SECONDS = {1: 10.0, 2: 1.5, 20: 20.0, 60: 30.0, 120: 8.0, 200: 12.0, 1000: 40.0}
OTHER_SECONDS = 10.0
# This time suffices for storages whose workers fail or wait at once, and for files.
SHORT = ("manual", "pooled", "SQLite", "journal")
SHORT_SECONDS = 12.0
# Mean interval between the first trials of workers, since real trials also differ in time: otherwise a thousand workers
# ask at once, and none of them is served in time.
APART_SECONDS = 0.02
# PostgreSQL's default, which the manual's recipe keeps.
MANUAL_CONNECTIONS = 100
# Additional time for the start and the end of a process.
SPARE_SECONDS = 30.0
# Filters for the server's connections that belong to workers or are opened for them.
NETWORK = "client_addr IS NOT NULL"
PROXY = "application_name = 'hpc_db-proxy'"
POOLER = f"client_addr IS NULL AND usename = 'study' AND NOT {PROXY}"


class Server:
    """A PostgreSQL server, as accessed by its owner."""

    def __init__(self, bindir: Path, conninfo: str, port: int) -> None:
        self.port = port
        self._psql = [str(bindir / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", conninfo, "-c"]

    def ask(self, statement: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return subprocess.run(
            [*self._psql, statement], env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def connections(self, which: str) -> int:
        return int(self.ask(f"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND {which}"))


class Way:
    """A storage under test: the URL that workers open, and the server behind it, if there is one."""

    def __init__(self, name: str, url: str, server: Server | None = None, connections: str = NETWORK) -> None:
        self.name = name
        self.url = url
        self.server = server
        self.connections = connections


@contextlib.contextmanager
def manual_server(bindir: Path, folder: Path, shared_buffers: str) -> Iterator[Server]:
    """Run a server by the manual's recipe: initdb's own settings, no password, no TLS.

    The recipe lets everyone log in as the owner. Here the role has no special rights and is limited to this host.
    """
    data, sockets = folder / "manual", tempfile.mkdtemp(prefix="bench-")
    subprocess.run(
        [bindir / "initdb", "--auth=reject", "--auth-local=peer", "-D", data], check=True, capture_output=True
    )
    (data / "pg_hba.conf").write_text("local all all peer\nhost studies study 127.0.0.1/32 trust\n")
    port = free_port()
    options = {
        "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": sockets,
        "max_connections": MANUAL_CONNECTIONS, "shared_buffers": shared_buffers,
    }
    command = [str(bindir / "postgres"), "-D", str(data)]
    command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    with open(folder / "manual.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as postgres:
        try:
            server = Server(bindir, f"host={sockets} port={port} dbname=postgres", port)
            wait_for(server)
            server.ask("CREATE ROLE study LOGIN")
            server.ask("CREATE DATABASE studies OWNER study")
            yield server
        finally:
            postgres.send_signal(signal.SIGINT)
            postgres.wait(60)
            shutil.rmtree(sockets)


def wait_for(server: Server) -> None:
    limit = time.monotonic() + 60
    while True:
        try:
            server.ask("SELECT 1")
            return
        except subprocess.CalledProcessError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- in a worker process


def open_storage(url: str) -> Any:
    """Return a new storage, opened as a separate process would open it."""
    import optuna

    kind, _colon, rest = url.partition(":")
    if kind == "proxy":
        from hpc_db_client import proxy

        return proxy.storage(rest)
    if kind == "journal":
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(rest))
    return optuna.storages.get_storage(url)


def prepare() -> None:
    """Silence this process, and register the plugin in case the client package is not installed."""
    import warnings

    import optuna

    warnings.simplefilter("ignore")
    optuna.logging.disable_default_handler()
    with contextlib.suppress(ImportError):
        import hpc_db_client.patience
        from sqlalchemy.dialects import plugins

        plugins.register("hpc_db", "hpc_db_client.plugin", "HpcDb")
        hpc_db_client.patience.tell = lambda text: None  # otherwise it prints a thousand messages


def work(url: str, study_name: str, start: float, end: float, apart: float, said: dict[str, Any]) -> None:
    """Run one worker; record when it connected, and for each trial its end and the duration of ask and tell."""
    import optuna

    time.sleep(max(0.0, start - time.time()))
    try:
        study = optuna.load_study(
            study_name=study_name, storage=open_storage(url), sampler=optuna.samplers.RandomSampler()
        )
        said["in"] = time.time() - start
        time.sleep(max(0.0, min(random.uniform(0, apart), end - time.time())))
        while not said["trials"] or time.time() < end:
            began = time.perf_counter()
            trial = study.ask()
            asked = time.perf_counter()
            value = sum(trial.suggest_float(name, 0, 1) for name in "xyz")
            suggested = time.perf_counter()
            study.tell(trial, value)
            said["trials"].append((time.time(), asked - began, time.perf_counter() - suggested))
    except Exception as error:
        if time.time() < end:
            said["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def be_workers(
    pipe: Connection, url: str, study_name: str, number: int, start: float, end: float, apart: float, patience: float
) -> None:
    """Run some of the workers; send their records when the time is over, even if workers are still waiting."""
    prepare()
    found: list[dict[str, Any]] = [{"in": None, "trials": [], "error": ""} for _worker in range(number)]
    threads = [
        threading.Thread(target=work, args=(url, study_name, start, end, apart, said), daemon=True) for said in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + patience - time.time()))
    pipe.send(found)
    pipe.close()
    os._exit(0)  # some threads may wait for ever


def create_study(pipe: Connection, url: str, study_name: str) -> None:
    """Create tables and study before any worker starts."""
    import optuna

    prepare()
    optuna.create_study(study_name=study_name, storage=open_storage(url))
    pipe.send(None)
    os._exit(0)


# --- in the measuring process


def run_process(target: Any, *arguments: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(process: Any, pipe: Connection, limit: float) -> Any:
    """Return the object that a process sends; kill the process if it is late."""
    try:
        if not pipe.poll(max(0.1, limit - time.time())):
            raise RuntimeError("a process of workers did not answer in time")
        return pipe.recv()
    finally:
        process.kill()
        process.join()


def measure(way: Way, workers: int, seconds: float, processes: int, patience: float) -> dict[str, Any]:
    """Start this many workers together; return the figures."""
    study_name = f"bench-{os.getpid()}-{time.time()}"
    made = run_process(create_study, way.url, study_name)
    receive(*made, time.time() + 2 * SPARE_SECONDS)
    processes = min(workers, processes)
    shares = [workers // processes + (number < workers % processes) for number in range(processes)]
    start = time.time() + 1.0 + workers / 1000
    end = start + seconds
    apart = workers * APART_SECONDS
    started = [run_process(be_workers, way.url, study_name, share, start, end, apart, patience) for share in shares]
    most = 0
    while way.server and time.time() < end - 0.3:
        with contextlib.suppress(subprocess.SubprocessError):
            most = max(most, way.server.connections(way.connections))
        time.sleep(min(0.5, seconds / 4))
    found = [said for process, pipe in started for said in receive(process, pipe, end + patience + SPARE_SECONDS)]
    return {"way": way.name, "workers": workers, "connections": most if way.server else None,
            **figures(found, start, seconds)}


def figures(found: list[dict[str, Any]], start: float, seconds: float) -> dict[str, Any]:
    """Summarise the workers' records."""
    trials = [trial for said in found for trial in said["trials"]]
    late = [trial for trial in trials if start + seconds / 2 <= trial[0] <= start + seconds]
    entered = sorted(said["in"] for said in found if said["in"] is not None)
    return {
        "rate": len(late) / (seconds / 2),
        "ask": milliseconds([trial[1] for trial in trials]),
        "tell": milliseconds([trial[2] for trial in trials]),
        "in": len(entered),
        "in_seconds": entered[-1] if entered else None,
        "died": sum(1 for said in found if said["error"]),
        "died_inside": sum(1 for said in found if said["error"] and said["in"] is not None),
        "errors": Counter(said["error"] for said in found if said["error"]).most_common(3),
    }


def milliseconds(taken: list[float]) -> dict[str, float] | None:
    if not taken:
        return None
    ordered = sorted(taken)
    return {"median": 1000 * statistics.median(ordered), "p99": 1000 * ordered[int(0.99 * (len(ordered) - 1))]}


def ways_of(root: Path, folder: Path, manual: Server, plugin: bool) -> list[Way]:
    """Return all available storages."""
    endpoint = published(root)
    name = endpoint["instance"]
    server = server_of(root, endpoint)
    direct, pooled = (f"postgresql+psycopg2:///?service={service}" for service in (name, f"{name}-pooled"))
    ways = [
        Way("manual", f"postgresql+psycopg2://study@127.0.0.1:{manual.port}/studies", manual),
        Way("direct", direct, server),
    ]
    if plugin:
        ways.append(Way("direct, plugin", f"{direct}&plugin=hpc_db", server))
    if "pooler" in endpoint:
        ways.append(Way("pooled", pooled, server, POOLER))
    if "pooler" in endpoint and plugin:
        ways.append(Way("pooled, plugin", f"{pooled}&plugin=hpc_db", server, POOLER))
    if "proxy" in endpoint and plugin:
        ways.append(Way("proxy", f"proxy:{root}", server, PROXY))
    return [*ways, Way("SQLite", f"sqlite:///{folder}/bench.sqlite3"), Way("journal", f"journal:{folder}/bench.log")]


def published(root: Path) -> dict[str, Any]:
    """Return the endpoint, once it has everything that the settings ask for."""
    settings = json.loads((root / "host" / "settings.json").read_text())
    limit = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError, ValueError):
            endpoint = json.loads((root / "run" / "endpoint.json").read_text())
            if all(name in endpoint for name in ("pooler", "proxy") if settings.get(name)):
                return endpoint
        if time.monotonic() > limit:
            sys.exit(f"{root}: no server, pooler or proxy as its settings say")
        time.sleep(0.2)


def server_of(root: Path, endpoint: dict[str, Any]) -> Server:
    """Return the instance's server, as its owner connects from any node."""
    owner = pwd.getpwuid(os.geteuid()).pw_name
    return Server(bindir_of(root), f"service={endpoint['instance']} user={owner} dbname={owner}", endpoint["port"])


def bindir_of(root: Path) -> Path:
    return Path(json.loads((root / "host" / "settings.json").read_text())["bindir"])


def machine(folder: Path) -> dict[str, Any]:
    """Describe the machine without its name."""
    with contextlib.suppress(OSError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        system = subprocess.run(
            ["stat", "--file-system", "--format=%T", str(folder)], capture_output=True, text=True, check=False
        ).stdout.strip()
        return {"cores": os.cpu_count(), "gib": round(pages / 2**30), "file_system": system,
                "python": platform.python_version()}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output file, JSON")
    parser.add_argument("--root", type=Path, default=Path("~/hpc_db/hpc_db"), help="the instance directory")
    parser.add_argument("--client", type=Path, help="the client package's folder, unless it is installed")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="how many (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", help="only these storages")
    parser.add_argument("--processes", type=int, default=2 * (os.cpu_count() or 1), help="that workers share")
    parser.add_argument("--quick", action="store_true", help="a short test run with two workers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that our own server is stopped
    if arguments.client:
        sys.path.insert(0, str(arguments.client.resolve()))
    import optuna

    plugin = False
    with contextlib.suppress(ImportError):
        import hpc_db_client  # noqa: F401

        plugin = True
    multiprocessing.get_context("forkserver").set_forkserver_preload(["optuna", "sqlalchemy.orm", "psycopg2"])
    root = arguments.root.expanduser()
    results = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=root / "log")))
        endpoint = published(root)
        server = server_of(root, endpoint)
        buffers = server.ask("SHOW shared_buffers")
        manual = stack.enter_context(manual_server(bindir_of(root), folder, buffers))
        ways = ways_of(root, folder, manual, plugin)
        told = {
            **machine(folder), "optuna": optuna.__version__, "postgresql": server.ask("SHOW server_version"),
            "shared_buffers": buffers, "max_connections": server.ask("SHOW max_connections"),
            "tls": server.ask("SHOW ssl"), "processes": arguments.processes,
            "settings": {
                name: json.loads((root / "host" / "settings.json").read_text()).get(name, {}).get("connections")
                for name in ("pooler", "proxy")
            },
        }
        for workers in [2] if arguments.quick else arguments.workers:
            for way in ways:
                if arguments.ways and way.name not in arguments.ways:
                    continue
                seconds = SECONDS.get(workers, OTHER_SECONDS)
                seconds = min(seconds, SHORT_SECONDS) if way.name in SHORT else seconds
                # A quick run needs only one trial per worker, however slow the machine is.
                result = measure(way, workers, seconds, arguments.processes, 60.0 if arguments.quick else 1.0)
                results.append(result)
                print(one_line(result), flush=True)
    arguments.out.write_text(json.dumps({"machine": told, "results": results}, indent=1) + "\n")


def one_line(result: dict[str, Any]) -> str:
    ask, tell = (result[name] or {"median": float("nan"), "p99": float("nan")} for name in ("ask", "tell"))
    return (
        f"{result['workers']:5d} {result['way']:15} {result['rate']:7.1f}/s  ask {ask['median']:7.1f} {ask['p99']:8.1f}"
        f"  tell {tell['median']:7.1f} {tell['p99']:8.1f} ms  in {result['in']:4d} ({result['in_seconds'] or 0:5.1f} s)"
        f"  died {result['died']:4d}  connections {result['connections']}"
        + (f"  {result['errors'][0][0][:90]}" if result["errors"] else "")
    )


if __name__ == "__main__":
    main()
