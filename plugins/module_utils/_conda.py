# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Installed packages, wanted packages, and the calls and answers of clients.

A client is conda, mamba, micromamba or the rattler helper. Each is an argument list whose answer is JSON.
"""

from __future__ import annotations

import fnmatch
import json
import operator
import re
import shlex
import textwrap
from contextlib import suppress
from itertools import zip_longest
from typing import NamedTuple

SPEC_FORMS = "name, name=17, name=17.*, name==17.2, name>=17,<18, name=17.2=build"
# Return code of a search whose "module load" failed.
LOAD_FAILED = 97

_VERSION = r"\w[\w.!+]*?"
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*")
_EQUAL = re.compile(
    rf"=(?:=(?P<exact>{_VERSION})|(?P<begin>{_VERSION})(?P<star>\.\*)?|\*)(?:=(?P<build>[\w.*]+))?"
)
_BOUND = re.compile(rf"(?P<sign>[<>]=?|!=)(?P<version>{_VERSION})")

# The setting to blame, by the name of a client's error. All other errors are problems of the client itself.
_BLAME = {
    "specs": r"Packages?NotFound|Unsatisfiable|InvalidMatchSpec|SolverError",
    "channels": r"Channel|HTTP|SSL|Proxy|Gateway|Checksum|Connect|ChunkedEncoding|Timeout|PathNotFound|EOF|Archive",
    "lock": r"ValidatePackageRecords",
    "": r"^(Import|ModuleNotFound)Error$",  # the setting that names the client
}
# Settings to blame before any file of an environment is changed. Rattler links some packages while it downloads others.
BEFORE_LINKING = {
    "rattler": ("specs", "lock", "rattler_python"),
    "conda": ("specs", "lock", "client", "channels", "package_cache"),
}
# An incomplete package in conda's cache.
_DAMAGED = re.compile(r"located at (/.+?)\s+appears to be corrupted")
_FETCHING = re.compile(
    r"failed to fetch|failed to download|download error|incorrect download|transfer finalized|https?://", re.IGNORECASE
)
# Permanent errors of a channel. All other errors may be temporary.
_FINAL = re.compile(r"\b40[0134]\b|\b410\b|could not find subdir|certificate", re.IGNORECASE)
# Text that conda adds to an error. The reason of a failed connection may stand between and after these lines.
_ADVICE = re.compile(
    r"\s+(?:Elapsed: .*|CF-RAY: .*|An HTTP error occurred when .*|HTTP errors are often .*"
    r"|If your current network has .*\n.*|Current channels:[\s\S]*)"
)
_SECRET = re.compile(r"(://)[^/\s]+(?=@)|(https?://\S*?/t/)[^/\s]+")
# A requirement on the host, as rattler and libmamba or conda's classic solver print it.
_HOST_NEED = re.compile(r"__(?P<name>\w+)(?:\[version=')?\s*(?P<bounds>[<>]=?[\w.]+(?:,[<>]=?[\w.]+)*)")

_COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class CondaError(Exception):
    """One line for the user: the setting, its value, and the allowed values."""


class Package(NamedTuple):
    name: str
    version: str
    build: str


class Spec(NamedTuple):
    """The wanted version of one package. ``bounds`` pair a sign with a version; ``=`` is any version that begins so."""

    text: str
    name: str
    bounds: tuple[tuple[str, str], ...]
    build: str

    @property
    def canonical(self) -> str:
        """Return the form that rattler, the strictest parser, accepts."""
        bounds = ",".join(f"{version}.*" if sign == "=" else sign + version for sign, version in self.bounds)
        return f"{self.name} {bounds or '*'} {self.build or '*'}"


class Answer(NamedTuple):
    """A client's answer: all packages present after its actions, or the problem and the setting to blame.

    ``links`` describe the packages to be added in the client's own words; those of the rattler helper suffice for a
    lock file.
    """

    packages: dict[str, Package]
    setting: str = ""
    problem: str = ""
    links: tuple[dict, ...] = ()


def parse_spec(text: str) -> Spec:
    squeezed = re.sub(r"\s*([=<>!,])\s*", r"\1", text.strip())
    name = _NAME.match(squeezed.lower())
    rest = squeezed[name.end() :] if name else ""
    bounds = [_BOUND.fullmatch(bound) for bound in rest.split(",")] if rest else []
    equal = _EQUAL.fullmatch(rest)
    if not name or not (equal or all(bounds)):
        raise CondaError(f"specs: {text!r} cannot be parsed; write it as one of {SPEC_FORMS}")
    if equal:
        version, build = equal["exact"] or equal["begin"], equal["build"] or ""
        is_exact = equal["exact"] or (build and not equal["star"])  # a build makes the version exact, as in conda
        pairs = [("==" if is_exact else "=", version)] if version else []
    else:
        pairs, build = [(bound["sign"], bound["version"]) for bound in bounds if bound], ""
    return Spec(name[0] + rest, name[0], tuple(pairs), build)


def _segments(version: str) -> list[list[tuple[int, int, str]]]:
    """Split a version into the parts that conda compares: dev, words, numbers and post, in this order."""
    epoch, _mark, rest = version.lower().rpartition("!")
    result = []
    for segment in re.split(r"[._+-]", f"{epoch or 0}.{rest}"):
        parts = re.findall(r"\d+|[a-z]+", segment)
        padded = parts if parts and parts[0].isdigit() else ["0", *parts]
        result.append([_rank(part) for part in padded])
    return result


def _rank(part: str) -> tuple[int, int, str]:
    if part.isdigit():
        return (2, int(part), "")
    return ({"dev": 0, "post": 3}.get(part, 1), 0, part)


def compare_versions(left: str, right: str) -> int:
    """Return a number below, at or above 0, in conda's order: 1.0dev < 1.0a < 1.0 == 1 < 1.1."""
    zero = (2, 0, "")
    for mine, theirs in zip_longest(_segments(left), _segments(right), fillvalue=[zero]):
        for one, other in zip_longest(mine, theirs, fillvalue=zero):
            if one != other:
                return -1 if one < other else 1
    return 0


def _is_within(version: str, bound: tuple[str, str]) -> bool:
    sign, limit = bound
    if sign == "=":
        *begin, end = _segments(limit)
        given = _segments(version)[: len(begin) + 1]
        return given[:-1] == begin and given[-1][: len(end)] == end
    return _COMPARE[sign](compare_versions(version, limit), 0)


def satisfies(package: Package, spec: Spec) -> bool:
    return (
        package.name == spec.name
        and all(_is_within(package.version, bound) for bound in spec.bounds)
        and fnmatch.fnmatchcase(package.build, spec.build or "*")
    )


def all_satisfied(packages: dict[str, Package], specs: list[Spec]) -> bool:
    return all(spec.name in packages and satisfies(packages[spec.name], spec) for spec in specs)


def major_of(version: str) -> str:
    return re.split(r"\D", version, maxsplit=1)[0]


def allows_major(spec: Spec, major: str) -> bool:
    """Return whether some version of this major satisfies the spec."""
    named = [version for _sign, version in spec.bounds if major_of(version) == major]
    tried = [f"{major}.0", f"{major}.999999", *named, *(f"{version}.1" for version in named)]
    return any(all(_is_within(version, bound) for bound in spec.bounds) for version in tried)


def parse_record(text: str) -> Package:
    """Read one file of ``conda-meta``; raise ValueError or KeyError if it is damaged."""
    record = json.loads(text)
    return Package(record["name"], record["version"], record["build"])


def is_whole(records: list[dict]) -> bool:
    """Return whether all dependencies of the recorded packages are present, as far as their specs can be parsed.

    A spec with a build or alternative versions cannot be parsed; then only the name is checked.
    """
    packages = {record["name"]: Package(record["name"], record["version"], record["build"]) for record in records}

    def is_met(text: str) -> bool:
        name = re.split(r"[\s=<>!~\[]", text.lower(), maxsplit=1)[0]
        with suppress(CondaError):
            return name in packages and satisfies(packages[name], parse_spec(text))
        return name in packages

    needs = {text for record in records for text in record.get("depends") or []}
    return all(is_met(text) for text in needs if not text.startswith("__"))  # a property of the host


def difference(before: dict[str, Package], after: dict[str, Package]) -> dict[str, dict[str, str]]:
    """Return an Ansible diff of the packages that are added, removed or changed."""

    def changed(those: dict[str, Package], others: dict[str, Package]) -> dict[str, str]:
        return {
            name: f"{package.version} {package.build}".rstrip()
            for name, package in sorted(those.items())
            if others.get(name) != package
        }

    return {"before": changed(before, after), "after": changed(after, before)}


def verb_command(client: str, create: bool) -> list[str]:
    """Return the beginning of a call of conda, mamba or micromamba; only conda adds the user's default packages."""
    plain = ["--no-default-packages"] if create and client.rpartition("/")[2] == "conda" else []
    return [client, "create" if create else "install", *plain]


def conda_command(
    client: str, create: bool, prefix: str, channels: list[str], specs: list[Spec], dry_run: bool
) -> list[str]:
    """Return the call of conda, mamba or micromamba. ``create`` deletes everything at ``prefix``."""
    return [
        *verb_command(client, create),
        *("-y", "-q", "--json"),
        *(["--dry-run"] if dry_run else []),
        "--override-channels",
        *(argument for channel in channels for argument in ("-c", channel)),
        *("-p", prefix),
        *(spec.text for spec in specs),
    ]


def rattler_command(
    python: str,
    source: str,
    prefix: str,
    channels: list[str],
    specs: list[Spec],
    installed: dict[str, Package],
    dry_run: bool,
    cache: str | None,
    host: dict | None = None,
) -> list[str]:
    """Return the call of the rattler helper, whose ``source`` is passed to the interpreter as an argument.

    ``host`` is the result of ``describe_host``, if the environment is for another host.
    """
    others = sorted(set(installed) - {spec.name for spec in specs})  # packages that are not requested would be removed
    request = {
        "prefix": prefix,
        "channels": channels,
        "specs": [*(spec.canonical for spec in specs), *others],
        "dry_run": dry_run,
        "cache": cache,
        "host": host,
    }
    return [python, "-I", "-c", source, json.dumps(request)]


def describe_host(platform: str, machine: str, release: str, glibc: str) -> dict:
    """Return a solver's data on another host: conda's name for the platform, and the virtual packages."""
    kernel = re.match(r"\d+(\.\d+)*", release)
    virtual = [("__unix", "0", "0"), ("__archspec", "1", machine)]
    virtual += [("__linux", kernel[0], "0")] if kernel and platform.startswith("linux-") else []
    virtual += [("__glibc", glibc, "0")] if glibc else []
    return {"platform": platform, "virtual": virtual}


def clean_command(command: list[str], timeout: int, cache: str | None) -> list[str]:
    """otherwise conda installs a file truncated by a kill during unpacking"""
    strict = "CONDA_SAFETY_CHECKS=enabled"  # else conda installs a file truncated by a kill during unpacking
    unset = [word for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME") for word in ("-u", name)]
    # the cache has the layout of mamba's root, so that mamba uses it
    caches = [f"CONDA_PKGS_DIRS={cache}/pkgs", f"MAMBA_ROOT_PREFIX={cache}"] if cache else []
    return ["timeout", "--kill-after=10", str(timeout), "env", *unset, strict, *caches, *command]


def search_command(module_load: str | None, names: list[str]) -> list[str]:
    """Return the call of a login shell that prints the paths of clients."""
    load = f"{{ {module_load}\n}} >&2 || exit {LOAD_FAILED}\n" if module_load else ""
    # type -P, because "conda init" makes conda a shell function
    return ["bash", "-lc", f'{load}printf "%s\\n" "$MAMBA_EXE" "$CONDA_EXE"; type -P "$@"', "bash", *names]


def parse_search(stdout: str, names: list[str]) -> list[str]:
    """Return the clients' paths; other output of the login shell is ignored."""
    return [line for line in stdout.splitlines() if line.startswith("/") and line.rsplit("/", 1)[1] in names]


def parse_answer(code: int, stdout: str, stderr: str, installed: dict[str, Package], provider: str) -> Answer:
    """Parse a client's answer. It does not prove what was done: clients may crash after all work is complete."""
    content = _last_object(stdout)
    if content.get("success") or (not content and code == 0):  # conda prints nothing for a lock file
        actions = content.get("actions") or {}
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            links = actions.get("LINK") or [] if isinstance(actions, dict) else []
            return Answer(_after(actions, installed), links=tuple(links))
        return Answer({}, "provider", "its answer has an unknown format")
    if content.get("solver_problems"):
        return Answer({}, "specs", _one_line("; ".join(content["solver_problems"])))
    if not content and code in (124, 137):
        return Answer({}, "timeout", "the client was stopped")
    program = "rattler_python" if provider == "rattler" else "client"
    if not content and code in (126, 127):
        return Answer({}, program, _one_line(stderr))
    last_words = "\n".join((stderr or stdout).strip().splitlines()[-3:]) or "it printed nothing"
    blamed = [_blame(error, last_words, program) for error in _flat(content)]
    # errors with a remedy come first, possibly temporary ones last
    ranks = {"package_cache": 0, "channels": 2}
    setting = min((setting for setting, _problem in blamed), key=lambda setting: ranks.get(setting, 1))
    return Answer({}, setting, "; ".join(dict.fromkeys(problem for blames, problem in blamed if blames == setting)))


def _flat(error: dict) -> list[dict]:
    """Return the error's nested errors, or the error itself: conda nests them."""
    parts = [part if isinstance(part, dict) else {"message": part} for part in error.get("errors") or []]
    return [each for part in parts for each in _flat(part)] or [error]


def _blame(error: dict, last_words: str, program: str) -> tuple[str, str]:
    """Return the setting to blame for an error, and the problem; ``program`` is the setting that names the client."""
    name, problem = (str(error.get(key) or "") for key in ("exception_name", "message"))
    problem = problem or str(error.get("error") or last_words)
    damaged = _DAMAGED.search(problem)
    if damaged:
        return "package_cache", f"rm -r {shlex.quote(damaged[1])}"
    guess = "channels" if _FETCHING.search(problem) else "provider"
    setting = next((setting for setting, names in _BLAME.items() if re.search(names, name)), guess)
    return setting or program, _one_line(_ADVICE.sub("", problem))


def _last_object(stdout: str) -> dict:
    """Return the last JSON object in a client's output; text and warnings, also in JSON, come before it."""
    last: dict = {}
    end = 0
    for line in re.finditer(r"^\s*(?=\{)", stdout, re.MULTILINE):
        if line.end() >= end:
            with suppress(ValueError):
                last, end = json.JSONDecoder().raw_decode(stdout, line.end())
    return last


def _after(actions: dict | list, installed: dict[str, Package]) -> dict[str, Package]:
    """Return the packages after the actions; an old conda has a list of groups of actions."""
    result = dict(installed)
    for group in actions if isinstance(actions, list) else [actions]:
        for item in group.get("UNLINK") or []:
            result.pop(_package_of(item).name, None)
        for item in group.get("LINK") or []:
            package = _package_of(item)
            result[package.name] = package
    return result


def _package_of(item: dict) -> Package:
    """Parse ``name-version-build``, which is ``dist_name`` in conda's output and ``fn``, with a suffix, in mamba's."""
    dist = item.get("dist_name") or re.sub(r"\.conda$|\.tar\.bz2$", "", item["fn"])
    name, version, build = dist.rsplit("-", 2)
    return Package(name, version, build)


def _one_line(text: str) -> str:
    """Return the text as one line without passwords and tokens: clients print whole URLs."""
    return _SECRET.sub(lambda secret: f"{secret[1] or secret[2]}***", " ".join(text.split()))


def has_secret(channel: str) -> bool:
    """Return whether a channel's URL contains a password or a token."""
    return bool(_SECRET.search(channel))


def may_pass(answer: Answer, channels: list[str]) -> bool:
    """Return whether a retry may succeed: the network was at fault, not the channel's content."""
    remote = any(not channel.startswith(("file:", "/")) for channel in channels)
    return answer.setting == "channels" and remote and not _FINAL.search(answer.problem)


def unmet_need(problem: str, glibc: str) -> str:
    """Return a solver's unmet requirement on the host, such as ``__glibc >=2.34``; empty if there is none."""
    for need in _HOST_NEED.finditer(problem):
        bounds = [_BOUND.fullmatch(bound) for bound in need["bounds"].split(",")]
        pairs = [(bound["sign"], bound["version"]) for bound in bounds if bound]
        # the classic solver names glibc in every error
        if need["name"] != "glibc" or not glibc or not all(_is_within(glibc, pair) for pair in pairs):
            return f"__{need['name']} {need['bounds']}"
    return ""


def explain(answer: Answer, params: dict, specs: list[Spec], glibc: str) -> str:
    """Return the sentence for the user: the setting, its value and the allowed values."""
    channels, problem = params["channels"], textwrap.shorten(answer.problem, 600, placeholder=" …")
    if answer.setting == "channels":
        named = [channel for channel in channels if channel.rstrip("/") in problem] or channels
        return f"channels: cannot read {', '.join(named)}: {problem}"
    if answer.setting == "lock":
        return f"lock: {problem}"
    if answer.setting == "package_cache":
        return (
            "package_cache: the client's cache holds incomplete packages (it was probably killed while unpacking); "
            f"remove them and run this again: {answer.problem}"
        )
    if answer.setting == "specs":
        wanted = " ".join(spec.text for spec in specs)
        need = unmet_need(answer.problem, glibc)
        if need:
            return (
                f"specs: nothing in {', '.join(channels)} satisfies {wanted} on this host: it needs {need}, and the "
                f"host has glibc {glibc or 'not at all'}; ask for an older version, or another channel"
            )
        return f"specs: nothing in {', '.join(channels)} satisfies {wanted}: {problem}"
    if answer.setting == "rattler_python":
        return f"rattler_python: {params['rattler_python']} cannot use py-rattler: {problem}"
    return f"{answer.setting}: {params[answer.setting]}: {problem}"
