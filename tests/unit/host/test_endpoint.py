# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The endpoint in a service file, among arbitrary other content."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hpc_db_host import endpoint, files
from hpc_db_host.layout import Layout

WANTED = {"host": "c1", "port": 5433}
SECTION = "[hpc_db]\nhost=c1\nport=5433\n"
EDIT = """
import sys
from hpc_db_host import endpoint

path, name = sys.argv[1:]
for port in range(3):
    endpoint.edit_services(path, {name: {"host": name, "port": port}})
    endpoint.edit_services(path, {"shared": {"port": port} if port % 2 else {}})
"""


@pytest.mark.parametrize("text, without, with_section", [
    ("", "", SECTION),
    ("# mine\n", "# mine\n", "# mine\n" + SECTION),
    ("[other]\nhost=x", "[other]\nhost=x", "[other]\nhost=x\n" + SECTION),
    ("[other]\r\nhost=x\r\n", "[other]\r\nhost=x\r\n", "[other]\r\nhost=x\r\n" + SECTION),
    (SECTION, "", SECTION),
    (SECTION + "[other]\nhost=x\n", "[other]\nhost=x\n", "[other]\nhost=x\n" + SECTION),
    ("[hpc_db2]\nhost=x\n[xhpc_db]\n", "[hpc_db2]\nhost=x\n[xhpc_db]\n", "[hpc_db2]\nhost=x\n[xhpc_db]\n" + SECTION),
    ("[hpc_db]\nhost=old\n[hpc_db]\nhost=older\n", "", SECTION),
    # libpq takes any line that starts with a bracket as a heading, whatever follows the heading.
    ("[hpc_db]\nhost=old\n[other] # mine\nhost=x\n", "[other] # mine\nhost=x\n", "[other] # mine\nhost=x\n" + SECTION),
    ("[hpc_db] # old\nhost=old\n", "", SECTION),
    ("[hpc_db]\r\nhost=old\r\n", "", SECTION),
    ("[hpc_db]\nhost=old\n\n# other's\n[other]\n", "\n# other's\n[other]\n", "\n# other's\n[other]\n" + SECTION),
    ("# [hpc_db]\nhost=x\n", "# [hpc_db]\nhost=x\n", "# [hpc_db]\nhost=x\n" + SECTION),
])
def test_everything_else_stays(text, without, with_section):
    assert endpoint.replace_section(text, "hpc_db", {}) == without
    assert endpoint.replace_section(text, "hpc_db", WANTED) == with_section


@pytest.mark.parametrize("content", [
    b"[other]\r\nhost=x\r\n", "# f\u00fcr mich\n".encode("latin-1"), "# f\u00fcr mich\n".encode(), b"[other]\nhost=x\n",
])
def test_bytes_of_others_stay(content, start, tmp_path):
    path = tmp_path / "service"
    path.write_bytes(content)

    start(EDIT, path, "hpc_db").wait(20)

    assert path.read_bytes() == content + b"[hpc_db]\nhost=hpc_db\nport=2\n"


def test_mode_is_kept_and_a_new_file_is_private(tmp_path):
    for name, mode in (("theirs", 0o640), ("new", 0o600)):
        path = tmp_path / name
        if name == "theirs":
            path.write_text("[other]\n")
            path.chmod(mode)

        endpoint.edit_services(str(path), {"hpc_db": WANTED})

        assert path.stat().st_mode & 0o777 == mode


def test_link_stays_a_link(tmp_path):
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / "dotfiles" / "service").write_text("[other]\n")
    (tmp_path / "link").symlink_to("dotfiles/service")

    endpoint.edit_services(str(tmp_path / "link"), {"hpc_db": WANTED})

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dotfiles" / "service").read_text() == "[other]\n" + SECTION


def test_file_without_the_section_is_not_touched(tmp_path):
    path = tmp_path / "service"
    endpoint.edit_services(str(path), {"hpc_db": {}})
    assert not path.exists()

    path.write_text("[other]\n")
    before = path.stat().st_ino
    endpoint.edit_services(str(path), {"hpc_db": {}})

    assert path.stat().st_ino == before
    assert os.listdir(tmp_path) == ["service"]


def test_sixteen_at_once_lose_nothing(start, tmp_path):
    path = tmp_path / "service"
    path.write_text("[mine]\nhost=x\n")
    names = [f"instance{number}" for number in range(16)]

    assert [process.wait(30) for process in [start(EDIT, path, name) for name in names]] == [0] * 16

    text = path.read_text()
    assert text.startswith("[mine]\nhost=x\n")
    headings = [line for line in text.splitlines() if line[0] == "["]
    assert sorted(headings) == sorted(f"[{name}]" for name in ["mine", *names])
    assert all(f"[{name}]\nhost={name}\nport=2\n" in text for name in names)
    assert os.listdir(tmp_path) == ["service"]


def test_lock_of_a_process_that_was_killed_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "LOCK_STALE_SECONDS", 0.2)
    (tmp_path / "service.lock").mkdir()

    endpoint.edit_services(str(tmp_path / "service"), {"hpc_db": WANTED})

    assert (tmp_path / "service").read_text() == SECTION
    assert os.listdir(tmp_path) == ["service"]


def test_stale_lock_is_broken_once_by_all_who_wait(start, tmp_path):
    (tmp_path / "service.lock").mkdir()
    code = EDIT.replace("path, name", "endpoint.LOCK_STALE_SECONDS = 0.5\npath, name", 1)
    names = [f"instance{number}" for number in range(8)]

    assert [process.wait(30) for process in [start(code, tmp_path / "service", name) for name in names]] == [0] * 8

    text = (tmp_path / "service").read_text()
    assert all(f"[{name}]\nhost={name}\nport=2\n" in text for name in names)
    assert os.listdir(tmp_path) == ["service"]


def test_lock_that_a_faster_one_took_is_not_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "LOCK_STALE_SECONDS", 0.1)
    path = tmp_path / "lock"
    path.mkdir()
    real_mkdir = os.mkdir

    def be_slower_than_others(name, *arguments):
        real_mkdir(name, *arguments)
        if name.endswith(".breaking"):
            path.rmdir()
            real_mkdir(path)
            os.utime(path, (0, 0))

    monkeypatch.setattr(os, "mkdir", be_slower_than_others)

    with pytest.raises(TimeoutError):
        with endpoint.FileLock(str(path), patience=0.15):
            raise AssertionError("two have it")
    assert path.stat().st_mtime == 0


def test_lock_that_is_held_is_waited_for_but_not_for_ever(tmp_path):
    with endpoint.FileLock(str(tmp_path / "lock")):
        with pytest.raises(TimeoutError, match="lock is locked by another process"):
            with endpoint.FileLock(str(tmp_path / "lock"), patience=0.1):
                raise AssertionError("two have it")
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_publish_says_it_twice_and_withdraw_takes_both_back(tmp_path):
    service = tmp_path / "service"
    service.write_text("[other]\n")
    where = {"instance": "hpc_db", "host": "c1", "port": 5433, "job": "1"}

    endpoint.publish(str(tmp_path), str(service), where, {"dbname": "mala"})

    assert json.loads((tmp_path / "endpoint.json").read_text()) == where
    assert service.read_text() == "[other]\n[hpc_db]\ndbname=mala\nhost=c1\nport=5433\n"

    for _again in range(2):
        endpoint.withdraw(str(tmp_path), str(service), "hpc_db")

        assert json.loads((tmp_path / "endpoint.json").read_text()) == {}
        assert service.read_text() == "[other]\n"


def test_pooler_has_a_section_of_its_own_as_long_as_it_is_there(tmp_path):
    service = tmp_path / "service"
    where = {"instance": "hpc_db", "host": "c1", "port": 5433}
    pooled = {**where, "pooler": {"host": "c1", "port": 6432}}
    alone = "[hpc_db]\ndbname=mala\nhost=c1\nport=5433\n"
    for said, text in (
        (pooled, alone + "[hpc_db-pooled]\nhost=c1\nport=6432\nsslmode=verify-ca\n"), (where, alone), (pooled, None),
    ):
        endpoint.publish(str(tmp_path), str(service), said, {"dbname": "mala"}, {"sslmode": "verify-ca"})

        assert text in (None, service.read_text())

    endpoint.withdraw(str(tmp_path), str(service), "hpc_db")

    assert service.read_text() == ""


@pytest.mark.parametrize("published, queue, serving", [
    ({"job": "7"}, [("7", "RUNNING")], "7"), ({"job": "7"}, [("6", "RUNNING"), ("7", "RUNNING")], "7"),
    ({"job": "7"}, [], None), ({"job": "7"}, [("7", "PENDING")], None), ({"job": "7"}, [("7", "COMPLETING")], None),
    ({"job": "7"}, [("8", "RUNNING")], None), ({"host": "c1"}, [("7", "RUNNING")], None),
    (None, [("7", "RUNNING")], None), ({"job": ""}, [("", "RUNNING")], None),
])
def test_server_is_live_if_the_job_of_its_endpoint_runs(published, queue, serving):
    found = endpoint.serving_job(published, [{"id": number, "state": state} for number, state in queue])

    assert (found or {}).get("id") == serving


@pytest.mark.parametrize("text, expected", [
    ('{"job": "7"}', {"job": "7", "tls": True}), ('{"job": "7", "tls": false}', {"job": "7", "tls": False}),
    ('{"job"', None), (None, None), ("{}", None),
])
def test_endpoint_that_is_read(text, expected, tmp_path):
    (tmp_path / "run").mkdir()
    if text:
        (tmp_path / "run" / "endpoint.json").write_text(text)

    assert endpoint.read_endpoint(Layout(str(tmp_path))) == expected


@pytest.fixture
def left_behind(tmp_path):
    """An instance whose server is gone without having withdrawn its endpoint."""
    for folder in ("host", "run"):
        (tmp_path / folder).mkdir()
    service = tmp_path / "service"
    settings = {
        "instance": "hpc_db", "job_name": "studies", "cluster": "mini", "service_file": str(service), "lease_ttl": 90,
    }
    (tmp_path / "host" / "settings.json").write_text(json.dumps(settings))
    service.write_text("[other]\nhost=x\n")
    where = {"instance": "hpc_db", "host": "c1", "port": 5433, "job": "7", "pooler": {"host": "c1", "port": 6432}}
    endpoint.publish(str(tmp_path / "run"), str(service), where, {"dbname": "mala"})
    return tmp_path


def say(root, verb, job="studies"):
    call = [sys.executable, "-m", "hpc_db_host.endpoint", verb, job]
    environment = {**os.environ, "PYTHONPATH": str(Path(endpoint.__file__).parents[1])}
    return subprocess.run(call, cwd=root / "host", env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("lost", [None, "run/endpoint.json", "service"])
def test_what_a_dead_node_left_behind_is_withdrawn_once(lost, left_behind):
    if lost:
        (left_behind / lost).unlink()

    assert [say(left_behind, verb) for verb in ("look", "look", "withdraw", "withdraw", "look")] == [
        "true\n", "true\n", "true\n", "false\n", "false\n"]
    assert not files.read_json(str(left_behind / "run" / "endpoint.json"))
    assert lost == "service" or (left_behind / "service").read_text() == "[other]\nhost=x\n"


@pytest.mark.parametrize("holder, withdrawn", [
    ({"kind": "slurm", "cluster": "mini"}, True), ({"kind": "slurm", "cluster": "another"}, False),
    ({"kind": "local", "cluster": "mini", "host": "another"}, False), ({"kind": "bootstrap"}, True),
])
def test_server_of_which_nobody_here_knows_keeps_its_endpoint(holder, withdrawn, left_behind):
    (left_behind / "run" / "lease.3").write_text(json.dumps({"host": "c1", "pid": 5, "job": "7", **holder}))

    assert json.loads(say(left_behind, "withdraw")) is withdrawn
    assert bool(files.read_json(str(left_behind / "run" / "endpoint.json"))) is not withdrawn


def test_server_under_the_name_before_the_last_change_keeps_its_endpoint(left_behind):
    assert [say(left_behind, verb, "renamed") for verb in ("look", "withdraw")] == ["false\n"] * 2
    assert say(left_behind, "look") == "true\n"


def test_nothing_is_withdrawn_where_nothing_was_ever_hosted(tmp_path):
    (tmp_path / "host").mkdir()

    assert say(tmp_path, "withdraw") == "false\n"
