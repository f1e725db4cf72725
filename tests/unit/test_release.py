# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``make release-check`` passes this working tree, and finds injected faults: its fast checks, on a copy."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".cache", ".venv", ".ansible", ".hypothesis", "__pycache__", "output")
FAST = ["committed", "build", "files", "links", "version", "licences", "environment"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the working tree, with nothing in git yet."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
    git(copy, "init", "--quiet")
    return copy


def git(folder: Path, *arguments: str) -> None:
    author = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=all")


def check_release(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the output of the checks, and the result of each."""
    command = [str(ROOT / "tools/release"), "--tree", str(folder), *FAST]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    results = dict(re.findall(r"^(\w+) +\d+ s  (.+)$", done.stdout, re.MULTILINE))
    assert list(results) == FAST, done.stdout
    assert done.returncode == (set(results.values()) != {"passed"}), done.stdout
    return done.stdout, results


def test_passes_what_is_here(checkout: Path) -> None:
    commit(checkout)

    said, results = check_release(checkout)

    assert set(results.values()) == {"passed"}, said


def test_finds_each_thing_that_is_wrong(checkout: Path) -> None:
    (checkout / "notes.dat").write_text("mine\n")
    (checkout / "roles/server/tasks/.job.sh.swp").touch()
    (checkout / "plugins/filter/bare.py").write_text("pass\n")
    (checkout / "changelogs/changelog.yaml").write_text("releases: {9.0.0: {}}\n")
    (checkout / "meta/ee-bindep.txt").write_text("")
    cited = (checkout / "CITATION.cff").read_text()
    (checkout / "CITATION.cff").write_text(re.sub(r"(?m)^version: .*", "version: 7.0.0", cited))
    requirements = (checkout / "requirements.yml").read_text()
    (checkout / "requirements.yml").write_text(requirements.replace(">=3.4.0", ">=3.5.0"))
    commit(checkout)
    git(checkout, "tag", "v8.0.0")
    (checkout / "later.py").touch()

    said, results = check_release(checkout)

    assert results == {name: "passed" if name == "build" else "failed" for name in FAST}, said
    for complaint in (
        r"\?\? later.py",
        r"notes.dat does not belong into a release",
        r"roles/server/tasks/.job.sh.swp is left over",
        r"dependencies: .*3\.4\.0.* in galaxy.yml, .*3\.5\.0.* in requirements.yml",
        r"version: \S+ in galaxy.yml, and the tag is v8.0.0",
        r"version: \S+ in galaxy.yml is lower than 9.0.0",
        r"version: \S+ in galaxy.yml, and 7.0.0 in CITATION.cff",
        r"plugins/filter/bare.py: no licens",
        r"ansible-builder finds nothing of this collection",
    ):
        assert re.search(complaint, said), said


def test_what_does_not_build_fails_all(checkout: Path) -> None:
    galaxy = (checkout / "galaxy.yml").read_text()
    (checkout / "galaxy.yml").write_text(re.sub("version: .*", "version: new", galaxy))
    commit(checkout)

    said, results = check_release(checkout)

    assert results.pop("committed") == "passed"
    assert results.pop("build") == "failed"
    assert set(results.values()) == {"not tried, since nothing was built"}
    assert "'new'" in said


TAG = "SPDX-License-" + "Identifier:"  # in two parts, since reuse would take this line for a licence


@pytest.mark.parametrize("package", ["client", "controller"])
def test_packages_for_users_programs_import_nothing_under_the_gpl(package: str) -> None:
    for path in (ROOT / package / "src").rglob("*.py"):
        text = path.read_text()
        assert text.splitlines()[1] == f"# {TAG} BSD-3-Clause", path
        imported = re.findall(r"^ *(?:from|import) +(\w+)", text, re.MULTILINE)
        assert not {"ansible", "ansible_collections", "hpc_db_host"} & {*imported}, path


def test_every_supported_ansible_core_is_checked() -> None:
    lowest = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["requires_ansible"]
    pinned = (ROOT / "requirements/controller.txt").read_text()
    checked = (ROOT / "requirements/ansible_cores.txt").read_text()

    minors = [int(minor) for minor in re.findall(r"^ansible-core==2\.(\d+)\.\d+ # 3", checked, re.MULTILINE)]

    assert lowest == f">=2.{minors[0]}.0"
    assert minors == list(range(minors[0], minors[-1] + 1))
    for pin in re.findall(r"^ansible-core==[\d.]+", pinned, re.MULTILINE):
        assert f"{pin} " in checked
