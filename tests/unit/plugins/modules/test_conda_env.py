# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda_env against a client that installs, removes and dies like real ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import (
    LOAD_FAILED,
    CondaError,
    Package,
    Spec,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Waiting
from ansible_collections.mala.hpc_db.plugins.modules import conda_env
from ansible_collections.mala.hpc_db.plugins.modules.conda_env import ensure_env, find_program

OLD = {"postgresql": "17.2", "libpq": "17.2"}
NEW = {"postgresql": "17.10", "libpq": "17.10"}
DIED = "died"


class Killed(BaseException):
    """The module is killed while the client runs."""


COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def fits(version: str, spec: str) -> bool:
    """Return whether a version satisfies a spec, as far as this module has such ones."""
    for sign, limit in re.findall(r"([<>=]+)(\d[\d.]*)", spec):
        given = numbers(version)[: len(numbers(limit))] if sign == "=" else numbers(version)
        if not COMPARE.get(sign, operator.eq)(given, numbers(limit)):
            return False
    return True


class FakeClient:
    """Installs postgresql and the libpq of its version, with the commands of rattler and of conda.

    As real clients do, it keeps installed versions that satisfy the specs.
    """

    available = ("17.2", "17.10", "18.6")
    login_shell = (0, "", "")
    postgres = (0, "OpenSSL\n", "")
    outages = 0  # number of calls that find the channel unreachable after a part of the work
    outages_spare_plans = False
    outage = "HTTP 503 SERVICE UNAVAILABLE for url <https://host/conda-forge>"
    fate = ""  # of the next installation: the package after which it is killed, or DIED to end silently when done
    last_words: tuple[int, str, str] | None = None  # printed by an installation that has done all of its work

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        words = command[command.index("env") + 1 :]
        while words[0] in ("env", "-u") or "=" in words[0]:
            words = words[2:] if words[0] == "-u" else words[1:]
        if words[0] == "bash":
            self.calls.append("login")
            return self.login_shell
        if words[0].endswith("/bin/postgres"):
            return self.postgres
        if words[0].endswith("/bin/pg_config"):
            return 0, "'--prefix=/p' '--with-gssapi'\n", ""
        if words[1] == "-I":
            request = json.loads(words[-1])
            if "into" in request:
                return self.keep_archives(Path(request["into"]), [each["url"] for each in request["lock"]])
            if "lock" in request:
                return self.install_locked("fulfil", Path(request["prefix"]), [each["url"] for each in request["lock"]])
            verb, prefix, specs, dry_run = "fulfil", Path(request["prefix"]), request["specs"], request["dry_run"]
        else:
            at = words.index("-p") + 1
            if "--file" in words:
                lines = Path(words[-1]).read_text().splitlines()
                return self.install_locked(words[1], Path(words[at]), lines[lines.index("@EXPLICIT") + 1 :])
            verb, prefix, specs, dry_run = words[1], Path(words[at]), words[at + 1 :], "--dry-run" in words
        self.calls.append(f"{verb} --dry-run" if dry_run else verb)
        return self.install(verb, prefix, specs, dry_run)

    def install(self, verb: str, prefix: Path, specs: list[str], dry_run: bool) -> tuple[int, str, str]:
        if verb == "create" and prefix.exists() and not dry_run:
            shutil.rmtree(prefix)
        if self.outages and not (dry_run and self.outages_spare_plans):
            self.outages -= 1
            if not dry_run:
                write_record(prefix, "libpq", self.available[-1])
            return 1, json.dumps({"exception_name": "CondaHTTPError", "message": self.outage}), ""
        versions = [version for version in self.available if all(fits(version, spec) for spec in specs)]
        if not versions:
            return 1, json.dumps({"exception_name": "SolverError", "message": "no candidates"}), ""
        installed = dict(path.name.split("-")[:2] for path in prefix.glob("conda-meta/*-h_0.json"))
        needs_postgresql = "postgresql" in {*installed, *(re.split("[<>=]", spec)[0] for spec in specs)}
        names = ["postgresql", "libpq"] if needs_postgresql else ["libpq"]
        kept = {installed.get(name, "") for name in names}
        version = kept.pop() if len(kept) == 1 and kept <= set(versions) else versions[-1]
        links = [{"dist_name": f"{name}-{version}-h_0", **record_of(name, version)} for name in names]
        if not dry_run:
            for name in names:
                write_record(prefix, name, version)
                if self.fate == name:
                    self.fate = ""
                    raise Killed
        if self.fate == DIED and not dry_run:
            return -11, json.dumps({"success": True}), "Segmentation fault"
        if self.last_words and not dry_run:
            return self.last_words
        return 0, json.dumps({"success": True, "actions": {"LINK": links}}), ""

    def install_locked(self, verb: str, prefix: Path, urls: list[str]) -> tuple[int, str, str]:
        self.calls.append(f"{verb} --file")
        if self.outages:
            self.outages -= 1
            return 1, json.dumps({"exception_name": "CondaHTTPError", "message": self.outage}), ""
        if verb == "create" and prefix.exists():
            shutil.rmtree(prefix)
        if verb == "fulfil":  # only this client removes packages that are not in the list
            shutil.rmtree(prefix / "conda-meta", ignore_errors=True)
        names = [url.rpartition("/")[2].split("-") for url in urls]
        for name, version, _build in names:
            write_record(prefix, name, version)
        if self.last_words:
            return self.last_words
        # conda itself prints nothing
        return 0, json.dumps({"success": True, "actions": {}}) if verb == "fulfil" else "", ""

    def keep_archives(self, into: Path, urls: list[str]) -> tuple[int, str, str]:
        self.calls.append("keep")
        if self.outages:
            self.outages -= 1
            return 1, json.dumps({"exception_name": "OSError", "message": "failed to fetch https://host/c"}), ""
        into.mkdir(parents=True, exist_ok=True)
        for url in urls:
            (into / url.rpartition("/")[2]).touch()
        return 0, json.dumps({"success": True, "actions": {}}), ""


def lock_of(packages: dict[str, str]) -> str:
    channel = "https://host/conda-forge/noarch"
    lines = [f"{channel}/{name}-{version}-h_0.conda#sha256:{'a' * 64}\n" for name, version in packages.items()]
    return "@EXPLICIT\n" + "".join(lines)


def record_of(name: str, version: str) -> dict[str, str]:
    return {"name": name, "url": f"https://host/conda-forge/noarch/{name}-{version}-h_0.conda", "sha256": "a" * 64}


def write_record(prefix: Path, name: str, version: str) -> None:
    metadata = prefix / "conda-meta"
    metadata.mkdir(parents=True, exist_ok=True)
    for older in metadata.glob(f"{name}-*.json"):
        older.unlink()
    depends = ["__glibc >=2.17", f"libpq =={version}"] if name == "postgresql" else []
    record = {"name": name, "version": version, "build": "h_0", "depends": depends}
    (metadata / f"{name}-{version}-h_0.json").write_text(json.dumps(record))


def make_env(prefix: Path, packages: dict[str, str]) -> None:
    for name, version in packages.items():
        write_record(prefix, name, version)
    (prefix / "keep").write_text("precious")


def plans(command: list[str]) -> bool:
    """Return whether a command only solves."""
    return "--dry-run" in command or '"dry_run": true' in command[-1]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "" for path in folder.rglob("*")}


def without_stamp(prefix: Path) -> dict[str, str]:
    return {name: text for name, text in content(prefix).items() if name != conda_env.STAMP}


def identity(path: Path) -> tuple[int, int, int]:
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_mtime_ns


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "a b" / "postgresql-17"


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture(params=["rattler", "conda"])
def provider(request: pytest.FixtureRequest) -> str:
    return request.param


def params_for(prefix: Path, **others: object) -> dict:
    return {
        "prefix": str(prefix),
        "specs": ["postgresql=17"],
        "channels": ["conda-forge"],
        "state": "present",
        "provider": "rattler",
        "rattler_python": "/env/bin/python",
        "client": sys.executable,
        "module_load": None,
        "lock": None,
        "update": False,
        "lease": None,
        "archives": None,
        "host": None,
        "timeout": 60,
        **others,
    }


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("before", "specs", "changed", "after"),
    [
        (None, ["postgresql=17"], True, NEW),
        ({}, ["postgresql=17"], True, NEW),
        (OLD, ["postgresql=17"], False, OLD),
        (OLD, ["postgresql>=17,<18", "libpq"], False, OLD),
        (OLD, ["postgresql>17.2"], True, NEW),  # and not 18.6
        (OLD, ["libpq==17.10"], True, NEW),
        (NEW, ["postgresql==17.2"], True, OLD),
    ],
)
def test_changes_only_what_differs(
    prefix: Path,
    client: FakeClient,
    provider: str,
    before: dict[str, str] | None,
    specs: list[str],
    changed: bool,
    after: dict[str, str],
    check_mode: bool,
) -> None:
    if before:
        make_env(prefix, before)
    elif before is not None:
        prefix.mkdir(parents=True)
    params = params_for(prefix, specs=specs, provider=provider)
    found = content(prefix)

    result = ensure_env(params, client, check_mode)

    assert (result["changed"], result["packages"]) == (changed, after)
    solved = [call.endswith("--dry-run") for call in client.calls]
    assert solved == ([True, False] if changed and not check_mode else [True])
    assert not prefix.with_name("postgresql-17.unfinished").exists()
    if check_mode:
        assert content(prefix) == found
    else:
        client.calls.clear()
        for again in (True, False):
            assert ensure_env(params, client, again)["changed"] is False
        assert client.calls == []
        assert ("keep" in content(prefix)) is bool(before)


CHANGES: dict[str, tuple[dict, Callable[[Path], object]]] = {
    "specs": ({"specs": ["postgresql=17", "libpq"]}, lambda prefix: None),
    "provider": ({"provider": "conda"}, lambda prefix: None),
    "no record": ({}, lambda prefix: (prefix / conda_env.STAMP).unlink()),
    "damaged record": ({}, lambda prefix: (prefix / conda_env.STAMP).write_text('{"specs": ["post')),
    "another package": ({}, lambda prefix: write_record(prefix, "tzdata", "1")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_client_is_asked_once_about_what_is_new(prefix: Path, client: FakeClient, change: str) -> None:
    make_env(prefix, OLD)
    ensure_env(params_for(prefix), client, False)
    arguments, act = CHANGES[change]
    act(prefix)
    found, params = without_stamp(prefix), params_for(prefix, **arguments)
    client.calls.clear()

    for check_mode, satisfied in ((True, False), (False, False), (True, True), (False, True)):
        result = ensure_env(params, client, check_mode)
        assert (result["changed"], result["satisfied"], result["version"]) == (False, satisfied, "17.2")

    assert len(client.calls) == 2 and all(call.endswith("--dry-run") for call in client.calls)
    assert without_stamp(prefix) == found and os.listdir(prefix.parent) == [prefix.name]


def test_environment_without_a_record_is_taken_over_under_a_server(
    prefix: Path, tmp_path: Path, client: FakeClient, provider: str
) -> None:
    make_env(prefix, OLD)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lease.1").write_text('{"job": "7", "host": "c1"}')
    found = content(prefix)

    result = ensure_env(params_for(prefix, provider=provider, lease=str(tmp_path / "run")), client, False)

    assert (result["changed"], result["packages"], result["diff"]) == (False, OLD, {"before": {}, "after": {}})
    assert without_stamp(prefix) == found


def test_newer_dependencies_are_no_reason_for_a_change(prefix: Path, client: FakeClient) -> None:
    """conda itself plans them for some packages, such as openssl."""
    make_env(prefix, OLD)

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if not plans(command):
            return client(command, pass_fds)
        links = [{"dist_name": "libpq-17.10-h_0"}]
        return 0, json.dumps({"success": True, "actions": {"LINK": links}}), ""

    assert ensure_env(params_for(prefix, provider="conda"), run, False)["changed"] is False
    assert client.calls == []


@pytest.mark.parametrize("left", ["", "changing 17.2"])
def test_conda_leaves_what_satisfies_the_specs_only_in_a_whole_environment(
    prefix: Path, tmp_path: Path, client: FakeClient, left: str
) -> None:
    make_env(prefix, OLD)
    if left:
        prefix.with_name("postgresql-17.unfinished").write_text(left)
    conda = shutil.copy("/bin/true", tmp_path / "conda")
    skips: list[bool] = []

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if str(conda) in command:
            skips.append("--satisfied-skip-solve" in command)
        return client(command, pass_fds)

    params = params_for(prefix, provider="conda", client=str(conda), specs=["postgresql==17.10"])
    assert ensure_env(params, run, False)["packages"] == NEW

    assert skips == [not left, False]  # one solves, the other one installs


def test_missing_dependency_is_installed(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    ensure_env(params_for(prefix), client, False)
    (prefix / "conda-meta/libpq-17.2-h_0.json").unlink()
    client.available = ("17.2",)

    assert ensure_env(params_for(prefix), client, True)["packages"] == OLD
    assert ensure_env(params_for(prefix), client, False)["changed"] is True
    assert ensure_env(params_for(prefix), client, False)["packages"] == OLD


def test_installed_packages_and_lock_file(prefix: Path, client: FakeClient) -> None:
    params = params_for(prefix)
    assert [ensure_env(params, client, True)[key] for key in ("installed", "satisfied", "lock")] == [None, False, None]

    make_env(prefix, OLD)
    result = ensure_env(params, client, False)
    assert (result["installed"], result["lock"]) == ({"postgresql": ["17.2", "h_0"], "libpq": ["17.2", "h_0"]}, None)

    for path in prefix.glob("conda-meta/*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, **record_of(record["name"], record["version"])}))
    planned = ensure_env(params_for(prefix, specs=["postgresql=17.10"]), client, True)
    assert planned["packages"] == NEW and planned["installed"] == result["installed"]
    assert "@EXPLICIT\n" in planned["lock"] and "libpq-17.2-h_0.conda#sha256:aaa" in planned["lock"]

    prefix.with_name("postgresql-17.unfinished").write_text("changing 17.2")
    half = ensure_env(params, client, True)
    assert (half["installed"], half["satisfied"], half["lock"]) == (None, False, None)


@pytest.mark.parametrize(("before", "verb"), [({}, "create"), (OLD, "install")])
def test_create_never_meets_an_environment(prefix: Path, client: FakeClient, before: dict[str, str], verb: str) -> None:
    if before:
        make_env(prefix, before)

    ensure_env(params_for(prefix, specs=["postgresql==17.10"], provider="conda"), client, False)

    assert client.calls == [f"{verb} --dry-run", verb]


def test_diff_names_what_changes(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, {"postgresql": "17.2", "libpq": "17.10"})

    diff = ensure_env(params_for(prefix, specs=["postgresql==17.10"]), client, True)["diff"]

    assert diff == {"before": {"postgresql": "17.2 h_0"}, "after": {"postgresql": "17.10 h_0"}}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("mine"), "it is not a directory"),
        (lambda path: (path / "mine").mkdir(parents=True), "it has no folder conda-meta"),
        (lambda path: path.symlink_to("nowhere"), "it is not a directory"),
        (lambda path: path.symlink_to(path.parent), "it has no folder conda-meta"),
    ],
    ids=["file", "folder", "dangling link", "link"],
)
def test_refuses_what_is_no_environment(prefix: Path, client: FakeClient, make: object, reason: str) -> None:
    prefix.parent.mkdir()
    make(prefix)  # type: ignore[operator]
    found = identity(prefix)

    with pytest.raises(CondaError, match=f"prefix: {prefix} exists and is not a conda environment: {reason}; "):
        ensure_env(params_for(prefix), client, False)

    assert identity(prefix) == found and client.calls == [] and os.listdir(prefix.parent) == [prefix.name]


@pytest.mark.parametrize(("inside", "allowed"), [("lib/x", False), ("x", False), ("envs/x", True), ("envs/x/y", True)])
def test_environment_in_an_environment(tmp_path: Path, client: FakeClient, inside: str, allowed: bool) -> None:
    make_env(tmp_path / "outer", OLD)
    params = params_for(tmp_path / "outer" / inside)

    if inside == "envs/x/y":
        make_env(tmp_path / "outer/envs/x", OLD)
    if allowed and inside == "envs/x":
        assert ensure_env(params, client, False)["changed"]
    else:
        with pytest.raises(CondaError, match="lies inside the conda environment"):
            ensure_env(params, client, False)


@pytest.mark.parametrize("spec", ["postgresql=18", "postgresql>=18", "postgresql==16.4"])
def test_never_another_major(prefix: Path, client: FakeClient, spec: str) -> None:
    make_env(prefix, OLD)
    found = content(prefix)

    with pytest.raises(CondaError, match=r"would replace the installed PostgreSQL 17.2 by another major; stay with"):
        ensure_env(params_for(prefix, specs=[spec]), client, False)

    assert content(prefix) == found and client.calls == []


def test_another_package_cannot_bring_another_major(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    found = content(prefix.parent)

    with pytest.raises(CondaError, match="specs: nothing in conda-forge satisfies libpq=18 postgresql=17: no cand"):
        ensure_env(params_for(prefix, specs=["libpq=18"]), client, False)

    assert content(prefix.parent) == found


@pytest.mark.parametrize("killed_after", ["postgresql", "libpq"])
@pytest.mark.parametrize("before", [{}, OLD])
def test_run_again_after_a_kill(
    prefix: Path, client: FakeClient, provider: str, before: dict[str, str], killed_after: str
) -> None:
    if before:
        make_env(prefix, before)
    params = params_for(prefix, specs=["postgresql==17.10"], provider=provider)
    client.fate = killed_after
    with pytest.raises(Killed):
        ensure_env(params, client, False)
    # the rest looks complete, but must not be trusted
    (prefix / "rest").write_text("half")
    assert ensure_env(params, client, True)["packages"] == NEW

    result = ensure_env(params, client, False)

    assert result["packages"] == NEW
    assert ("rest" in content(prefix)) is bool(before)
    assert not prefix.with_name("postgresql-17.unfinished").exists()
    client.calls.clear()
    assert ensure_env(params, client, False)["changed"] is False and client.calls == []


def test_major_stays_even_if_a_kill_has_lost_it(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    params = params_for(prefix, specs=["postgresql>17.2"])
    client.fate = "postgresql"
    with pytest.raises(Killed):
        ensure_env(params, client, False)
    (prefix / "conda-meta/postgresql-17.10-h_0.json").unlink()

    assert ensure_env(params, client, True)["packages"] == NEW
    assert ensure_env(params, client, False)["packages"] == NEW


def test_what_could_not_be_made_leaves_nothing(prefix: Path, client: FakeClient, provider: str) -> None:
    with pytest.raises(CondaError, match="specs: nothing in conda-forge satisfies postgresql=99: no candidates"):
        ensure_env(params_for(prefix, specs=["postgresql=99"], provider=provider), client, False)

    assert os.listdir(prefix.parent) == []


@pytest.mark.parametrize("check_mode", [False, True])
def test_unreachable_channel_is_tried_again(
    prefix: Path, client: FakeClient, provider: str, check_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    left: list[bool] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        left.append(prefix.exists())

    monkeypatch.setattr(conda_env.time, "sleep", sleep)
    params = params_for(prefix, provider=provider)
    client.outages, client.outages_spare_plans = 2, not check_mode

    assert ensure_env(params, client, check_mode)["packages"] == NEW
    assert (pauses, left) == ([2, 8], [False, False])  # no files that "create" could conflict with

    shutil.rmtree(prefix, ignore_errors=True)
    client.outages = 3
    with pytest.raises(CondaError, match="channels: cannot read conda-forge: tried 3 times: HTTP 503 SERVICE UNAVAIL"):
        ensure_env(params, client, check_mode)
    assert not prefix.exists()


def test_unreachable_channel_leaves_an_environment(
    prefix: Path, client: FakeClient, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conda_env.time, "sleep", lambda seconds: None)
    make_env(prefix, OLD)
    client.outages, client.outages_spare_plans = 3, True

    with pytest.raises(CondaError, match="tried 3 times"):
        ensure_env(params_for(prefix, specs=["postgresql=17.10"], provider=provider), client, False)

    assert (prefix / "keep").exists() and (prefix / "conda-meta/postgresql-17.2-h_0.json").exists()


@pytest.mark.parametrize(("outage", "timeout"), [("HTTP 404 NOT FOUND for channel conda-forge", 60), ("HTTP 503", 1)])
def test_not_tried_again(prefix: Path, client: FakeClient, outage: str, timeout: int) -> None:
    client.outage, client.outages = outage, 3

    with pytest.raises(CondaError, match=f"channels: cannot read conda-forge: {outage}"):
        ensure_env(params_for(prefix, timeout=timeout), client, False)

    assert client.calls == ["fulfil --dry-run"]


def test_unreachable_channel_is_named_though_time_is_up(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conda_env.time, "sleep", lambda seconds: None)
    error = json.dumps({"exception_name": "CondaHTTPError", "message": "HTTP 503"})
    answers = iter([(1, error, ""), (124, "", "")])

    with pytest.raises(CondaError, match="read conda-forge: tried 2 times: HTTP 503; the last attempt was stopped"):
        ensure_env(params_for(prefix), lambda command, pass_fds: next(answers), False)


@pytest.mark.parametrize(
    ("before", "check_mode", "version", "features"),
    [
        (None, False, "17.10", ["gssapi", "icu", "readline", "tls", "zlib"]),
        (None, True, "17.10", None),
        (OLD, False, "17.2", ["gssapi", "icu", "readline", "tls", "zlib"]),
        (OLD, True, "17.2", ["gssapi", "icu", "readline", "tls", "zlib"]),
    ],
)
def test_version_and_features(
    prefix: Path,
    client: FakeClient,
    before: dict[str, str] | None,
    check_mode: bool,
    version: str,
    features: list[str] | None,
) -> None:
    if before:
        make_env(prefix, before)

    result = ensure_env(params_for(prefix), client, check_mode)

    assert (result["version"], result["features"]) == (version, features)


def test_no_version_and_features_without_postgresql(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, {"libpq": "17.2"})

    result = ensure_env(params_for(prefix, specs=["libpq"]), client, False)

    assert (result["version"], result["features"]) == (None, None)


def test_programs_that_do_not_run_here(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    client.postgres = (1, "", "postgres: /lib64/libc.so.6: version `GLIBC_2.34'\nnot found")

    with pytest.raises(CondaError, match="prefix: .*/bin/postgres does not run on this host: .* `GLIBC_2.34' not fou"):
        ensure_env(params_for(prefix), client, False)


def test_crash_after_the_work_is_success(prefix: Path, client: FakeClient) -> None:
    client.fate = DIED

    assert ensure_env(params_for(prefix), client, False)["packages"] == NEW


ERRORS = {
    "error": "Multiple Errors Encountered.",
    "exception_name": "CondaMultiError",
    "errors": [
        {"exception_name": "CondaHTTPError", "message": f"HTTP 503 Busy for url <https://h/{name}>\nElapsed: 1"}
        for name in ("libpq", "postgresql", "libpq")
    ],
}
# Possible output of real clients after all work was done.
LAST_WORDS = {
    "nothing": (0, "", ""),
    "words": (0, "\nWelcome to HPC!\nPreparing transaction: done\n", ""),
    "a crash": (134, "", "Fatal Python error: PyGILState_Release"),
    "an error": (1, json.dumps({"exception_name": "NotWritableError", "message": "environments.txt"}), ""),
    "errors": (1, json.dumps(ERRORS), ""),
    "success in other words": (0, json.dumps({"success": True, "actions": {"LINK": ["c::libpq-17.10-h_0"]}}), ""),
    "a kill": (137, "", ""),
}


@pytest.mark.parametrize("lock", [None, lock_of(NEW)])
@pytest.mark.parametrize("before", [{}, OLD])
@pytest.mark.parametrize("last_words", LAST_WORDS)
def test_records_tell_what_was_done(
    prefix: Path, client: FakeClient, before: dict, lock: str | None, last_words: str
) -> None:
    if before:
        make_env(prefix, before)
    client.last_words = LAST_WORDS[last_words]
    params = params_for(prefix, provider="conda", specs=["postgresql==17.10"], lock=lock)

    done = ensure_env({**params, "update": bool(lock)}, client, False)

    tries = [call for call in client.calls if not call.endswith("--dry-run")]
    assert len(tries) == 1  # although the network may have been the cause
    assert done["changed"] and done["packages"] == NEW
    assert os.listdir(prefix.parent) == [prefix.name] and ("keep" in content(prefix)) is bool(before)
    assert ensure_env(params, client, False)["changed"] is False


@pytest.mark.parametrize("before", [{}, OLD])
@pytest.mark.parametrize("last_words", ["an error", "errors", "a kill"])
def test_records_do_not_tell_of_what_depends_on_others(
    prefix: Path, client: FakeClient, provider: str, before: dict, last_words: str
) -> None:
    if before:
        make_env(prefix, before)

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if plans(command):
            return client(command, pass_fds)
        write_record(prefix, "postgresql", "17.10")  # and the libpq of its version is still being installed
        return LAST_WORDS[last_words]

    params = params_for(prefix, provider=provider, channels=["file:///c"], specs=["postgresql==17.10"])
    with pytest.raises(CondaError, match=f"^(provider: {provider}: environments.txt|timeout|channels: cannot .* 503)"):
        ensure_env(params, run, False)

    assert not before or prefix.with_name("postgresql-17.unfinished").read_text() == "changing 17.2"
    assert ensure_env(params, client, False)["packages"] == NEW


@pytest.mark.parametrize("before", [{}, OLD])
def test_client_says_why_a_record_is_cut_off(prefix: Path, client: FakeClient, provider: str, before: dict) -> None:
    if before:
        make_env(prefix, before)

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if plans(command):
            return client(command, pass_fds)
        write_record(prefix, "postgresql", "17.10")
        os.truncate(prefix / "conda-meta" / "postgresql-17.10-h_0.json", 9)
        return 1, json.dumps({"exception_name": "OSError", "message": "No space left on device"}), ""

    params = params_for(prefix, provider=provider, channels=["file:///c"], specs=["postgresql==17.10"])
    with pytest.raises(CondaError, match="No space left on device"):
        ensure_env(params, run, False)

    assert prefix.exists() is bool(before)  # nothing is left of a new environment


def test_records_that_a_kill_has_left_tell_nothing(prefix: Path, client: FakeClient, provider: str) -> None:
    make_env(prefix, OLD)
    marker = prefix.with_name("postgresql-17.unfinished")
    marker.write_text("changing 17.2")
    client.last_words = LAST_WORDS["an error"]
    with pytest.raises(CondaError, match="environments.txt"):
        ensure_env(params_for(prefix, provider=provider), client, False)

    assert marker.read_text() == "changing 17.2"


@pytest.mark.parametrize("is_touched", [False, True])
@pytest.mark.parametrize("problem", ["No writeable pkgs directories configured.", "solver libmamba was not recognized"])
def test_environment_of_which_every_file_is_there_is_not_marked(
    prefix: Path, client: FakeClient, provider: str, problem: str, is_touched: bool
) -> None:
    make_env(prefix, OLD)
    record = prefix / "conda-meta/libpq-17.2-h_0.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": ["keep"]}))

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if plans(command):
            return client(command, pass_fds)
        if is_touched:
            (prefix / "keep").unlink()
        return 1, json.dumps({"exception_name": "CondaError", "message": problem}), ""

    params = params_for(prefix, provider=provider, specs=["postgresql==17.10"])
    with pytest.raises(CondaError, match=f"^provider: {provider}: {problem}$"):
        ensure_env(params, run, False)

    marker = prefix.with_name("postgresql-17.unfinished")
    assert (marker.read_text() if marker.exists() else "") == ("changing 17.2" if is_touched else "")
    assert ensure_env(params, client, False)["packages"] == NEW


NOT_THERE = """The following packages are not available from current channels:

  - postgresql==17.99

Current channels:

  - https://conda.anaconda.org/conda-forge/linux-64

To search for alternate channels that may provide the conda package you're
looking for, navigate to

    https://anaconda.org
"""


@pytest.mark.parametrize("left", ["", "changing 17.2"])
@pytest.mark.parametrize(
    ("said", "says"),
    [
        (
            {"exception_name": "PackagesNotFoundInChannelsError", "message": NOT_THERE},
            "specs: nothing in conda-forge satisfies postgresql==17.99 postgresql=17: The following packages are not "
            "available from current channels: - postgresql==17.99",
        ),
        (
            ERRORS,
            "channels: cannot read conda-forge: tried 3 times: HTTP 503 Busy for url <https://h/libpq>; "
            "HTTP 503 Busy for url <https://h/postgresql>",
        ),
    ],
)
def test_failed_before_anything_was_touched(
    prefix: Path, said: dict, says: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conda_env.time, "sleep", lambda seconds: None)
    make_env(prefix, OLD)
    marker = prefix.with_name("postgresql-17.unfinished")
    if left:
        marker.write_text(left)
    calls = []

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        calls.append(command)
        return 1, json.dumps(said), ""

    with pytest.raises(CondaError) as refused:
        ensure_env(params_for(prefix, provider="conda", specs=["postgresql==17.99"]), run, False)

    assert str(refused.value) == says
    assert len(calls) == (3 if "tried" in says else 1)
    assert (marker.read_text() if marker.exists() else "") == left  # otherwise no server would start


def test_cache_that_a_kill_has_left_is_named_with_what_mends_it(
    prefix: Path, tmp_path: Path, client: FakeClient
) -> None:
    damaged = [tmp_path / "it's pkgs" / name for name in ("libpq-17.10-h_0", "postgresql-17.10-h_0")]
    words = "The package for {0.name} located at {0}\nappears to be corrupted. The path '{1}'\n{2}\n"
    errors = [
        {"exception_name": name, "message": words.format(folder, path, what)}
        for folder, path, name, what in (
            (damaged[0], "lib/libpq.so", "SafetyError", "has an incorrect size.\n  reported size: 9 bytes"),
            (damaged[1], "bin/psql", "CondaVerificationError", "specified in the package manifest cannot be found."),
            (damaged[1], "bin/initdb", "CondaVerificationError", "specified in the package manifest cannot be found."),
        )
    ]
    make_env(prefix, OLD)
    params = params_for(prefix, provider="conda", specs=["postgresql==17.10"])

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        return client(command) if plans(command) else (1, json.dumps({**ERRORS, "errors": errors}), "")

    with pytest.raises(CondaError, match=r"^client: .* killed .*; remove them and run this again: rm ") as said:
        ensure_env(params, run, False)

    for folder in damaged:
        (folder / "info").mkdir(parents=True)
    subprocess.run(str(said.value).partition("again: ")[2], shell=True, check=True)
    assert not any(folder.exists() for folder in damaged)
    assert os.listdir(prefix.parent) == [prefix.name]
    assert ensure_env(params, client, False)["packages"] == NEW


def test_folder_that_a_failed_client_leaves_is_not_what_is_blamed(prefix: Path, client: FakeClient) -> None:
    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        if plans(command):
            return client(command, pass_fds)
        (prefix / "pkgs").mkdir(parents=True)
        return 1, json.dumps({"exception_name": "NoSpaceLeftError", "message": "No space left on devices."}), ""

    with pytest.raises(CondaError, match="^provider: conda: No space left on devices.$"):
        ensure_env(params_for(prefix, provider="conda"), run, False)

    assert os.listdir(prefix.parent) == []


@pytest.mark.parametrize("before", [{}, OLD])
def test_nothing_is_no_plan(prefix: Path, provider: str, before: dict) -> None:
    if before:
        make_env(prefix, before)

    with pytest.raises(CondaError, match=f"provider: {provider}: it did not say what it would install"):
        ensure_env(params_for(prefix, provider=provider, specs=["libpq=18"]), lambda *_, **__: (0, "", ""), True)


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("before", [{}, OLD])
@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (b"other", "lock: file://.*/libpq-17.10-h_0.conda has the sha256 d9298a10.*, but "),
        (None, "lock: cannot read file://"),
    ],
)
def test_conda_does_not_look_at_the_sums_of_files(
    prefix: Path, tmp_path: Path, client: FakeClient, before: dict, archive: bytes | None, says: str, check_mode: bool
) -> None:
    if before:
        make_env(prefix, before)
    folder = tmp_path / "a channel" / "noarch"
    folder.mkdir(parents=True)
    lock = "@EXPLICIT\n"
    for name in ("libpq", "postgresql"):
        (folder / f"{name}-17.10-h_0.conda").write_bytes(name.encode())
        lock += f"{folder.as_uri()}/{name}-17.10-h_0.conda#sha256:{hashlib.sha256(name.encode()).hexdigest()}\n"
    params = params_for(prefix, provider="conda", lock=lock, update=True)
    libpq = folder / "libpq-17.10-h_0.conda"
    if archive is None:
        libpq.unlink()
    else:
        libpq.write_bytes(archive)
    found = content(prefix)

    with pytest.raises(CondaError, match=says):
        ensure_env(params, client, check_mode)

    assert client.calls == [] and content(prefix) == found
    libpq.write_bytes(b"libpq")
    assert ensure_env(params, client, check_mode)["packages"] == NEW


@pytest.mark.parametrize("before", [{}, OLD])
def test_success_without_packages_is_none(prefix: Path, client: FakeClient, before: dict) -> None:
    if before:
        make_env(prefix, before)

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        return client(command) if plans(command) else (0, '{"success": true}', "")

    with pytest.raises(CondaError, match="provider: rattler: it ended well, but .* lacks what it should have"):
        ensure_env(params_for(prefix, specs=["postgresql=17.10"]), run, False)

    assert os.listdir(prefix.parent) == ([prefix.name] if before else [])


@pytest.mark.parametrize(
    ("code", "stdout"),
    [(127, ""), (0, '{"exception_name": "ModuleNotFoundError", "message": "No module named rattler"}')],
)
def test_check_before_rattler_is_there(prefix: Path, code: int, stdout: str) -> None:
    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        return code, stdout, "env: '/env/bin/python': No such file or directory"

    result = ensure_env(params_for(prefix, specs=["postgresql=17", "libpq"]), run, True)

    assert result["changed"]
    assert result["diff"] == {"before": {}, "after": {"postgresql": "=17", "libpq": "any"}}
    with pytest.raises(CondaError, match="rattler_python: /env/bin/python cannot use py-rattler: "):
        ensure_env(params_for(prefix), run, False)


@pytest.mark.parametrize("text", ['{"name"', "{}"])
def test_damaged_environment(prefix: Path, client: FakeClient, text: str) -> None:
    make_env(prefix, OLD)
    (prefix / "conda-meta/libpq-17.2-h_0.json").write_text(text)

    with pytest.raises(CondaError, match=r"libpq-17.2-h_0.json is damaged; remove .*/postgresql-17 and install it"):
        ensure_env(params_for(prefix), client, False)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "prefix",
            "postgresql-17",
            "prefix: 'postgresql-17' is not absolute; give a path that begins with / or ~",
        ),
        ("channels", ["-c"], "channels: '-c' is not a channel; give a name, a URL or a file:// folder"),
        ("channels", ["a\nb"], r"channels: 'a\\nb' is not a channel"),
        ("channels", ["https://a:secret@host/c"], r"channels: that of host contains a password [^.:]* ~/.netrc$"),
        ("channels", ["https://host/t/secret/c"], r"channels: that of host contains a password [^.:]* ~/.netrc$"),
        ("specs", [], "specs: none are given; name at least one package"),
        ("specs", ["-p /"], "specs: '-p /' cannot be parsed; write it as one of name, name=17"),
    ],
)
def test_refuses_before_anything_runs(
    prefix: Path, client: FakeClient, setting: str, value: object, message: str
) -> None:
    with pytest.raises(CondaError, match=message):
        ensure_env({**params_for(prefix), setting: value}, client, False)

    assert client.calls == [] and not prefix.parent.exists()


def test_waits_for_another_run(prefix: Path, client: FakeClient) -> None:
    prefix.parent.mkdir()
    marker = prefix.with_name("postgresql-17.unfinished")
    with marker.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=f"timeout: after 0 s another run still holds {marker}"):
            ensure_env(params_for(prefix, timeout=0), client, False)
        with pytest.raises(Waiting, match=f"^another run holds {marker}, "):
            ensure_env(params_for(prefix, slice=1e-9), client, False)

        def finish() -> None:
            make_env(prefix, NEW)
            packages = {name: Package(name, version, "h_0") for name, version in NEW.items()}
            conda_env.write_stamp(params_for(prefix), [Spec("postgresql=17", "postgresql")], packages)
            marker.unlink()
            other.close()

        threading.Timer(0.3, finish).start()
        result = ensure_env(params_for(prefix), client, False)

    assert (result["changed"], client.calls) == (False, [])
    assert not marker.exists()


PLACES = {
    "variable": ("x/bin/mamba", "MAMBA_EXE"),
    "PATH": ("path/conda", ""),
    "login shell": ("site/bin/conda", ""),
    "home": ("miniforge3/bin/mamba", ""),
}


@pytest.mark.parametrize("first", range(len(PLACES)))
def test_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: FakeClient, first: int) -> None:
    for path, variable in list(PLACES.values())[first:]:
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy("/bin/true", tmp_path / path)
        if variable:
            monkeypatch.setenv(variable, str(tmp_path / path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    client.login_shell = (0, f"welcome\n\n{tmp_path}/site/bin/conda\n", "")

    found = find_program(params_for(tmp_path, provider="conda", client=None), client)

    assert found == {"client": str(tmp_path / list(PLACES.values())[first][0])}
    assert client.calls == (["login"] if first > 1 else [])


@pytest.mark.parametrize(
    ("wanted", "load", "login_shell", "message"),
    [
        (
            "/no/conda",
            None,
            (0, "", ""),
            "client: no program /no/conda; set client to the path of conda, mamba or",
        ),
        ("mamba", None, (0, "", ""), "client: no program mamba in .*a login shell, ~/miniforge3, "),
        (None, None, (0, "", ""), "client: no program micromamba or mamba or conda in "),
        (
            None,
            "ml x",
            (LOAD_FAILED, "", "ml: no\n x"),
            "module_load: 'ml x' failed in a login shell: ml: no x",
        ),
    ],
)
def test_no_client(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    client: FakeClient,
    wanted: str | None,
    load: str | None,
    login_shell: tuple[int, str, str],
    message: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    client.login_shell = login_shell
    params = params_for(tmp_path / "env", provider="conda", client=wanted, module_load=load)

    with pytest.raises(CondaError, match=message):
        ensure_env(params, client, False)

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("before", "arguments", "after"),
    [
        (OLD, {"update": True}, NEW),  # and not 18.6
        (NEW, {"update": True}, NEW),
        (OLD, {"update": True, "specs": ["postgresql=17.2"]}, OLD),
        (None, {"update": True}, NEW),
        (None, {"lock": lock_of(OLD)}, OLD),
        (OLD, {"lock": lock_of(OLD)}, OLD),
        (NEW, {"lock": lock_of(OLD), "update": True}, OLD),
        (OLD, {"lock": lock_of(OLD), "update": True}, OLD),
    ],
)
def test_update_and_lock_file(
    prefix: Path, client: FakeClient, provider: str, before: dict | None, arguments: dict, after: dict, check_mode: bool
) -> None:
    if before:
        make_env(prefix, before)
    params = params_for(prefix, provider=provider, **arguments)
    found = content(prefix)

    result = ensure_env(params, client, check_mode)

    assert (result["changed"], result["packages"]) == (before != after, after)
    if check_mode:
        assert content(prefix) == found
    else:
        assert ensure_env(params, client, False)["changed"] is False
        assert ("keep" in content(prefix)) is bool(before)


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("before", "arguments", "says"),
    [
        (OLD, {"lock": lock_of(NEW)}, "lock: it differs from .*, which has libpq 17.2 h_0.* instead of libpq 17.10"),
        (OLD, {"lock": lock_of({"libpq": "18.6"}), "update": True}, "lock: it has no postgresql, but postgresql=17"),
        ({**OLD, "tzdata": "1"}, {"lock": lock_of(NEW), "update": True}, "lock: it has no tzdata, which .*-17 has"),
        (NEW, {"update": True, "specs": ["postgresql=18"]}, "would replace the installed PostgreSQL 17.10 by an"),
        (NEW, {"update": True, "specs": ["postgresql=17.2"]}, "specs: nothing in .*=17.2 .*postgresql>=17.10"),
    ],
)
def test_update_or_lock_file_that_is_refused(
    prefix: Path, client: FakeClient, before: dict[str, str], arguments: dict, says: str, check_mode: bool
) -> None:
    make_env(prefix, before)
    found = content(prefix.parent)

    with pytest.raises(CondaError, match=says):
        ensure_env(params_for(prefix, provider="conda", **arguments), client, check_mode)

    assert content(prefix.parent) == found


def test_rattler_removes_what_the_lock_file_does_not_name(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, {**OLD, "tzdata": "1"})

    assert ensure_env(params_for(prefix, lock=lock_of(NEW), update=True), client, False)["packages"] == NEW


def test_lock_file_that_cannot_be_fetched_is_tried_again(
    prefix: Path, client: FakeClient, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conda_env.time, "sleep", lambda seconds: None)
    client.outages = 3

    with pytest.raises(CondaError, match="lock: tried 3 times: HTTP 503 SERVICE UNAVAIL"):
        ensure_env(params_for(prefix, provider=provider, lock=lock_of(OLD), channels=["file:///c"]), client, False)

    assert os.listdir(prefix.parent) == []


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, None),
        ({"lease.1": {"job": "7", "host": "c1"}, "released.1": {}}, None),
        ({"lease.1": {"job": "7", "host": "c1"}, "released.1": {}, "lease.2": {"job": "8", "host": "c2"}}, "job 8"),
        ({"lease.9": {"job": "9", "host": "c1"}, "lease.10": {"job": "", "host": "login"}}, "a server on login"),
    ],
)
def test_no_change_under_a_server(
    prefix: Path, tmp_path: Path, client: FakeClient, files: dict, says: str | None, check_mode: bool
) -> None:
    make_env(prefix, OLD)
    (tmp_path / "run").mkdir()
    for name, held in files.items():
        (tmp_path / "run" / name).write_text(json.dumps(held))
    params = params_for(prefix, update=True, lease=str(tmp_path / "run"))

    if says is None:
        assert ensure_env(params, client, check_mode)["packages"] == NEW
    else:
        with pytest.raises(CondaError, match=f"lease: {says} .*runs from the environment, or has not stopped cleanly"):
            ensure_env(params, client, check_mode)
        assert ensure_env({**params, "update": False}, client, check_mode)["packages"] == OLD
        shutil.rmtree(prefix)
        assert ensure_env(params, client, check_mode)["changed"]


def test_no_change_under_a_server_that_starts_meanwhile(prefix: Path, tmp_path: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    found = content(prefix)
    (tmp_path / "run").mkdir()

    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        (tmp_path / "run/lease.1").write_text('{"job": "7", "host": "c1"}')
        return client(command, pass_fds)

    with pytest.raises(CondaError, match="lease: job 7 on c1"):
        ensure_env(params_for(prefix, update=True, lease=str(tmp_path / "run")), run, False)

    assert content(prefix) == found
    assert client.calls == ["fulfil --dry-run"] and os.listdir(prefix.parent) == [prefix.name]


def test_update_that_was_killed(prefix: Path, client: FakeClient, provider: str) -> None:
    make_env(prefix, OLD)
    client.fate = "postgresql"
    with pytest.raises(Killed):
        ensure_env(params_for(prefix, provider=provider, specs=["postgresql"], update=True), client, False)
    (prefix / "conda-meta/postgresql-17.10-h_0.json").unlink()

    again = ensure_env(params_for(prefix, provider=provider, specs=["postgresql"], update=True), client, False)

    assert again["packages"] == NEW and os.listdir(prefix.parent) == [prefix.name]


def test_lock_file_that_was_reached_before_a_kill(prefix: Path, client: FakeClient) -> None:
    make_env(prefix, OLD)
    prefix.with_name("postgresql-17.unfinished").write_text("changing 17.10")

    assert ensure_env(params_for(prefix, lock=lock_of(OLD)), client, False)["packages"] == OLD
    assert os.listdir(prefix.parent) == [prefix.name]


ELSEWHERE = {
    "system": "Linux", "machine": "aarch64", "release": "4.18.0-1.el8", "glibc": "2.28", "packages": None,
    "satisfied": False,
}


def params_for_another(prefix: Path, before: dict | None, **others: object) -> dict:
    packages = None if before is None else {name: [version, "h_0"] for name, version in before.items()}
    archives = str(prefix.parent.parent / "archives")
    others = {"state": "staged", "host": {**ELSEWHERE, "packages": packages}, "archives": archives, **others}
    return params_for(prefix, **others)


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("before", "arguments", "after"),
    [
        (None, {}, NEW),
        ({}, {}, NEW),
        (OLD, {}, OLD),
        (OLD, {"update": True}, NEW),  # and not 18.6
        (NEW, {"update": True}, NEW),
        (OLD, {"specs": ["postgresql>17.2"]}, NEW),
        (None, {"lock": lock_of(OLD)}, OLD),
        (OLD, {"lock": lock_of(OLD)}, OLD),
        (NEW, {"lock": lock_of(OLD), "update": True}, OLD),
    ],
)
def test_staged_is_what_another_host_lacks(
    prefix: Path, client: FakeClient, before: dict | None, arguments: dict, after: dict, check_mode: bool
) -> None:
    make_env(prefix, {"libpq": "16.1"})  # belongs to this host, so it is ignored
    found = content(prefix)

    result = ensure_env(params_for_another(prefix, before, **arguments), client, check_mode)

    assert (result["changed"], result["packages"]) == (before != after, after)
    locked = sorted(line.partition("#")[0] for line in result["lock"].splitlines() if line.startswith("https"))
    names = [f"{name}-{version}-h_0.conda" for name, version in after.items()] if before != after else []
    assert locked == sorted(f"https://host/conda-forge/noarch/{name}" for name in names)
    assert sorted(content(prefix.parent.parent / "archives")) == ([] if check_mode else sorted(names))
    assert content(prefix) == found


def test_archives_that_cannot_be_fetched_are_tried_again(
    prefix: Path, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conda_env.time, "sleep", lambda seconds: None)
    make_env(prefix, OLD)
    client.outages = 3

    with pytest.raises(CondaError, match="lock: tried 3 times: failed to fetch https://host/c"):
        ensure_env(params_for_another(prefix, None, lock=lock_of(NEW)), client, False)

    assert (prefix / "keep").exists()


def test_another_host_before_rattler_is_there(prefix: Path) -> None:
    def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str, str]:
        return 127, "", "env: no such file"

    planned = ensure_env(params_for_another(prefix, None), run, True)
    assert (planned["changed"], planned["lock"], planned["packages"]) == (True, "", {"postgresql": "=17"})
    with pytest.raises(CondaError, match="rattler_python: /env/bin/python cannot use py-rattler"):
        ensure_env(params_for_another(prefix, None), run, False)


def test_archives_are_for_a_lock_file(prefix: Path, client: FakeClient) -> None:
    params = params_for(prefix, archives="/staged")

    assert ensure_env(params, client, True)["packages"] == {"postgresql": "=17"}
    with pytest.raises(CondaError, match="lock: none is given, but it alone says which of the archives to install"):
        ensure_env(params, client, False)
    with pytest.raises(CondaError, match="archives: not allowed with provider conda"):
        ensure_env({**params, "provider": "conda"}, client, False)
    assert client.calls == []

    assert ensure_env({**params, "lock": lock_of(NEW)}, client, False)["packages"] == NEW
    assert ensure_env(params, client, False)["changed"] is False
