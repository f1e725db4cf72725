# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A role's documentation matches its behaviour, and no default is stated in two places that could differ.

- A role's defaults are the documented ones.
- Every option, of roles and of modules, including those inside dictionaries, is read somewhere.
- A role reads settings only from the result of the module ``settings``, in which text has its type: never by name
alone.
- Roles work without one another, so a role may have to repeat another role's default (``setting | default(value)``);
and a module has defaults for direct use. Both must equal the setting's documented default; for a module that receives
several settings, the default of one of them.
- The same holds for a default in a page of docs/ or a README: ```setting` (value)``, or a column ``default`` in a
table.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.module_utils.host.settings import DEFAULTS

ROOT = Path(__file__).parents[2]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
MODULES = sorted(path for path in (ROOT / "plugins/modules").glob("*.py"))
UTILS = sorted(path.stem for path in (ROOT / "plugins/module_utils").glob("*.py"))
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("roles/*/*.md")])
DOCUMENTATION = ("DOCUMENTATION", "EXAMPLES", "RETURN")
# In lists that are passed whole to one module, but contain keys for another.
TAKEN_ALONG = ["databases.studies.directions"]

each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


@cache
def read(path: Path) -> Any:
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def entry_points(role: Path) -> dict[str, dict[str, dict[str, Any]]]:
    specs = read(role / "meta/argument_specs.yml")["argument_specs"]
    return {name: spec.get("options", {}) for name, spec in specs.items()}


def documented(role: Path) -> dict[str, dict[str, Any]]:
    return entry_points(role)["main"]


def options_of(options: dict[str, dict[str, Any]], inside: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every option by its path, including those of dictionaries and of lists of dictionaries."""
    for name, option in options.items():
        yield inside + name, option
        yield from options_of(option.get("options", {}) or option.get("suboptions", {}), f"{inside}{name}.")


def known_defaults() -> dict[str, Any]:
    """Return every setting's documented default, of all roles."""
    return {
        name: option["default"]
        for role in ROLES for options in entry_points(role).values() for name, option in options.items()
        if "default" in option
    }


def module_documentation(path: Path) -> dict[str, dict[str, Any]]:
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "DOCUMENTATION":
            return yaml.safe_load(ast.literal_eval(statement.value)).get("options") or {}
    raise AssertionError(f"{path} has no DOCUMENTATION")


@cache
def words_of(path: Path) -> list[str]:
    """Return every string and name in a program, with repetitions; without its documentation."""
    words = []
    for statement in ast.parse(path.read_text()).body:
        if not (isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") in DOCUMENTATION):
            for node in ast.walk(statement):
                words += [getattr(node, name) for name in ("value", "id", "arg", "attr") if hasattr(node, name)]
    return [word for word in words if isinstance(word, str)]


@cache
def ansible_files() -> dict[Path, str]:
    """Return all files that may read a setting: tasks, templates and variables without their comments, and filters."""
    files = [*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/**/*.yml"), *ROOT.glob("roles/**/*.j2")]
    texts = {path: re.sub(r"(?m)(^|\s)#.*$|\{#.*?#\}", "", path.read_text()) for path in files}
    return {path: text for path, text in texts.items() if path.name != "argument_specs.yml"}


@cache
def users_of(util: str) -> set[Path]:
    """Return the plugins that import a file of module_utils, directly or indirectly."""
    imported = re.compile(rf"module_utils\.{util}\b|module_utils import .*\b{util}\b")
    users = set()
    for path in ROOT.glob("plugins/*/*.py"):
        if imported.search(path.read_text()):
            users |= users_of(path.stem) if path.parent.name == "module_utils" else {path}
    return users


def tasks_of(content: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping in a task file or play that could be a task."""
    if isinstance(content, dict):
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from tasks_of(inner)


@pytest.mark.parametrize("group, fragment", [("postgresql", "connection"), ("scheduler", "scheduler")])
def test_action_group_has_the_modules_with_its_options(group: str, fragment: str) -> None:
    texts = {path.stem: path.read_text() for path in MODULES}
    extending = [module for module, text in texts.items() if f"\n  - mala.hpc_db.{fragment}\n" in text]
    groups = read(ROOT / "meta/runtime.yml")["action_groups"]
    memberships = re.compile(r"^    membership: \[(.+)\]$", re.MULTILINE)

    assert groups[group] == extending
    text = (ROOT / "plugins/doc_fragments" / f"{fragment}.py").read_text()
    assert memberships.findall(text) == [f"mala.hpc_db.{group}"]
    for module in extending:  # Ansible shows one fragment's membership only, so a module of two groups names both
        of = [f"mala.hpc_db.{name}" for name, members in groups.items() if module in members]
        assert memberships.findall(texts[module]) == ([", ".join(of)] if len(of) > 1 else [])


@each_role
def test_defaults_are_the_documented_ones(role: Path) -> None:
    options, defaults = documented(role), read(role / "defaults/main.yml")
    in_words = {name for name in defaults if "{{" in str(defaults[name]) and "default" not in options[name]}

    assert {name: value for name, value in defaults.items() if name not in in_words} == {
        name: option["default"] for name, option in options.items() if "default" in option
    }


@each_role
def test_every_option_has_a_description_and_a_type(role: Path) -> None:
    for options in entry_points(role).values():
        for name, option in options_of(options):
            assert option.get("description"), name
            assert option.get("type"), name


@each_role
def test_every_option_is_read(role: Path) -> None:
    modules = [path.read_text() for path in ROOT.glob("plugins/**/*.py")]
    plan = (ROOT / "plugins/module_utils/_plan.py").read_text()
    passed = {f"server_{name}" for name in DEFAULTS}  # to the supervisor
    for options in entry_points(role).values():
        for path, _option in options_of(options):
            name = path.rpartition(".")[2]
            inside = modules if "." in path else []  # the module may read a part of a setting
            texts = [re.sub(rf"(?m)^{name}:", "", text) for text in [*ansible_files().values(), plan, *inside]]
            read_here = any(re.search(rf"\b{name}\b", text) for text in texts)
            assert read_here or path in passed, f"nothing reads {path}"


def expressions_of(path: Path, text: str) -> Iterator[str]:
    """Yield the expressions that Ansible evaluates in a file, without string literals."""
    found = re.findall(r"\{\{.*?\}\}(?!\})|\{%.*?%\}", text, re.DOTALL)
    for task in tasks_of(read(path)) if path.suffix == ".yml" else ():
        for key in ("when", "that", "until", "failed_when", "changed_when"):
            conditions = task.get(key, [])
            found += map(str, conditions if isinstance(conditions, list) else [conditions])
    for expression in found:
        yield re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "''", expression)


def test_settings_are_read_with_their_types() -> None:
    settings = {name for role in ROLES for options in entry_points(role).values() for name in options}
    for path, text in ansible_files().items():
        for expression in expressions_of(path, text) if path.parent.name != "defaults" else ():
            bare = set(re.findall(r"(?<![\w.])\w+", expression)) & settings
            assert not bare, f"{path}: hpc_db.{bare.pop()} is what has its type: {expression}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_option_of_a_module_is_read(module: Path) -> None:
    action = ROOT / "plugins/action" / module.name
    files = [module, *([action] if action.exists() else [])]
    files += [ROOT / f"plugins/module_utils/{util}.py" for util in UTILS if {module, action} & users_of(util)]
    words = Counter(word for path in files for word in words_of(path))

    for path, _option in options_of(module_documentation(module)):
        name = path.rpartition(".")[2]
        assert words[name] > 1 or path in TAKEN_ALONG, f"nothing reads {path}, beyond declaring it"


def test_default_that_is_told_again_is_the_same() -> None:
    defaults = known_defaults()
    literals = {"true": True, "false": False, "none": None}
    for path, text in ansible_files().items():
        for name, told in re.findall(r"\b(\w+) *\| *default\(([^()]*?)(?:, *true)?\)", text):
            variable = re.match(r"[a-z_]", told) and told not in literals
            if name in defaults and not variable:
                value = literals[told] if told in literals else ast.literal_eval(told)
                assert value == defaults[name], f"{path}: {name} | default({told})"


def test_modules_have_the_defaults_of_the_settings() -> None:
    defaults = known_defaults()
    modules = {path.stem: module_documentation(path) for path in MODULES}
    given: dict[tuple[str, str], dict[str, Any]] = {}
    for path in ansible_files():
        for task in tasks_of(read(path)) if path.suffix == ".yml" else ():
            for key, arguments in task.items():
                name = str(key).removeprefix("mala.hpc_db.")
                for option, value in arguments.items() if name in modules and isinstance(arguments, dict) else ():
                    setting = re.fullmatch(r"\{\{ hpc_db\.(\w+) \}\}", str(value))
                    if setting and setting[1] in defaults and "default" in modules[name].get(option, {}):
                        given.setdefault((name, option), {})[setting[1]] = defaults[setting[1]]

    for (name, option), settings in given.items():
        assert modules[name][option]["default"] in settings.values(), f"{name}: {option} has another than {settings}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_state_the_defaults(page: Path) -> None:
    defaults = known_defaults()
    for name, stated in stated_defaults(page.read_text()):
        if name in defaults and "{{" not in str(defaults[name]):
            assert yaml.safe_load(stated) == defaults[name], f"{name} ({stated})"


def stated_defaults(text: str) -> Iterator[tuple[str, str]]:
    """Yield the settings and defaults that a page states; the defaults are in YAML."""
    for name, value in re.findall(r"`(\w+)`\s\((\d[\d,]*|`[^`]*`)(?: \w+)?\)", text):
        yield name, value.strip("`").replace(",", "")
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "default" in cells:
            column = cells.index("default")
        elif column is not None and len(cells) > column and (name := re.fullmatch(r"`(\w+)`", cells[0])):
            yield name[1], cells[column].strip("`")


def test_finds_stated_defaults() -> None:
    page = "the last `a_hours` (24), every\n`b_s` (1,030 s) and `c` (`none`)\n\n" \
           "| setting | default |\n|---|---|\n| `d` | `[x]` |\n"

    assert list(stated_defaults(page)) == [("a_hours", "24"), ("b_s", "1030"), ("c", "none"), ("d", "[x]")]


@each_role
def test_readme_exists(role: Path) -> None:
    assert (role / "README.md").is_file()
