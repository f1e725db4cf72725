# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Specs, commands, and the clients' answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._conda import (
    LOAD_FAILED,
    Answer,
    CondaError,
    Package,
    allows_major,
    clean_command,
    conda_command,
    describe_host,
    difference,
    explain,
    has_secret,
    may_pass,
    parse_answer,
    parse_search,
    parse_spec,
    pins,
    search_command,
    solve_request,
    unmet_need,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._lock import install_command

POSTGRESQL = Package("postgresql", "17.2", "h1_0")
LIBPQ = Package("libpq", "17.2", "h1_0")
BOTH = {"postgresql": POSTGRESQL, "libpq": LIBPQ}


@pytest.mark.parametrize(
    ("text", "name", "given"),
    [
        ("PostgreSQL", "postgresql", "postgresql"),
        ("postgresql=17", "postgresql", "postgresql=17"),
        ("postgresql = 17.*", "postgresql", "postgresql=17.*"),
        ("postgresql==17.2", "postgresql", "postgresql==17.2"),
        (" postgresql >= 17, < 18 ", "postgresql", "postgresql>=17,<18"),
        ("python>=3.9,!=3.9.1", "python", "python>=3.9,!=3.9.1"),
        ("PostgreSQL=17RC1=H1_0", "postgresql", "postgresql=17RC1=H1_0"),
        ("ca-certificates=17.*=h*_0", "ca-certificates", "ca-certificates=17.*=h*_0"),
        ("postgresql=*=h2_*", "postgresql", "postgresql=*=h2_*"),
        ("postgresql=1!17.2", "postgresql", "postgresql=1!17.2"),
    ],
)
def test_spec_is_given_without_spaces(text: str, name: str, given: str) -> None:
    assert parse_spec(text) == (given, name)


def test_pins_name_the_build() -> None:
    assert pins({"libpq": LIBPQ}) == [parse_spec("libpq=17.2=h1_0")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-p",
        "--file=x",
        "postgresql 17",
        "postgresql = 17 18",
        "postgresql=",
        "postgresql=>17",
        "postgresql>=17,",
        "postgresql==17.*",
        "postgresql;id",
        "postgresql=$(id)",
        "conda-forge::postgresql",
        "postgresql[build=x]",
        "postgresql=17.2=h1=x",
    ],
)
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(CondaError, match=r"^specs: .* cannot be parsed; write it as one of name, "):
        parse_spec(text)


@pytest.mark.parametrize(
    ("bounds", "allowed"),
    [
        *((bounds, True) for bounds in ("", "=17", "==17.10", ">=17", ">17.2", "<18", "<17.1", "!=17.2", "=17=18_0")),
        *((bounds, False) for bounds in ("=18", "==16.4", ">=18", "<17", ">=18,<19", "=18.*=17_0")),
    ],
)
def test_major_that_a_spec_allows(bounds: str, allowed: bool) -> None:
    assert allows_major(parse_spec("postgresql" + bounds), "17.5") is allowed


def test_difference_names_only_what_differs() -> None:
    newer = POSTGRESQL._replace(version="17.10")
    openssl = Package("openssl", "3.5", "h0")

    assert difference({**BOTH, "openssl": openssl}, {**BOTH, "postgresql": newer}) == {
        "before": {"openssl": "3.5 h0", "postgresql": "17.2 h1_0"},
        "after": {"postgresql": "17.10 h1_0"},
    }


@pytest.mark.parametrize(
    ("client", "create", "verb"),
    [
        ("/opt/conda/bin/conda", True, ["create", "--no-default-packages"]),  # from the user's ~/.condarc
        ("/opt/conda/bin/conda", False, ["install"]),
        ("/opt/conda/bin/mamba", True, ["create"]),
        ("micromamba", False, ["install"]),
    ],
)
@pytest.mark.parametrize(("dry_run", "dry"), [(True, ["--dry-run"]), (False, [])])
@pytest.mark.parametrize("skip", [False, True])
def test_command_of_each_client(
    client: str, create: bool, verb: list[str], dry_run: bool, dry: list[str], skip: bool
) -> None:
    specs = [parse_spec("postgresql>=17,<18"), parse_spec("libpq")]

    assert install_command(client, create, "/a b", "/lock")[: len(verb) + 1] == [client, *verb]
    assert conda_command(client, create, "/a b", ["conda-forge", "file:///c"], specs, dry_run, skip) == [
        client,
        *verb,
        "-y",
        "-q",
        "--json",
        *dry,
        *(["--satisfied-skip-solve"] if skip and client.endswith("/conda") else []),
        "--override-channels",
        "-c",
        "conda-forge",
        "-c",
        "file:///c",
        "-p",
        "/a b",
        "postgresql>=17,<18",
        "libpq",
    ]


def test_rattler_is_told_to_keep_what_is_there() -> None:
    request = solve_request(["c"], [parse_spec("postgresql=17")], BOTH, True)

    assert request["specs"] == ["postgresql=17", "libpq"]


def test_environment_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "/site")

    command = clean_command(["env"], 9)
    said = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

    assert {"HTTPS_PROXY=/site", "CONDA_SAFETY_CHECKS=enabled"} <= said
    assert not {"LD_LIBRARY_PATH=/site", "PYTHONPATH=/site", "PYTHONHOME=/site"} & said


def test_search_in_a_login_shell(tmp_path: Path) -> None:
    (tmp_path / "mamba").write_text("#!/bin/sh\n")
    (tmp_path / "mamba").chmod(0o755)
    names = ["mamba", "conda"]
    profile = f"conda() {{ :; }}\necho welcome\nload() {{ echo loaded $1; PATH=$PATH:'{tmp_path}'; }}\n"
    (tmp_path / ".bash_profile").write_text(profile)
    environment = {"HOME": str(tmp_path), "PATH": os.defpath, "CONDA_EXE": "/x/bin/conda"}

    def search(load: str) -> subprocess.CompletedProcess[str]:
        command = search_command(load, names)
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert parse_search(search("load anaconda").stdout, names) == ["/x/bin/conda", f"{tmp_path}/mamba"]
    assert search("false").returncode == LOAD_FAILED


LINKS = [{"dist_name": "postgresql-17.10-h2_0"}]
CONDA_LINKS = {"LINK": LINKS, "UNLINK": [{"dist_name": "postgresql-17.2-h1_0"}], "PREFIX": "/p"}
MAMBA_LINKS = {
    "LINK": [{"fn": "postgresql-17.10-h2_0.conda", "name": "postgresql"}],
    "UNLINK": [{"fn": "postgresql-17.2-h1_0.tar.bz2", "name": "postgresql"}],
}
NEWER = {"libpq": LIBPQ, "postgresql": Package("postgresql", "17.10", "h2_0")}


@pytest.mark.parametrize(
    ("code", "content", "packages"),
    [
        (0, {"success": True, "message": "All requested packages already installed."}, BOTH),
        (0, {"success": True, "message": "All requested packages already installed"}, BOTH),
        (0, {"success": True, "actions": CONDA_LINKS, "dry_run": True}, NEWER),
        (0, {"success": True, "actions": [CONDA_LINKS]}, NEWER),
        (0, {"success": True, "actions": MAMBA_LINKS}, NEWER),
        (-11, {"success": True, "actions": CONDA_LINKS}, NEWER),  # crashed after all work was done
    ],
)
def test_success(code: int, content: dict, packages: dict[str, Package]) -> None:
    noise = "warning  libmamba The cache {is} empty\n"

    answer = parse_answer(code, noise + json.dumps(content) + "\n", "", BOTH, "conda")

    assert answer._replace(links=()) == Answer(packages)
    assert {link.get("name", "postgresql") for link in answer.links} <= {"postgresql"}


@pytest.mark.parametrize(
    ("content", "setting", "problem"),
    [
        ({"exception_name": "PackagesNotFoundError", "message": "not\n  there"}, "specs", "not there"),
        ({"exception_name": "SolverError", "message": "no candidates"}, "specs", "no candidates"),
        ({"success": False, "solver_problems": ["no a", "b conflicts"]}, "specs", "no a; b conflicts"),
        ({"exception_name": "UnavailableInvalidChannel", "error": "HTTP 404"}, "channels", "HTTP 404"),
        (
            {"exception_name": "InstallerError", "message": "failed to fetch a"},
            "channels",
            "failed to fetch a",
        ),
        ({"exception_name": "CondaVerificationError", "message": "corrupt"}, "provider", "corrupt"),
        ({"exception_name": "ModuleNotFoundError", "message": "No rattler"}, "rattler_python", "No rattler"),
    ],
)
def test_failure(content: dict, setting: str, problem: str) -> None:
    assert parse_answer(1, json.dumps(content), "", BOTH, "rattler") == Answer({}, setting, problem)


@pytest.mark.parametrize(
    ("code", "stderr", "provider", "setting", "problem"),
    [
        (
            1,
            "critical libmamba Download error (6)",
            "conda",
            "channels",
            "critical libmamba Download error (6)",
        ),
        (127, "env: '/x': No such file", "rattler", "rattler_python", "env: '/x': No such file"),
        (126, "env: '/x': Permission denied", "conda", "client", "env: '/x': Permission denied"),
        (124, "", "conda", "timeout", "the client was stopped"),
        (-11, "", "conda", "provider", "it printed nothing"),
    ],
)
def test_failure_without_words(code: int, stderr: str, provider: str, setting: str, problem: str) -> None:
    assert parse_answer(code, "", stderr, BOTH, provider) == Answer({}, setting, problem)


@pytest.mark.parametrize("stdout", ["", "Preparing transaction: done\n"])
def test_nothing_is_no_failure(stdout: str) -> None:
    """conda's answer, up to 26.7 at least, after installing a lock file."""
    assert parse_answer(0, stdout, "", BOTH, "conda") == Answer({})


def nested(*errors: dict | str) -> dict:
    return {"error": "Multiple Errors Encountered.", "exception_name": "CondaMultiError", "errors": list(errors)}


def unavailable(name: str) -> dict:
    url = f"https://host/c/linux-64/{name}-17.10-h_0.tar.bz2"
    advice = "\nElapsed: 00:00.002909\n\nAn HTTP error occurred when trying to retrieve this URL.\n"
    return {"exception_name": "CondaHTTPError", "message": f"HTTP 503 Service Unavailable for url <{url}>{advice}"}


CUT_OFF = {
    "exception_name": "ChunkedEncodingError",
    "message": "('Connection broken: IncompleteRead(1000 bytes read, 301399 more expected)', IncompleteRead(1000))",
}
NOT_IN_FOLDER = {"exception_name": "PathNotFoundError", "message": "/c/linux-64/libpq-17.11-h_0.tar.bz2"}
SHORT_FILE = {
    "exception_name": "SafetyError",
    "message": "The package for libpq located at /a b/pkgs/libpq-17.10-h_0\nappears to be corrupted. The path "
    "'lib/libpq.so'\nhas an incorrect size.\n  reported size: 300000 bytes\n  actual size: 1000 bytes\n",
}
NO_FILE = {
    "exception_name": "CondaVerificationError",
    "message": "The package for postgresql located at /pkgs/postgresql-17.10-h_0\nappears to be corrupted. The path "
    "'share/f0'\nspecified in the package manifest cannot be found.\n",
}
NOT_AVAILABLE = """The following packages are not available from current channels:

  - {}

Current channels:

  - file:///c/linux-64
  - file:///c/noarch

To search for alternate channels that may provide the conda package you're
looking for, navigate to

    https://anaconda.org

and use the search bar at the top of the page.
"""
# as in reports on conda 4 to 25
NO_CERTIFICATE = """HTTP 000 CONNECTION FAILED for url <https://host/c/linux-64/repodata.json>
Elapsed: -
CF-RAY: a0d4d50e0e2572ed-IAD

An HTTP error occurred when trying to retrieve this URL.
HTTP errors are often intermittent, and a simple retry will get you on your way.

If your current network has https://www.anaconda.com blocked, please file
a support request with your network engineering team.

SSLError(MaxRetryError("certificate verify failed"))
"""
NO_CERTIFICATE_IN_ONE_LINE = (
    "HTTP 000 CONNECTION FAILED for url <https://host/c/linux-64/repodata.json> "
    'SSLError(MaxRetryError("certificate verify failed"))'
)
NO_CHANNEL = """HTTP 404 UNAVAILABLE OR INVALID for channel channel <file:///no/channel>

The channel is not accessible or is invalid.
"""


@pytest.mark.parametrize(
    ("content", "setting", "problem"),
    [
        (
            {"exception_name": "PackagesNotFoundInChannelsError", "message": NOT_AVAILABLE.format("postgresql==17.99")},
            "specs",
            "The following packages are not available from current channels: - postgresql==17.99",
        ),
        (
            {"exception_name": "UnavailableInvalidChannel", "message": NO_CHANNEL},
            "channels",
            "HTTP 404 UNAVAILABLE OR INVALID for channel channel <file:///no/channel> The channel is not accessible or "
            "is invalid.",
        ),
        (
            nested(unavailable("libpq"), unavailable("postgresql"), unavailable("libpq")),
            "channels",
            "HTTP 503 Service Unavailable for url <https://host/c/linux-64/libpq-17.10-h_0.tar.bz2>; "
            "HTTP 503 Service Unavailable for url <https://host/c/linux-64/postgresql-17.10-h_0.tar.bz2>",
        ),
        (nested(CUT_OFF), "channels", CUT_OFF["message"]),
        (nested(NOT_IN_FOLDER, NOT_IN_FOLDER), "channels", "/c/linux-64/libpq-17.11-h_0.tar.bz2"),
        (nested(unavailable("libpq"), {"exception_name": "CondaOSError", "message": "full"}), "provider", "full"),
        (
            nested({"exception_name": "ClobberError", "message": "a path"}, SHORT_FILE, NO_FILE, NO_FILE),
            "cache",
            "rm -r '/a b/pkgs/libpq-17.10-h_0'; rm -r /pkgs/postgresql-17.10-h_0",
        ),
        ({"exception_name": "ImportError", "message": "conda is broken"}, "client", "conda is broken"),
    ],
)
def test_failure_of_a_real_conda(content: dict, setting: str, problem: str) -> None:
    """Output of conda 26.7.1, shortened."""
    assert parse_answer(1, json.dumps(content, indent=2), "", BOTH, "conda") == Answer({}, setting, problem)


@pytest.mark.parametrize(
    ("content", "setting", "problem"),
    [
        (nested(nested(CUT_OFF), nested(nested(CUT_OFF))), "channels", CUT_OFF["message"]),
        (nested("no space"), "provider", "no space"),
        ({"exception_name": None, "message": None, "error": "full"}, "provider", "full"),
        ({"exception_name": "CondaHTTPError", "message": NO_CERTIFICATE}, "channels", NO_CERTIFICATE_IN_ONE_LINE),
    ],
)
def test_failure_in_other_words(content: dict, setting: str, problem: str) -> None:
    answer = parse_answer(1, json.dumps(content), "", BOTH, "conda")

    assert answer == Answer({}, setting, problem)
    assert may_pass(answer, ["conda-forge"]) is (answer.problem == CUT_OFF["message"])  # not with a wrong certificate


@pytest.mark.parametrize(
    "actions", ["none", ["none"], {"LINK": ["c::libpq-17.10-h_0"]}, {"LINK": [{"dist_name": "a"}]}]
)
def test_success_in_other_words(actions: object) -> None:
    answer = parse_answer(0, json.dumps({"success": True, "actions": actions}), "", BOTH, "conda")

    assert answer == Answer({}, "provider", "its answer has an unknown format")


def test_warnings_come_before_the_answer() -> None:
    """conda 26.7.1 prints them as a document of their own."""
    stdout = json.dumps(nested(SHORT_FILE), indent=2) + "\n\n" + json.dumps({"success": True, "actions": CONDA_LINKS})

    assert parse_answer(0, stdout, "", BOTH, "conda").packages == NEWER


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("channels", "channels: cannot read conda-forge: https://host/conda-forge/noarch"),
        (
            "specs",
            "specs: nothing in file:///c, conda-forge satisfies postgresql=17: https://host/conda-forge/noarch",
        ),
        ("rattler_python", "rattler_python: /py cannot use py-rattler: https://host/conda-forge/noarch"),
        ("timeout", "timeout: 60: https://host/conda-forge/noarch"),
    ],
)
def test_sentence_names_the_setting_and_its_value(setting: str, sentence: str) -> None:
    params = {"channels": ["file:///c", "conda-forge"], "rattler_python": "/py", "timeout": 60}
    answer = Answer({}, setting, "https://host/conda-forge/noarch")

    assert explain(answer, params, [parse_spec("postgresql=17")], "2.36") == sentence


RATTLER = "cannot be installed because: postgresql 17.9 | 17.10 would require __glibc >=2.34,<3.0.a0, for which no"
LIBMAMBA = "nothing provides __glibc >=2.34,<3.0.a0 needed by postgresql-17.10-h_0"
EXACT = "The following packages are not available from current channels: - __glibc[version='>=2.34,<3.0.a0']"
CLASSIC = "- feature:/linux-64::__glibc==2.17=0 - postgresql=17 -> __glibc[version='>=2.34,<3.0.a0'] Your installed"


@pytest.mark.parametrize(
    ("problem", "glibc", "need"),
    [
        *((problem, "2.17", "__glibc >=2.34,<3.0.a0") for problem in (RATTLER, LIBMAMBA, CLASSIC, EXACT)),
        *((problem, "2.34", "") for problem in (RATTLER, LIBMAMBA, CLASSIC)),  # then another problem is the cause
        (RATTLER, "", "__glibc >=2.34,<3.0.a0"),
        ("nothing provides __cuda >=12 needed by pytorch-2.8-h_0", "2.36", "__cuda >=12"),
        ("no candidates", "2.17", ""),
    ],
)
def test_need_that_the_host_does_not_meet(problem: str, glibc: str, need: str) -> None:
    assert unmet_need(problem, glibc) == need


def test_sentence_for_an_old_host() -> None:
    sentence = explain(Answer({}, "specs", RATTLER), {"channels": ["c"]}, [parse_spec("postgresql=17")], "2.17")

    assert sentence == (
        "specs: nothing in c satisfies postgresql=17 on this host: it needs __glibc >=2.34,<3.0.a0, and the host has "
        "glibc 2.17; ask for an older version, or another channel"
    )


@pytest.mark.parametrize(
    ("channel", "problem", "passes"),
    [
        *(
            ("conda-forge", problem, True)
            for problem in (
                "HTTP status server error (503 Service Unavailable) for url (https://h/c)",
                "HTTP 000 CONNECTION FAILED for url <https://h/c>",
                "Download error (6) Could not resolve host",
                "failed to fetch libpq Caused by: end of file before message length reached",
                "Conda detected a mismatch between the expected content and downloaded content",
            )
        ),
        *(
            ("conda-forge", problem, False)
            for problem in (
                "HTTP status client error (401 Unauthorized) for url (https://h/c)",
                "HTTP 403 FORBIDDEN for channel c <https://h/c>",
                "Transfer finalized, status: 404 [https://h/c/noarch/repodata.json] 0 bytes",
                "could not find subdir 'noarch' in channel",
                "invalid peer certificate: UnknownIssuer",
            )
        ),
        ("file:///c", "failed to fetch libpq Caused by: decompression not finished but EOF reached", False),
    ],
)
def test_what_may_pass_is_worth_another_try(channel: str, problem: str, passes: bool) -> None:
    assert may_pass(Answer({}, "channels", problem), [channel]) is passes
    assert may_pass(Answer({}, "specs", problem), [channel]) is False


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://alice:p@ss@host/c", "https://***@host/c"),
        ("https://host/t/al-12-34/c", "https://host/t/***/c"),
        ("https://host/conda/t/al-12-34/c", "https://host/conda/t/***/c"),
        ("https://host/c", ""),
        ("file:///home/t/c", ""),
        ("conda-forge", ""),
    ],
)
def test_secrets_of_a_url(url: str, shown: str) -> None:
    problem = parse_answer(1, "", f"HTTP 503 for url <{url}>", {}, "conda").problem

    assert has_secret(url) is bool(shown)
    assert problem == f"HTTP 503 for url <{shown or url}>"


def test_another_host_is_told_as_rattler_finds_this_one() -> None:
    assert describe_host("linux-64", "x86_64", "4.18.0-553.el8_10.x86_64", "2.28") == {
        "platform": "linux-64",
        "virtual": [
            ("__unix", "0", "0"), ("__archspec", "1", "x86_64"), ("__linux", "4.18.0", "0"), ("__glibc", "2.28", "0")
        ],
    }
