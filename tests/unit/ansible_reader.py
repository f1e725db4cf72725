# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Evaluate templates and inventories with Ansible, many a second: a process that answers each JSON object with another.

A separate process, since Ansible changes how a whole process imports collections.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Refused(Exception):
    """Ansible refuses a template; the message is Ansible's."""


class Reader:
    """Runs the process, and sends it queries."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def render(self, role: str, templates: list[str], own: dict, sent: dict, beside: Sequence[str] = ()) -> list[str]:
        """Return a role's rendered templates, in a play with the roles ``beside``.

        ``sent`` holds results of modules, which Ansible marks as unsafe, and ``own["hpc_db"]`` what roles share.
        """
        return self._ask(role=role, templates=templates, own=own, sent=sent, beside=list(beside))

    def settings(self, given: dict, roles: list[str] | None = None) -> dict:
        """Evaluate settings as the module ``settings`` does in a play with these roles, or with all.

        ``{"__vault__": text}`` stands for the text encrypted by ansible-vault.
        """
        return self._ask(given=given, roles=roles)

    def load(self, inventory: Path) -> dict[str, Any]:
        """Return each host of an inventory with its variables, evaluated."""
        return self._ask(path=str(inventory))

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["found"]

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def serve() -> None:
    """Answer until standard input ends."""
    from ansible import constants
    from ansible.errors import AnsibleError
    from ansible.plugins.loader import init_plugin_loader

    init_plugin_loader([str(ROOT / ".cache" / "collections"), *constants.COLLECTIONS_PATHS])
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = FUNCTIONS[next(iter(question))](**question)
            answer = {"found": found}
        except (AnsibleError, ValueError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def render(role: str, templates: list[str], own: dict, sent: dict, beside: list[str]) -> list[str]:
    """Return the templates as rendered by Ansible."""
    from ansible.utils.unsafe_proxy import wrap_var
    from ansible_collections.mala.hpc_db.plugins.action.settings import find_settings
    from ansible_collections.mala.hpc_db.plugins.module_utils._plan import plan

    folder = ROOT / "roles" / role
    given = dict(own, role_path=str(folder), **{name: wrap_var(value) for name, value in sent.items()})
    templar, variables, trust, loader = templar_of([*(ROOT / "roles" / each for each in beside), folder], given)
    found = find_settings(variables, templar, loader)
    derived = plan(found, {"root": "/r", "owner": "alice"})
    templar.available_variables = {**variables, "hpc_db": {**found, **derived, **own.get("hpc_db", {})}}
    return [
        str(templar.template(trust("{{ lookup('ansible.builtin.template', '%s') }}" % (folder / "templates" / each))))
        for each in templates
    ]


def settings(given: dict, roles: list[str] | None) -> dict[str, Any]:
    """Return the settings in a play with these roles."""
    from ansible_collections.mala.hpc_db.plugins.action.settings import find_settings

    every = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
    folders = [path for path in every if roles is None or path.name in roles]
    templar, variables, trust, loader = templar_of(folders, {})
    variables.update({name: as_in_a_file(value, trust, loader) for name, value in given.items()})
    variables.update(inventory_hostname="mini", ansible_playbook_python=sys.executable)
    return find_settings(variables, templar, loader)


def as_in_a_file(value: Any, trust: Any, loader: Any) -> Any:
    """Return a value as Ansible reads it from a file."""
    from ansible.parsing.vault import VaultLib

    if isinstance(value, list):
        return [as_in_a_file(each, trust, loader) for each in value]
    if isinstance(value, dict) and "__vault__" not in value:
        return {name: as_in_a_file(each, trust, loader) for name, each in value.items()}
    if isinstance(value, dict):
        secrets = vault_secrets()
        loader.set_vault_secrets(secrets)
        text = VaultLib(secrets).encrypt(value["__vault__"]).decode()
        return loader.load("it: !vault |\n" + textwrap.indent(text, "  "))["it"]
    return trust(value) if isinstance(value, str) else value


@cache
def vault_secrets() -> list:
    """Return the passwords with which ansible-vault encrypts; newer versions of Ansible need them set once."""
    from ansible.parsing import vault

    secrets = [("default", vault.VaultSecret(b"a password"))]
    if hasattr(vault, "VaultSecretsContext"):
        vault.VaultSecretsContext.initialize(vault.VaultSecretsContext(secrets))
    return secrets


def templar_of(roles: list[Path], given: dict) -> tuple[Any, dict, Any, Any]:
    """Return a templar, the variables of roles and ``given``, the function that marks templates, and a loader."""
    from ansible import template
    from ansible.parsing.dataloader import DataLoader

    loader = DataLoader()
    loader.set_basedir(str(roles[-1]))
    # Newer versions of Ansible evaluate only templates from trusted files.
    trust = getattr(template, "trust_as_template", str)
    trusting = {"trusted_as_template": True} if hasattr(template, "trust_as_template") else {}
    variables: dict[str, Any] = {}
    for file in [role / part / "main.yml" for role in roles for part in ("defaults", "vars")]:
        variables.update((file.exists() and loader.load_from_file(str(file), **trusting)) or {})
    variables.update(given)
    return template.Templar(loader=loader, variables=variables), variables, trust, loader


def load(path: str) -> dict[str, Any]:
    """Return an inventory's hosts and variables as Ansible reads them."""
    from ansible import template
    from ansible.inventory.manager import InventoryManager
    from ansible.parsing.dataloader import DataLoader
    from ansible.vars.manager import VariableManager

    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[path])
    manager = VariableManager(loader=loader, inventory=inventory)
    found = {}
    for host in inventory.get_hosts():
        variables = manager.get_vars(host=host, include_hostvars=False)
        variables = {name: value for name, value in variables.items() if name not in ("omit", "ansible_version")}
        found[host.name] = template.Templar(loader=loader, variables=variables).template(variables)
    return found


# The available queries, by the first key of the query.
FUNCTIONS: dict[str, Any] = {"role": render, "given": settings, "path": load}

if __name__ == "__main__":
    serve()
