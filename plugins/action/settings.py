# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible import template
from ansible.errors import AnsibleError
from ansible.module_utils.common.validation import check_type_dict
from ansible.module_utils.common.yaml import yaml_load
from ansible.module_utils.parsing.convert_bool import BOOLEANS_FALSE, BOOLEANS_TRUE
from ansible.plugins.action import ActionBase
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.plugin_utils.rules import RULES, broken

ROLES = Path(__file__).parents[2] / "roles"
ALLOWED = {
    "bool": "true or false",
    "dict": "names with values, such as {partition: work}",
    "int": "a whole number",
    "list": "a list, such as [a, b]",
    "str": "text, in quotes if YAML reads it as another type",
}
EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
# A name after another dot is an attribute or key, which may have the same name as a setting.
READ = re.compile(r"(?<![\w.])(?:hpc_db\.)?(\w+)")
QUOTED = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""")


class Refused(ValueError):
    """A setting's value is not allowed."""


class Unknown(Refused):
    """A template reads an undefined setting."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """Return the settings of this host, converted to their types."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        roles = {"type": "list", "elements": "str", "choices": list(RULES), "default": []}
        _validated, given = self.validate_argument_spec({"roles": roles})

        try:
            found = find_settings(task_vars or {}, self._templar, self._loader)
            check_rules(given["roles"], found)
        except Refused as refused:
            return dict(result, failed=True, msg=one_line(refused))
        return dict(result, changed=False, _ansible_verbose_override=True, **found)  # some settings contain passwords


def find_settings(variables: Mapping[str, Any], templar: Any, loader: Any) -> dict[str, Any]:
    """Return the settings from the play's variables, with Ansible's templar and loader."""
    options = options_of_roles()
    here = roles_in(variables, options)

    def evaluate(value: Any, known: Mapping[str, Any]) -> Any:
        return templar.copy_with_new_env(available_variables=known).template(value)

    try:
        return read_settings(variables, options, here, templar.is_template, evaluate)
    except Unknown:  # its default is in a role outside of this play; only now, because reading all roles takes time
        every = {**variables_of_roles(loader), **variables}
        return read_settings(every, options, here, templar.is_template, evaluate, has_every_role=True)


def check_rules(roles: list[str], settings: Mapping[str, Any]) -> None:
    """Raise Refused with all errors if settings break these roles' rules."""
    wrong = broken(roles, settings)
    if wrong:
        raise Refused("; ".join(wrong))


def roles_in(variables: Mapping[str, Any], options: Mapping[str, dict]) -> set[str]:
    """Return the roles in the play: those whose defaults are all defined."""
    absent = {
        option["role"] for name, option in options.items()
        if "default" in option and name.startswith(option["role"]) and name not in variables
    }
    return {option["role"] for option in options.values()} - absent


def variables_of_roles(loader: Any, roles: Path = ROLES) -> dict[str, Any]:
    """Return defaults and variables of all roles."""
    # Newer Ansibles evaluate templates only from files that are marked as trusted.
    trusting = {"trusted_as_template": True} if hasattr(template, "trust_as_template") else {}
    found: dict[str, Any] = {}
    for path in sorted([*roles.glob("*/defaults/main.yml"), *roles.glob("*/vars/main.yml")]):
        found.update(loader.load_from_file(str(path), **trusting) or {})
    return found


def options_of_roles(roles: Path = ROLES) -> dict[str, dict]:
    """Return the documented options and the role of each setting; the first entry point that documents it counts."""
    options: dict[str, dict] = {}
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        for entry_point in yaml_load(path.read_text(encoding="utf-8"))["argument_specs"].values():
            for name, option in entry_point.get("options", {}).items():
                options.setdefault(name, {**option, "role": path.parts[-3]})
    return options


def read_settings(
    variables: Mapping[str, Any], options: Mapping[str, dict], here: set[str], is_template: Callable[[Any], bool],
    evaluate: Callable[[Any, Mapping[str, Any]], Any], has_every_role: bool = False,
) -> dict[str, Any]:
    """Return all settings, converted to their types; ``None`` for a setting without value and default.

    A template is evaluated after the settings that it reads; ``evaluate`` takes the template and all variables. The
    settings that it needs may be given for some playbooks only, so the template of a role that is not ``here`` may
    fail.
    """
    defaults = {name: option["default"] for name, option in options.items() if "default" in option}
    given = {name: value for name, value in defaults.items() if "{{" not in str(value)}
    given.update({name: variables[name] for name in options if name in variables})
    templates = {name for name in given if is_template(given[name])}
    settings = take_all({name: given[name] for name in given if name not in templates}, options)

    def settle(name: str, before: tuple[str, ...] = ()) -> None:
        if name in before:
            raise Refused(f"{name}: {shown(given[name])} is not allowed; it refers to itself")
        if name not in given and not has_every_role:
            raise Unknown(f"{before[-1]}: {name} is not known")
        if name in settings or name not in given:
            return
        for other in sorted(read_by(given[name], variables, options, is_template)):
            settle(other, (*before, name))
        try:
            found = evaluate(given[name], {**variables, **settings, "hpc_db": settings})
        except AnsibleError as error:
            if options[name]["role"] not in here:
                return
            raise Refused(f"{name}: {error}") from error
        settings.update(take_all({name: found}, options))

    for name in sorted(templates):
        settle(name)
    return {**dict.fromkeys(options), **settings}


def read_by(
    value: Any, variables: Mapping[str, Any], options: Mapping[str, dict], is_template: Callable[[Any], bool]
) -> set[str]:
    """Return the settings that a template may read, directly or through other variables."""
    found: set[str] = set()
    seen = {"hostvars", "vars"}
    texts = [str(value)]
    while texts:
        expressions = " ".join(EXPRESSION.findall(texts.pop()))
        for name in set(READ.findall(QUOTED.sub("", expressions))) - seen:
            seen.add(name)
            if name in options:
                found.add(name)
            elif isinstance(variables.get(name), (str, list, dict)) and is_template(variables[name]):
                texts.append(str(variables[name]))
    return found


def take_all(given: Mapping[str, Any], options: Mapping[str, dict]) -> dict[str, Any]:
    """Return values converted to their settings' types; raise Refused with all errors."""
    settings, wrong = {}, []
    for name, value in given.items():
        try:
            settings[name] = typed(decrypted(value), options[name], name)
        except Refused as refused:
            wrong.append(str(refused))
    if wrong:
        raise Refused("; ".join(wrong))
    return settings


def decrypted(value: Any) -> Any:
    """Return a value with its decrypted texts: ansible-vault's values have their own type."""
    if isinstance(value, Mapping):
        return {name: decrypted(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [decrypted(each) for each in value]
    return str(value) if hasattr(value, "_ciphertext") else value


def typed(value: Any, option: Mapping[str, Any], path: str) -> Any:
    """Return a value converted to a type, whether given as text, in YAML or as JSON."""
    kind = option["type"]
    try:
        found = TYPES[kind](value)
    except (TypeError, ValueError):
        raise Refused(f"{path}: {shown(value)} is not allowed; {ALLOWED[kind]}") from None
    if kind == "list":
        element = {**option, "type": option["elements"]}
        return [typed(each, element, f"{path}[{number}]") for number, each in enumerate(found)]
    if "choices" in option and found not in option["choices"]:
        raise Refused(f"{path}: {shown(value)} is not allowed; {', '.join(option['choices'])}")
    if kind == "dict" and "options" in option:
        return typed_entries(found, option["options"], path)
    return found


def typed_entries(given: Mapping[str, Any], options: Mapping[str, dict], path: str) -> dict[str, Any]:
    """Return a dictionary's values converted to their types, with defaults."""
    for key in given:
        if key not in options:
            raise Refused(f"{path}: {shown(key)} is not allowed; {', '.join(options)}")
    missing = [key for key, option in options.items() if option.get("required") and key not in given]
    if missing:
        raise Refused(f"{path}: {', '.join(missing)} is not given")
    defaults = {key: option["default"] for key, option in options.items() if "default" in option}
    return {key: typed(value, options[key], f"{path}.{key}") for key, value in {**defaults, **given}.items()}


def shown(value: Any) -> str:
    """Return a value as a user would write it."""
    return "nothing" if value is None or value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def to_bool(value: Any) -> bool:
    """Convert to true or false."""
    word = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(word, (str, int, float)) or word not in BOOLEANS_TRUE | BOOLEANS_FALSE:
        raise ValueError
    return word in BOOLEANS_TRUE


def to_int(value: Any) -> int:
    """Convert to a whole number. Text with a leading zero is refused, because in YAML it would be an octal number."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?(0|[1-9][0-9]*)(\.0+)?\s*", value):
        return int(value.partition(".")[0])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value % 1:
        raise ValueError
    return int(value)


def to_str(value: Any) -> str:
    """Convert to text. Values that YAML has converted, from yes, 1.10 or a time, are refused: their text is lost."""
    if value is None:
        return ""
    if isinstance(value, (bool, datetime.datetime)) or not isinstance(value, (str, int, datetime.date)):
        raise TypeError
    return str(value)


def to_list(value: Any) -> list:
    """Convert to a list; text is split at commas unless it is written as a list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return parsed(value, list) if value.lstrip().startswith("[") else [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    raise TypeError


def to_dict(value: Any) -> dict:
    """Convert to a dictionary; text may have the form ``name=value,name=value``."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            return parsed(value, dict)
        words = {"true": True, "false": False}
        return {name: words.get(word.lower(), word) for name, word in check_type_dict(value).items()}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def parsed(text: str, kind: type) -> Any:
    """Parse a text as JSON or YAML."""
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError from error
    if not isinstance(found, kind):
        raise TypeError
    return found


TYPES: dict[str, Callable[[Any], Any]] = {
    "bool": to_bool, "dict": to_dict, "int": to_int, "list": to_list, "str": to_str,
}
