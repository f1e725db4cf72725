# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Installed packages, wanted packages, and the calls and answers of clients.

A client is conda, mamba, micromamba or the rattler helper. Each is an argument list whose answer is JSON.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from contextlib import suppress
from typing import NamedTuple

SPEC_FORMS = "name, name=17, name=17.*, name==17.2, name>=17,<18, name=17.2=build"
# Return code of a search whose "module load" failed.
LOAD_FAILED = 97

_VERSION = r"\w[\w.!+]*"
_LIMIT = rf"(?:[<>]=?|!=){_VERSION}"
_SPEC = re.compile(
    r"(?P<name>[a-z0-9_][a-z0-9_.-]*)"
    rf"(?:(?:=={_VERSION}|={_VERSION}(?:\.\*)?|=\*)(?:=[\w.*]+)?|{_LIMIT}(?:,{_LIMIT})*)?",
    re.ASCII | re.IGNORECASE,
)

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
    "conda": ("specs", "lock", "client", "channels", "cache"),
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


class CondaError(Exception):
    """One line for the user: the setting, its value, and the allowed values."""


class Package(NamedTuple):
    name: str
    version: str
    build: str


class Spec(NamedTuple):
    """A wanted package: its name in lower case, and the spec without spaces as clients get it."""

    text: str
    name: str


class Answer(NamedTuple):
    """A client's answer: all packages present after its actions, or the problem and the setting to blame.

    Without output there are neither packages nor a problem.

    ``links`` describe the packages to be added in the client's own words; those of the rattler helper suffice for a
    lock file.
    """

    packages: dict[str, Package]
    setting: str = ""
    problem: str = ""
    links: tuple[dict, ...] = ()


def parse_spec(text: str) -> Spec:
    """Return the spec; raise CondaError unless it has one of SPEC_FORMS. Only clients compare versions with it."""
    squeezed = re.sub(r"\s*([=<>!,])\s*", r"\1", text.strip())
    found = _SPEC.fullmatch(squeezed)
    if not found:
        raise CondaError(f"specs: {text!r} cannot be parsed; write it as one of {SPEC_FORMS}")
    name = found["name"].lower()
    return Spec(name + squeezed[len(name) :], name)


def pins(packages: dict[str, Package]) -> list[Spec]:
    """Return specs that only these builds satisfy."""
    return [Spec(f"{name}={package.version}={package.build}", name) for name, package in packages.items()]


def major_of(version: str) -> str:
    return re.split(r"\D", version, maxsplit=1)[0]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def allows_major(spec: Spec, version: str) -> bool:
    """Return whether the numbers in a spec leave room for the major of this version. Clients decide the rest."""
    major = _numbers(version)[:1]
    for part in spec.text[len(spec.name) :].split(","):
        bound = re.match(r"([<>=]+)([\d.]+)", part)
        sign, limit = (bound[1], _numbers(bound[2])) if bound else ("", [])
        if (
            (sign in ("=", "==") and limit[:1] != major)
            or (sign in (">", ">=") and limit[:1] > major)
            or (sign == "<" and limit <= major)
            or (sign == "<=" and limit < major)
        ):
            return False
    return True


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
    client: str, create: bool, prefix: str, channels: list[str], specs: list[Spec], dry_run: bool, skip: bool = False
) -> list[str]:
    """Return the call of conda, mamba or micromamba. ``create`` deletes everything at ``prefix``.

    With ``skip``, packages that satisfy the specs stay. Only conda itself needs an option for it.
    """
    return [
        *verb_command(client, create),
        *("-y", "-q", "--json"),
        *(["--dry-run"] if dry_run else []),
        *(["--satisfied-skip-solve"] if skip and client.rpartition("/")[2] == "conda" else []),
        "--override-channels",
        *(argument for channel in channels for argument in ("-c", channel)),
        *("-p", prefix),
        *(spec.text for spec in specs),
    ]


def solve_request(
    channels: list[str], specs: list[Spec], installed: dict[str, Package], dry_run: bool, host: dict | None = None
) -> dict:
    """Return a request to the rattler helper. ``host`` is the result of ``describe_host``, if it is another host."""
    others = sorted(set(installed) - {spec.name for spec in specs})  # packages that are not requested would be removed
    wanted = [*(spec.text for spec in specs), *others]
    return {"channels": channels, "specs": wanted, "dry_run": dry_run, "host": host}


def describe_host(platform: str, machine: str, release: str, glibc: str) -> dict:
    """Return a solver's data on another host: conda's name for the platform, and the virtual packages."""
    kernel = re.match(r"\d+(\.\d+)*", release)
    virtual = [("__unix", "0", "0"), ("__archspec", "1", machine)]
    virtual += [("__linux", kernel[0], "0")] if kernel and platform.startswith("linux-") else []
    virtual += [("__glibc", glibc, "0")] if glibc else []
    return {"platform": platform, "virtual": virtual}


def clean_command(command: list[str], timeout: int) -> list[str]:
    """Return the command with a time limit in seconds, without variables of other software."""
    strict = "CONDA_SAFETY_CHECKS=enabled"  # else conda installs a file truncated by a kill during unpacking
    unset = [word for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME") for word in ("-u", name)]
    return ["timeout", "--kill-after=10", str(timeout), "env", *unset, strict, *command]


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
    if not content and code == 0:  # conda prints nothing for a lock file
        return Answer({})
    if content.get("success"):
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
    ranks = {"cache": 0, "channels": 2}
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
        return "cache", f"rm -r {shlex.quote(damaged[1])}"
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
        lowest = re.findall(r">=?([\d.]+)", need["bounds"])
        # the classic solver names glibc in every error
        if need["name"] != "glibc" or not glibc or any(_numbers(glibc) < _numbers(limit) for limit in lowest):
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
    if answer.setting == "cache":
        return (
            "client: the client's cache contains incomplete packages (it was probably killed while unpacking); "
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
