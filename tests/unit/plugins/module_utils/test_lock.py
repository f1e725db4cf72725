# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lock files: written files can be read again, and a damaged one is refused with the line's number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import CondaError, Package, parse_spec
from ansible_collections.mala.hpc_db.plugins.module_utils._lock import (
    Locked,
    check_archives,
    check_specs,
    check_sums,
    lock_text,
    parse_lock,
    platform_of,
)

CHANNEL = "https://conda.example/conda-forge"
SHA, MD5 = "a" * 64, "b" * 32


def record(name: str, version: str = "17.2", subdir: str = "linux-64", **others: object) -> dict:
    return {
        "name": name, "version": version, "build": "h1_0", "sha256": SHA,
        "url": f"{CHANNEL}/{subdir}/{name}-{version}-h1_0.conda", **others,
    }


LIBPQ, TZDATA = record("libpq"), record("tzdata", "2026a", "noarch")
POSTGRESQL = record("postgresql", depends=["tzdata", "libpq ==17.2", "__glibc >=2.17", "readline>=8"])
TEXT = lock_text([POSTGRESQL, LIBPQ, TZDATA], "linux-64")


def test_checksum_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def new(kind: str, _content: bytes) -> None:
        raise ValueError(f"[digital envelope routines] unsupported: {kind}")

    (tmp_path / "libpq").write_bytes(b"")
    monkeypatch.setattr(hashlib, "new", new)

    with pytest.raises(CondaError, match="^lock: this system refuses md5, which file://.*libpq is locked with$"):
        check_archives([Locked(Package("libpq", "17.2", "h1_0"), (tmp_path / "libpq").as_uri(), CHANNEL, "md5", MD5)])


def test_what_is_written_is_read_again() -> None:
    locked = parse_lock(TEXT, "linux-64")

    assert [each.package for each in locked] == [
        Package("libpq", "17.2", "h1_0"), Package("tzdata", "2026a", "h1_0"), Package("postgresql", "17.2", "h1_0")
    ]
    assert locked[0][1:] == (LIBPQ["url"], CHANNEL, "sha256", SHA)
    assert lock_text([TZDATA, POSTGRESQL, LIBPQ], "linux-64") == TEXT


def test_the_form_is_the_one_that_all_clients_read() -> None:
    old = record("zlib", sha256=None, md5=MD5)
    assert lock_text([LIBPQ, old], "linux-64").splitlines()[1:] == [
        "# platform: linux-64", "@EXPLICIT", f"{LIBPQ['url']}#sha256:{SHA}", f"{old['url']}#{MD5}"
    ]


def test_dependencies_may_form_a_circle() -> None:
    circle = [record("pip", depends=["python"]), record("python", depends=["pip"])]

    assert len(parse_lock(lock_text(circle, "linux-64"), "linux-64")) == 2


@pytest.mark.parametrize(
    "url", ["https://me:word@conda.example/conda-forge", "https://conda.example/t/to-ken/conda-forge"]
)
def test_no_credentials_are_written(url: str) -> None:
    assert lock_text([record("libpq", url=f"{url}/linux-64/libpq-17.2-h1_0.conda")], "linux-64") == lock_text(
        [LIBPQ], "linux-64"
    )


@pytest.mark.parametrize("lacks", [{"url": None}, {"url": "libpq.conda"}, {"sha256": None}])
def test_what_cannot_be_fetched_again_is_not_locked(lacks: dict) -> None:
    with pytest.raises(CondaError, match="prefix: libpq cannot be locked: .* no URL or no checksum"):
        lock_text([record("libpq", **lacks)], "linux-64")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("@EXPLICIT\n", "", "it has no line @EXPLICIT"),
        (TEXT[TEXT.index("https") :], "", "it names no packages"),
        (SHA + "\n", SHA[1:] + "\n", r"line 4, 'https.*', is damaged; allowed is a package's URL#sha256"),
        ("#sha256:" + SHA, "", "line 4, .* is damaged"),
        ("libpq-17.2-h1_0", "libpq-17.2", "line 4, .* is damaged"),
        ("https://", "ftp://", "line 4, .* is damaged"),
        ("https://", "https://me:word@", "line 4 contains a password or token; "),
        ("/conda-forge", "/t/to-ken/conda-forge", "line 4 contains a password or token; "),
        (f"{TZDATA['url']}", f"{LIBPQ['url']}", "line 5 names libpq a second time"),
        ("noarch", "osx-64", "line 5 is for osx-64, but this is linux-64"),
        ("\n", "\0", "it has no line @EXPLICIT"),
    ],
)
def test_what_is_damaged_is_refused(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(CondaError, match=f"^lock: {says}"):
        parse_lock(TEXT.replace(old, new), "linux-64")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("postgresql=17", None),
        ("postgresql=18", "it has postgresql 17.2, but postgresql=18 is required"),
        ("optuna", "it has no optuna, but optuna is required"),
    ],
)
def test_what_is_wanted_is_in_it(spec: str, says: str | None) -> None:
    locked = parse_lock(TEXT, "linux-64")
    if says is None:
        check_specs(locked, [parse_spec(spec)])
    else:
        with pytest.raises(CondaError, match=says):
            check_specs(locked, [parse_spec(spec)])


def test_a_package_made_of_other_bytes_is_told() -> None:
    locked = parse_lock(TEXT, "linux-64")

    check_sums(locked, [LIBPQ, record("libpq", "17.1", sha256="c" * 64), record("libpq", sha256=None)])
    with pytest.raises(CondaError, match=f"lock: libpq 17.2 h1_0 is installed with the sha256 ccc.* locked with {SHA}"):
        check_sums(locked, [record("libpq", sha256="c" * 64)])


@pytest.mark.parametrize(
    ("system", "machine", "platform"),
    [("Linux", "x86_64", "linux-64"), ("Linux", "aarch64", "linux-aarch64"), ("Darwin", "arm64", "osx-arm64")],
)
def test_platforms_are_called_as_conda_does(system: str, machine: str, platform: str) -> None:
    assert platform_of(system, machine) == platform
