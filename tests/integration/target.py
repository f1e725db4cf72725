# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host where tests run the playbooks as users do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = "/srv/checkout"  # the same folder, as seen on the test cluster
CLUSTER = ROOT / "tests" / "cluster" / "cluster"


class Target:
    """Runs playbooks: has inventories, and runs commands on a host as the owner."""

    def __init__(self, inventories: list[Path], shell: list[str], environment: dict[str, str]) -> None:
        self._inventories = inventories
        self.shell = shell
        self.variables: dict[str, object] = {}  # variables for an owner other than the user who runs the tests
        self.environment = {**os.environ, **environment, "ANSIBLE_FORCE_COLOR": "0", "COLUMNS": "4000"}

    def command(self, name: str, settings: dict | None = None, *options: str) -> list[str]:
        """Return the ansible-playbook call."""
        inventories = [f"--inventory={inventory}" for inventory in self._inventories]
        extra = ["--extra-vars", json.dumps(settings)] if settings else []
        return ["ansible-playbook", *inventories, *extra, *options, f"playbooks/{name}.yml"]

    def play(self, name: str, settings: dict | None = None, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a playbook to its end."""
        return subprocess.run(
            self.command(name, settings, *options), cwd=ROOT, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
            check=False,
        )

    def run(self, script: str) -> str:
        """Run a shell script as the owner, in the home directory; return its output."""
        done = subprocess.run(
            [*self.shell, script], capture_output=True, text=True, timeout=120, env=self.environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, script: str, *descriptors: int) -> subprocess.Popen[str]:
        """Start a shell script as the owner, with these file descriptors open and a pipe to its standard input."""
        return subprocess.Popen(
            [*self.shell, script], env=self.environment, stdin=subprocess.PIPE, text=True, pass_fds=descriptors
        )

    def files(self) -> str:
        """List the owner's files, apart from Ansible's own."""
        return self.run("cd; find . -path ./.ansible -prune -o -printf '%p %m %s %T@\\n' | sort")


class Workstation(Target):
    """The test cluster's workstation, where alice runs the playbooks of this checkout, mounted at ``CHECKOUT``."""

    def command(self, name: str, settings: dict | None = None, *options: str) -> list[str]:
        """Return the command that enters the workstation and runs ansible-playbook there."""
        return [*self.shell, self.ansible(super().command(name, settings, *options))]

    def ansible(self, command: list[str]) -> str:
        """Return a shell command that runs one of this checkout's Ansible programs (``ansible-…``) there."""
        program, *arguments = command
        # The program's shebang names the checkout's folder on this machine, which alice may not be able to read.
        tool = [".venv/bin/python", "-m", "ansible", program.partition("-")[2] or "adhoc", *arguments]
        cache = f"ANSIBLE_CALLBACK_PLUGINS={CHECKOUT}/tests/ansible ANSIBLE_CALLBACKS_ENABLED=module_cache"
        return f"cd {CHECKOUT} && {cache} COLUMNS=4000 ANSIBLE_FORCE_COLOR=0 exec {shlex.join(tool)}"
