#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the playbooks and the equivalent bare commands in one run, and write a page's table.

Runs on this machine, with a user of its own if started by root, and, only as root, on the test cluster over ssh, with
additional round-trip times of 0, 20 and 100 ms. All packages are on this machine beforehand.

    bench/provision.py docs/figures/performance.md
    bench/provision.py --quick --places mini+20
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import pwd
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import write_page

REPOSITORY = Path(__file__).resolve().parents[1]
BENCH = REPOSITORY / "bench"
CACHE = REPOSITORY / ".cache"
CLUSTER = REPOSITORY / "tests" / "cluster" / "cluster"
PATH = f"{REPOSITORY}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLACES = ["local", "mini+0", "mini+20", "mini+100"]
REPEATS = 5
LONGEST = 600
PARTITION = "work"
STUDIES = [{"name": "studies", "studies": [{"name": "bench"}]}]
# The measurements in their order: the title on the page, and the playbook with its arguments.
MANUAL, NEW, AGAIN, CLOSELY, FACTS, START_UP = "manual", "new", "again", "closely", "facts", "start_up"
PLAYS = {
    NEW: ("`hpc_db.yml` from nothing", ["hpc_db.yml"]),
    AGAIN: ("`hpc_db.yml` with nothing to do", ["hpc_db.yml"]),
    CLOSELY: ("the same at every step (`server_look_closely`)", ["hpc_db.yml", "-e", "server_look_closely=true"]),
    "check": ("`hpc_db.yml --check`", ["hpc_db.yml", "--check"]),
    "status": ("`status.yml`", ["status.yml"]),
    FACTS: ("a play that gathers two facts", [str(BENCH / "facts.yml")]),
}
TITLES = {MANUAL: "the manual's commands", **{name: title for name, (title, _arguments) in PLAYS.items()}}
# The pairs to compare, and the maximum ratio at each place.
TARGETS = {NEW: (MANUAL, {"local": 3.0, "mini+20": 4.0}), AGAIN: (FACTS, dict.fromkeys(PLACES, 1.5))}
START_UP_TARGET = 1.0
PR_SET_CHILD_SUBREAPER = 36


class Figures(NamedTuple):
    """The figures of one run; unknown ones are None."""

    wall: float
    cpu: float
    cpu_there: float | None
    executions: int | None
    connections: int | None
    sent: int | None


class Counters(NamedTuple):
    """The counters so far, on the way to another machine."""

    cpu: float
    executions: int
    connections: int
    sent: int


class Place:
    """A place for instances: this machine, with a user without other instances."""

    name = "local"
    delay = 0
    host = "localhost"

    def __init__(self, folder: Path, user: pwd.struct_passwd) -> None:
        self.user = user
        # the current user may have other instances, which are not in the tests' home directory
        self.home = CACHE / "home" if user.pw_uid == os.geteuid() else Path(user.pw_dir)
        self.inventories = [REPOSITORY / "inventories" / "local", folder / "local.json"]
        self.settings: dict[str, Any] = {
            "ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "postgres_python_wheelhouse": str(CACHE / "wheels"),
        }
        self.environment = {
            "HOME": str(self.home), "USER": user.pw_name, "PATH": PATH, "LANG": "C.UTF-8",
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_COLLECTIONS_PATH": str(CACHE / "collections"),
            "ANSIBLE_CALLBACK_PLUGINS": str(BENCH / "callback_plugins"), "ANSIBLE_CALLBACKS_ENABLED": "profile",
        }

    def describe(self, *instances: dict[str, Any]) -> None:
        """Write an inventory with one instance for each of these settings."""
        hosts = {
            f"{self.host}{number or ''}": {
                **self.settings, "instance_name": f"bench{number or ''}", "databases_studies": STUDIES, **settings,
            }
            for number, settings in enumerate(instances)
        }
        self.inventories[1].write_text(json.dumps({"hpc_db": {"hosts": hosts}}))

    def manual(self) -> list[str]:
        return ["sh", str(BENCH / "manual.sh"), str(self.home / "manual"), str(CACHE / "wheels")]

    def play(self, arguments: list[str]) -> list[str]:
        playbook = str(REPOSITORY / "playbooks" / arguments[0])
        inventories = [f"--inventory={inventory}" for inventory in self.inventories]
        return ["ansible-playbook", *inventories, playbook, *arguments[1:]]

    def run(self, command: list[str], **more: str) -> str:
        """Run a command as the user; return its output."""
        mine = os.geteuid() == self.user.pw_uid
        done = subprocess.run(
            command, env={**self.environment, **more}, cwd=None if mine else self.home, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST, check=False,
            user=None if mine else self.user.pw_uid, group=None if mine else self.user.pw_gid,
            extra_groups=None if mine else [],
        )
        if done.returncode:
            sys.exit(f"{Path(sys.argv[0]).name}: {shlex.join(command)} failed on {self.name}\n{done.stdout}")
        return done.stdout

    def clear(self) -> None:
        """Remove everything that was created; downloaded packages stay."""
        manual = self.home / "manual"
        if (manual / "data" / "postmaster.pid").exists():
            pid = (manual / "data" / "postmaster.pid").read_text().split()[0]
            os.kill(int(pid), 2)
            until(lambda: not Path("/proc", pid).exists() or reap())
        instances = list((self.home / "hpc_db").glob("bench*"))
        if instances:
            self.run(self.play(["stop.yml"]), HPC_DB_PROFILE=os.devnull)
        for folder in (manual, *instances):
            shutil.rmtree(folder, ignore_errors=True)

    def shell(self, script: str) -> str:
        """Run a shell script in the user's home directory at this place; return its output."""
        return self.run(["sh", "-c", f"cd; {script}"])

    def disconnect(self) -> None:
        """Close the connections that an earlier run has left open."""

    def count(self) -> Counters | None:
        return None

    def start_up(self) -> tuple[float, float] | None:
        """Measure the start of an empty job, and of the server."""
        return None


class Mini(Place):
    """The test cluster over ssh, with an additional delay of the network."""

    host = "mini"

    def __init__(self, folder: Path, user: pwd.struct_passwd, state: Path, delay: int) -> None:
        super().__init__(folder, user)
        self.name, self.delay, self.state = f"mini+{delay}", delay, state
        self.inventories = [REPOSITORY / "molecule" / "default" / "inventory", folder / "mini.json"]
        self.settings = {
            "ansible_host": "login", "ansible_user": "alice", "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_common_args": f"-F {state}/ssh_config", "ansible_control_path_dir": f"{state}/control",
            "server_look_closely": False,
        }
        self.environment["HPC_DB_CLUSTER"] = str(state)
        self.home = Path("/home/alice")

    def _cluster(self, *arguments: str) -> str:
        command = [str(CLUSTER), arguments[0], "--state", str(self.state), *arguments[1:]]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LONGEST).stdout

    def manual(self) -> list[str]:
        return [
            "ssh", "-F", str(self.state / "ssh_config"), "login",
            f"sh /srv/bench/manual.sh {self.home}/manual /srv/wheels file:///srv/channel",
        ]

    def clear(self) -> None:
        empty = "scancel --me; while squeue --me -h | grep -q .; do sleep 0.1; done"
        self.shell(f"{empty}; rm -rf manual hpc_db .pg_service.conf")

    def shell(self, script: str) -> str:
        return self._cluster("exec", "login", "--user", "alice", "--", "sh", "-c", script)

    def disconnect(self) -> None:
        for socket in (self.state / "control").glob("*"):
            subprocess.run(["ssh", "-O", "exit", "-S", socket, "login"], capture_output=True)
        self._cluster("delay", "login", str(self.delay))

    def count(self) -> Counters:
        log = (self.state / "log" / "login-sshd.log").read_text(errors="replace")
        links = json.loads(self._cluster(
            "exec", "workstation", "--", "ip", "-stats", "-json", "link", "show", "login-campus"
        ))
        bytes_ = sum(links[0]["stats64"][way]["bytes"] for way in ("rx", "tx"))
        return Counters(
            self._cpu(), log.count("Starting session: "), log.count("Accepted publickey"), bytes_
        )

    def _cpu(self) -> float:
        """Return the CPU seconds of the login node's processes, including ended ones."""
        script = "cat /proc/[0-9]*/stat 2>/dev/null || true"
        lines = self._cluster("exec", "login", "--", "sh", "-c", script).splitlines()
        ticks = sum(sum(map(int, line.rpartition(")")[2].split()[11:15])) for line in lines)
        return ticks / os.sysconf("SC_CLK_TCK")

    def start_up(self) -> tuple[float, float] | None:
        if self.delay:
            return None
        self.shell("scancel --me; while squeue --me -h | grep -q .; do sleep 0.1; done")
        said = self.shell(f"python3 /srv/bench/start_up.py hpc_db/bench {PARTITION}")
        empty, server = said.split()
        return float(empty), float(server)


def until(condition: Any) -> None:
    limit = time.monotonic() + 60
    while not condition():
        if time.monotonic() > limit:
            sys.exit(f"{Path(sys.argv[0]).name}: a server does not end")
        time.sleep(0.05)


def bury_children_of_others() -> None:
    """Become the parent of processes that a run leaves behind, so that their CPU time is counted.

    SIGTERM becomes a normal exit, so that everything created is removed.
    """
    signal.signal(signal.SIGTERM, lambda *_unused: sys.exit(1))
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit(f"{Path(sys.argv[0]).name}: the kernel does not let it count what its children have left")


def reap() -> bool:
    """Collect the ended processes that others left to this one, which adds their CPU time to the count."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return False


def measure(place: Place, command: list[str], **more: str) -> Figures:
    """Run a command over a new connection."""
    place.disconnect()
    reap()
    before, used, began = place.count(), cpu(), time.monotonic()
    place.run(command, **more)
    wall = time.monotonic() - began
    after = place.count()
    place.disconnect()
    reap()
    if before is None or after is None:
        return Figures(wall, cpu() - used, None, None, None, None)
    there = [now - then for now, then in zip(after, before)]
    return Figures(wall, cpu() - used, there[0], *map(int, there[1:]))


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_place(place: Place, profile: Path) -> dict[str, Any]:
    """Measure everything once at this place."""
    place.describe({})
    place.clear()
    figures = {MANUAL: measure(place, place.manual())}
    place.clear()
    profiles = {}
    for name, (_title, arguments) in PLAYS.items():
        figures[name] = measure(place, place.play(arguments), HPC_DB_PROFILE=str(profile))
        profiles[name] = json.loads(profile.read_text())
    for name, figure in figures.items():
        print(f"{place.name:9} {name:8} {figure.wall:7.2f} s  {figure.cpu:6.2f} s of CPU  {figure[2:]}", flush=True)
    start_up = place.start_up()
    place.clear()
    return {
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "profiles": profiles, START_UP: start_up,
    }


@contextlib.contextmanager
def places(names: list[str], folder: Path) -> Iterator[list[Place]]:
    """Provide the places and remove them at the end."""
    with contextlib.ExitStack() as stack:
        found: list[Place] = []
        if "local" in names:
            user = stack.enter_context(ordinary_user(folder))
            found.append(Place(folder, user))
        delays = [int(name.partition("+")[2]) for name in names if name.startswith("mini")]
        if delays:
            state = stack.enter_context(cluster())
            me = pwd.getpwuid(os.geteuid())
            found += [Mini(folder, me, state, delay) for delay in delays]
        yield found


@contextlib.contextmanager
def ordinary_user(folder: Path) -> Iterator[pwd.struct_passwd]:
    """Return the current user; for root, create a temporary user."""
    if os.geteuid():
        yield pwd.getpwuid(os.geteuid())
        return
    name = f"hpc-db-bench-{os.getpid()}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    user = pwd.getpwnam(name)
    os.chown(folder, user.pw_uid, user.pw_gid)
    try:
        yield user
    finally:
        subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    build = [sys.executable, str(REPOSITORY / "tests/channel/build.py"), "--if-needed", str(CACHE / "channel")]
    subprocess.run([*build, "--python-wheels", str(CACHE / "wheels")], check=True, cwd=REPOSITORY)
    state = Path(f"/tmp/hpc-db-bench-{os.getpid()}")
    brought = {"wheels": CACHE / "wheels", "channel": CACHE / "channel", "bench": BENCH}
    mounts = [f"--mount={source}:/srv/{name}" for name, source in brought.items()]
    subprocess.run([CLUSTER, "up", "--state", state, "--nodes", "2", *mounts], check=True, stdout=subprocess.DEVNULL)
    try:
        yield state
    finally:
        subprocess.run([CLUSTER, "down", "--state", state], check=True)


# --- the page


def machine() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    system = subprocess.run(["stat", "-f", "-c", "%T", "/tmp"], capture_output=True, text=True).stdout.strip()
    ansible = subprocess.run(["ansible", "--version"], capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    return (
        f"{os.cpu_count()} cores ({model.group(1) if model else platform.machine()}) with {round(pages / 2**30)} GiB of"
        f" memory and {system}, Python {platform.python_version()}, ansible-core"
        f" {ansible.stdout.partition('core ')[2].partition(']')[0]}"
    )


def median(rounds: list[dict[str, Any]], name: str, figure: str) -> float | None:
    values = [each["figures"][name][figure] for each in rounds]
    return None if None in values else statistics.median(values)


def text_of(results: dict[str, list[dict[str, Any]]], where: str) -> str:
    """Return the tables as Markdown."""
    repeats = min(map(len, results.values()))
    parts = [
        f"Medians of {repeats}, on {where}; playbooks and cluster share the machine.\n", figures_table(results),
        ratios(results), profiles(results),
    ]
    return "\n".join(parts)


def figures_table(results: dict[str, list[dict[str, Any]]]) -> str:
    heads = ("where", "what", "s", "CPU s here", "CPU s there", "executions", "connections", "kB")
    lines = [heads, ["---", "---", *["---:"] * 6]]
    for place, rounds in results.items():
        for name in rounds[0]["figures"]:
            found = {figure: median(rounds, name, figure) for figure in Figures._fields}
            sent = found["sent"]
            lines.append([
                place, TITLES[name], *(shown(found[figure], 1) for figure in ("wall", "cpu", "cpu_there")),
                *(shown(found[figure], 0) for figure in ("executions", "connections")),
                shown(None if sent is None else sent / 1000, 0),
            ])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def ratios(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [("where", "what", "ratio", "target"), ("---", "---", "---:", "---:")]
    for place, rounds in results.items():
        for name, (base, wanted) in TARGETS.items():
            ratio = statistics.median(
                each["figures"][name]["wall"] / each["figures"][base]["wall"] for each in rounds
            )
            target = f"≤ {wanted[place]:.1f}" if place in wanted else "–"
            lines.append((place, f"{TITLES[name]} to {TITLES[base]}", f"{ratio:.1f}", target))
        started = [each[START_UP] for each in rounds if each[START_UP]]
        if started:
            empty, server = (statistics.median(values) for values in zip(*started))
            title = f"first accepted write after sbatch ({server:.2f} s) beyond an empty job's start ({empty:.2f} s)"
            lines.append((place, title, f"{server - empty:+.2f} s", f"≤ {START_UP_TARGET:.1f} s"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def profiles(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the longest tasks of the last round at the last place."""
    place, rounds = list(results.items())[-1]
    text = ""
    for name in (NEW, CLOSELY):
        tasks = rounds[-1]["profiles"][name]
        there = [task for task in tasks if task["there"]]
        here = sum(task["wall"] for task in tasks if not task["there"])
        text += (
            f"\n{TITLES[name]}, {place}: {sum(task['wall'] for task in tasks):.1f} s in {len(tasks)} steps,"
            f" {here:.1f} s of it in those that stay here. The longest:\n\n"
        )
        text += "| s | CPU s here | task |\n| ---: | ---: | --- |\n"
        for task in sorted(there, key=lambda task: -task["wall"])[:10]:
            text += f"| {task['wall']:.2f} | {task['cpu']:.2f} | {task['name']} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="page to update; by default the table is printed")
    parser.add_argument("--places", nargs="+", default=PLACES if not os.geteuid() else PLACES[:1], metavar="PLACE",
                        help="local, or mini+N for N ms (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="number of measurements (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a test run with one measurement")
    arguments = parser.parse_args()
    for place in arguments.places:
        if not re.fullmatch(r"local|mini\+[0-9]{1,4}", place):
            parser.error(f"--places: {place} is not allowed; local and mini+N, with N milliseconds")
    bury_children_of_others()
    results: dict[str, list[dict[str, Any]]] = {place: [] for place in arguments.places}
    with tempfile.TemporaryDirectory(prefix="hpc-db-bench-") as folder:
        with places(arguments.places, Path(folder)) as found:
            # Every round visits all places, so that other load on the machine affects all of them.
            for _round in range(1 if arguments.quick else arguments.repeats):
                for place in found:
                    results[place.name].append(measure_place(place, Path(folder) / "profile.json"))
    (CACHE / "provision.json").write_text(json.dumps(results, indent=1) + "\n")
    text = text_of(results, machine())
    if arguments.page:
        write_page(arguments.page, "provision.py", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
