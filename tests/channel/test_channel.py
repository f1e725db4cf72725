# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The channel is reproducible, and its programs run."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

rattler = pytest.importorskip("rattler")

BUILD = Path(__file__).with_name("build.py")
PYTHON_WHEELS = Path(__file__).parents[2] / ".cache/wheels"


def build(out: Path, wheels: Path) -> Path:
    python = [f"--python-wheels={PYTHON_WHEELS}"] if list(PYTHON_WHEELS.glob("optuna-*")) else []
    subprocess.run([sys.executable, str(BUILD), str(out), f"--wheels={wheels}", *python], check=True)
    return out


@pytest.fixture(scope="module")
def wheels() -> Path:
    return Path(__file__).parents[2] / ".cache/channel/wheels"


@pytest.fixture(scope="module")
def channel(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("channel"), wheels)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can enter, unlike ``tmp_path``."""
    folder = Path(tempfile.mkdtemp(prefix="channel-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_every_time(channel: Path, wheels: Path, tmp_path: Path) -> None:
    assert content(channel) == content(build(tmp_path / "again", wheels))


def test_left_as_it_is_unless_it_would_differ(channel: Path, tmp_path: Path) -> None:
    """There are no wheels, so the program could not rebuild the channel."""
    shutil.copy(channel / "made-by", tmp_path)
    lazy = [sys.executable, str(BUILD), str(tmp_path), f"--wheels={tmp_path}/none", "--if-needed"]

    subprocess.run(lazy, check=True)
    assert os.listdir(tmp_path) == ["made-by"]

    (tmp_path / "made-by").write_text("another program\n")
    offline = {**os.environ, "PIP_NO_INDEX": "1"}
    assert subprocess.run(lazy, env=offline, stderr=subprocess.DEVNULL, check=False).returncode != 0


async def install(channel: Path, spec: str, prefix: Path, cache: Path) -> dict[str, str]:
    records = await rattler.solve(
        sources=[rattler.Channel(channel.as_uri())],
        specs=[spec],
        gateway=rattler.Gateway(cache_dir=cache),
        virtual_packages=rattler.VirtualPackage.detect(),
    )
    await rattler.install(records, target_prefix=prefix, cache_dir=cache, show_progress=False)
    return {record.name.normalized: str(record.version) for record in records}


@pytest.mark.parametrize(("wanted", "version"), [("17", "17.10"), ("17.9", "17.9"), ("18", "18.6")])
def test_installs_and_runs_anywhere(
    channel: Path, public_folder: Path, tmp_path: Path, wanted: str, version: str
) -> None:
    prefix = public_folder / "with a space"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []

    installed = asyncio.run(install(channel, f"postgresql={wanted}", prefix, tmp_path))

    assert installed == {"postgresql": version, "libpq": version}
    for program in ("postgres", "initdb", "pg_ctl", "psql", "pg_dump", "pgbench"):
        command = [*as_nobody, str(prefix / "bin" / program), "--version"]
        said = subprocess.run(command, env={}, check=True, capture_output=True, text=True)
        assert said.stdout.split()[-1] == version


def test_python_runs_anywhere(channel: Path, public_folder: Path, tmp_path: Path) -> None:
    if not list(channel.glob("linux-64/optuna-*")):
        pytest.skip("no wheels of psycopg2 and Optuna: tools/setup cluster")
    prefix = public_folder / "with a space"

    asyncio.run(install(channel, "optuna", prefix, tmp_path))

    code = "import optuna, ssl, sys; print(sys.prefix, optuna.__file__)"
    said = subprocess.run([prefix / "bin/python", "-c", code], env={}, check=True, capture_output=True, text=True)
    assert said.stdout.startswith(f"{prefix} {prefix}/lib/python")
