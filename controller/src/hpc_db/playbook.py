# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Run one of the collection's playbooks with ansible-runner, show its progress, and return its tasks' results."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Union

from hpc_db.progress import Lines, printable, progress

# The checkout, if this package is part of one.
CHECKOUT = Path(__file__).resolve().parents[3]

# Description of the tasks of a role, or of one of its files, for the progress.
PHASES = {
    "instance": "instance directory",
    "postgres": "PostgreSQL",
    "upgrade": "major version",
    "databases": "databases and studies",
    "client": "client package",
    "server/quick_check": "quick check",
    "server/host": "supervisor",
    "server/main": "server job",
    "server/read": "server job",
    "server/stop": "server job",
}
ROLE = re.compile(r"/roles/(\w+)/tasks/(\w+)\.yml:\d+$")

# A line that an action plugin prints during a task: [host] text.
SAID = re.compile(r"\[([^\]\s]+)\] (.+)")
# Prompts of ssh, which nobody can answer here. Older versions of Ansible give ssh our terminal, newer ones none.
ASKING = r"(?i)(password|passphrase|passcode|token|verification code|one-time|otp|\(yes/no[^)]*\))[^\r\n]*[:?] ?$"
NOBODY_ANSWERS = re.compile(r"permission denied|host key verification failed|too many authentication|askpass", re.I)
# Seconds after an interrupt until Ansible is killed.
PATIENCE = 30

Inventory = Union[str, "os.PathLike[str]"]
Result = tuple[str, dict[str, Any]]


class Failed(Exception):
    """The playbook failed; the message is the playbook's, one line for each failed host."""


def play(playbook: str, inventories: Sequence[Inventory], folder: Inventory | None, settings: dict) -> list[Result]:
    """Run a playbook; return the results of its ``show`` tasks, each with its host."""
    found = find_inventories(inventories, folder)
    # Ansible's input and output may contain secrets: the folder is private, and removed afterwards.
    with tempfile.TemporaryDirectory(prefix="hpc_db-") as private:
        os.mkdir(f"{private}/env", 0o700)
        Path(private, "env", "extravars").write_text(json.dumps(settings))
        return run(private, playbook, found)


def find_inventories(inventories: Sequence[Inventory], folder: Inventory | None) -> list[str]:
    """Return the paths of inventories given by name or by path."""
    if not inventories:
        raise Failed("no inventory is given; name one, such as hemera5")
    places = [Path(folder)] if folder else [Path("inventories"), CHECKOUT / "inventories"]
    return [find_inventory(os.fspath(inventory), places) for inventory in inventories]


def find_inventory(inventory: str, places: list[Path]) -> str:
    """Return the path of an inventory: with a slash it is a path, otherwise a name in one of these places."""
    paths = [Path(inventory).expanduser()] if os.sep in inventory else [place / inventory for place in places]
    for path in paths:
        if path.exists():
            return str(path.absolute())
    raise Failed(f"inventory not found: {' or '.join(map(str, paths))}")


def run(private: str, playbook: str, inventories: list[str]) -> list[Result]:
    """Run a playbook; ``private`` is the folder for ansible-runner's files."""
    try:
        import ansible_runner
    except ImportError as error:
        raise Failed(f"{error}: install this package with its dependencies, ansible-core and ansible-runner") from None
    in_checkout = (CHECKOUT / "playbooks" / f"{playbook}.yml").exists()
    environment = {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    if in_checkout:
        environment["ANSIBLE_CONFIG"] = str(CHECKOUT / "ansible.cfg")
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(CHECKOUT / ".cache" / "collections")  # not the user's own
    cancelled = threading.Event()
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def keep(event: dict[str, Any]) -> bool:
        events.put(event)
        return False  # do not write it to disk

    runner = ansible_runner.interface.init_runner(
        private_data_dir=private,
        project_dir=str(CHECKOUT) if in_checkout else os.getcwd(),
        playbook=f"playbooks/{playbook}.yml" if in_checkout else f"mala.hpc_db.{playbook}",
        inventory=inventories,
        envvars=environment,
        passwords={ASKING: ""},
        settings={"pexpect_timeout": 1, "suppress_output_file": True, "suppress_ansible_output": True},
        event_handler=keep,
        cancel_callback=cancelled.is_set,
    )
    if "ANSIBLE_HOST_KEY_CHECKING" not in os.environ:
        # ansible-runner would disable the check of host keys.
        runner.config.env.pop("ANSIBLE_HOST_KEY_CHECKING", None)
    told = Told(progress(), shows_pages=playbook == "status")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(runner.run)
        running.add_done_callback(lambda _running: events.put(None))
        try:
            for event in iter(events.get, None):
                told.take(event)
        except KeyboardInterrupt:
            if told.interrupt():
                wait([running], PATIENCE)
            cancelled.set()  # kills it if it still runs
            raise
        finally:
            told.screen.end()
        running.result()
    if runner.rc:
        raise Failed(printable(told.why(inventories), keep="\n"))
    if not told.hosts:
        raise Failed(printable(told.why_nobody(inventories)))
    return told.results


class Told:
    """Collects the results of a playbook from its events, and shows the progress."""

    def __init__(self, screen: Lines, shows_pages: bool = False) -> None:
        self.screen = screen
        self._shows_pages = shows_pages
        self.hosts: set[str] = set()
        self.results: list[Result] = []
        self._phases: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._failed: set[str] = set()
        self._lines: list[str] = []
        self._pid: int | None = None

    def take(self, event: dict[str, Any]) -> None:
        """Process one of ansible-runner's events."""
        data = event.get("event_data") or {}
        self._pid = event.get("pid") or self._pid
        kind, host, result = event["event"], data.get("host", ""), data.get("res") or {}
        if kind == "runner_on_start":
            self.hosts.add(host)
            self._phases[host] = phase_of(data.get("task_path", "")) or self._phases.get(host, "begins")
            self.screen.now(host, self._phases[host], data.get("task", ""))
        elif kind in ("runner_on_ok", "runner_item_on_ok"):
            self._take_result(host, data, result)
        elif kind in ("runner_on_failed", "runner_item_on_failed", "runner_on_unreachable"):
            # For a failed loop, the items have the message; the loop only reports that some failed.
            if "results" not in result:
                self._failures[host] = one_line(result, kind == "runner_on_unreachable")
        elif kind == "playbook_on_stats":
            self._failed = {*data.get("failures", {}), *data.get("dark", {})}
        elif kind == "verbose":
            self._take_line(event.get("stdout", ""))

    def _take_result(self, host: str, data: dict[str, Any], result: dict[str, Any]) -> None:
        if result.get("about"):
            self.results.append((host, result))
            if self._shows_pages:
                self.screen.page(result["text"])
        elif data.get("task_action") == "mala.hpc_db.show" and "text" in result:
            self.screen.say(result["text"])

    def _take_line(self, line: str) -> None:
        said = SAID.fullmatch(line.strip())
        if said and said.group(1) in self.hosts:
            self.screen.now(said.group(1), self._phases[said.group(1)], said.group(2))
        elif line.strip():
            self._lines.append(line.strip())

    def why(self, inventories: Iterable[str]) -> str:
        """Return the reason why the playbook failed."""
        failed = {host: self._failures[host] for host in sorted(self._failed) if host in self._failures}
        if failed:
            return "\n".join(f"{host}: {message}" for host, message in failed.items())
        said = [line for line in self._lines if re.match(r"ERROR!|\[ERROR\]", line)] or self._lines[-1:]
        return f"{', '.join(inventories)}: {' '.join(said[:1]) or 'ansible-playbook ended without a message'}"

    def why_nobody(self, inventories: Iterable[str]) -> str:
        """Return the reason why the playbook ran on no host."""
        unread = [line.partition(": ")[2] for line in self._lines if "Unable to parse" in line]
        return (unread or [f"{', '.join(inventories)}: no host is in a group hpc_db"])[0]

    def interrupt(self) -> bool:
        """Interrupt Ansible as ^C in a terminal does, so that it ends its own children; return whether it has begun."""
        if self._pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGINT)
        return True


def phase_of(task_path: str) -> str:
    """Return the phase of the playbook that a task belongs to; empty if there is none."""
    found = ROLE.search(task_path)
    if not found:
        return ""
    role, file = found.groups()
    return "settings" if file.startswith(("check", "settings")) else PHASES.get(f"{role}/{file}", PHASES.get(role, ""))


def one_line(result: dict[str, Any], unreachable: bool) -> str:
    """Return the message of a failed task without Ansible's prefix."""
    text = " ".join(str(result.get("msg") or result.get("module_stderr") or "it failed without a message").split())
    text = re.sub(r"^(Task failed: )?((Module|Action) failed: )?", "", text)
    if unreachable and NOBODY_ANSWERS.search(text):
        text += (
            "; ssh cannot ask for input here: load a key into ssh-agent, or first open Ansible's shared "
            "connection in a terminal (docs/notebooks.md)"
        )
    return text
