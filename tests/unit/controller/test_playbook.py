# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""hpc_db on recorded events of ansible-runner; tests/integration has a real run."""

import io
import sys

import pytest
from hpc_db.__main__ import main, setting
from hpc_db.playbook import Failed, Told, find_inventories, phase_of
from hpc_db.progress import Lines, Terminal
from hpc_db.servers import Server, servers_of

ROLES = "/x/ansible_collections/mala/hpc_db/roles"
URL = "postgresql+psycopg2:///?service=hpc_db"
VALUES = {"name": "hpc_db", "url": URL, "urls": {"studies": URL}, "job": None, "endpoint": None}


def start(host, task, file="postgres/tasks/install.yml"):
    return {"event": "runner_on_start", "pid": 7, "event_data": {
        "host": host, "task": task, "task_path": f"{ROLES}/{file}:4"}}


def result(kind, host, action="assert", **res):
    return {"event": f"runner_{kind}", "pid": 7, "event_data": {"host": host, "task_action": action, "res": res}}


def stats(**counts):
    return {"event": "playbook_on_stats", "pid": 7, "event_data": {"failures": {}, "dark": {}, **counts}}


def verbose(line):
    return {"event": "verbose", "stdout": line}


def told_of(events, screen=None):
    told = Told(screen or Lines(io.StringIO()))
    for event in events:
        told.take(event)
    return told


@pytest.mark.parametrize("job, endpoint, expected", [
    (None, {"host": "c1", "port": 5432, "job": "7"}, ("serving", "c1", 5432, "7")),
    ({"id": "7", "state": "PENDING"}, None, ("pending", None, None, "7")),
    (None, None, ("absent", None, None, None)),
])
def test_server_is_what_the_role_tells(job, endpoint, expected):
    show = result("on_ok", "mini", "mala.hpc_db.show", text="x", about={**VALUES, "job": job, "endpoint": endpoint})

    (server,) = servers_of(told_of([start("mini", "Show"), show]).results)

    assert server == Server("mini", "hpc_db", VALUES["url"], *expected, VALUES["urls"])


@pytest.mark.parametrize("events, says", [
    ([result("on_failed", "a", msg="Task failed: Action failed: server_job_name: x is\nnot allowed")],
     "a: server_job_name: x is not allowed"),
    ([result("item_on_failed", "a", msg="postgres_port: 80"), result("on_failed", "a", msg="One or more", results=[])],
     "a: postgres_port: 80"),
    ([result("on_failed", "a", msg="rescued"), result("on_failed", "a", msg="last")], "a: last"),
    ([result("on_failed", "b", msg="rescued"), result("on_failed", "a", msg="it")], "a: it"),
])
def test_failure_is_the_tasks_own_line(events, says):
    told = told_of([start("a", "Check"), *events, stats(failures={"a": 1})])

    assert told.why(["mine"]) == says


def test_unreachable_host_says_that_nobody_answers_ssh():
    events = [
        result("on_unreachable", "a", msg="Failed to connect to the host via ssh: a@a: Permission denied (publickey)."),
        result("on_unreachable", "b", msg="ssh: Could not resolve hostname b"),
    ]

    why = told_of([*events, stats(dark={"a": 1, "b": 1})]).why(["mine"]).split("\n")

    assert "; ssh cannot ask for input here: load a key into ssh-agent, or first open" in why[0]
    assert why[1] == "b: ssh: Could not resolve hostname b"


@pytest.mark.parametrize("lines, says", [
    (["[WARNING]: x", "[ERROR]: no vault secrets", "Origin: y"], "mine: [ERROR]: no vault secrets"),
    (["Segmentation fault"], "mine: Segmentation fault"),
    ([], "mine: ansible-playbook ended without a message"),
])
def test_what_ansible_says_before_any_task_is_kept(lines, says):
    assert told_of(map(verbose, lines)).why(["mine"]) == says


def test_inventory_that_cannot_be_read_is_named():
    line = "[WARNING]: Unable to parse /x/hosts.yml as an inventory source"

    assert told_of([verbose(line)]).why_nobody(["x"]) == "Unable to parse /x/hosts.yml as an inventory source"
    assert told_of([]).why_nobody(["x", "y"]) == "x, y: no host is in a group hpc_db"


EVENTS = [
    start("mini", "Have the packages"), start("mini", "Have the data"),
    start("mini", "Wait", "server/tasks/main.yml"), verbose("[mini] hpc_db: PENDING, 0 s of at most 600 s"),
    result("on_ok", "mini", "mala.hpc_db.show", text="something to know"),
]


def test_file_has_a_line_a_phase():
    stream = io.StringIO()
    told_of(EVENTS, Lines(stream))

    assert stream.getvalue() == "mini: PostgreSQL\nmini: server job\nsomething to know\n"


def test_terminal_has_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "39")
    stream = io.StringIO()
    told_of(EVENTS, Terminal(stream)).screen.end()

    assert stream.getvalue().split("\r\033[K") == [
        "", "mini: PostgreSQL: Have the packages", "mini: PostgreSQL: Have the data", "mini: server job: Wait",
        "mini: server job: hpc_db: PENDING, 0 s", "something to know\n", "",
    ]


@pytest.mark.parametrize("shows_pages, printed", [(True, "hpc_db on mini\n  job   7\n"), (False, "")])
@pytest.mark.parametrize("screen", [Lines, Terminal])
def test_status_page_is_printed(screen, shows_pages, printed, capsys):
    page = result("on_ok", "mini", "mala.hpc_db.show", text="hpc_db on mini\n  job\x1b  7\n", about=VALUES)
    told = Told(screen(io.StringIO()), shows_pages)

    for event in (start("mini", "Show"), page):
        told.take(event)

    assert capsys.readouterr().out == printed
    assert [about["name"] for about in (each["about"] for _host, each in told.results)] == ["hpc_db"]


def test_what_a_playbook_shows_is_no_command_of_a_terminals():
    stream = io.StringIO()
    told_of([start("mini", "Show"), result("on_ok", "mini", "mala.hpc_db.show", text="one\ntwo\x1b[2J")], Lines(stream))

    assert stream.getvalue().endswith("one\ntwo [2J\n")


def test_terminal_is_not_moved_by_what_a_cluster_says():
    stream = io.StringIO()
    told_of([start("mini", "Wait"), verbose("[mini] a\x1b[2Jb\x07")], Terminal(stream))

    assert stream.getvalue().endswith("mini: PostgreSQL: a [2Jb ")


@pytest.mark.parametrize("path, phase", [
    (f"{ROLES}/postgres/tasks/check_tls.yml:3", "settings"), (f"{ROLES}/instance/tasks/settings.yml:3", "settings"),
    (f"{ROLES}/server/tasks/quick_check.yml:3", "quick check"),
    (f"{ROLES}/databases/tasks/main.yml:3", "databases and studies"), (f"{ROLES}/server/tasks/show.yml:3", ""),
    ("/x/playbooks/hpc_db.yml:9", ""),
])
def test_phase_is_the_role_s(path, phase):
    assert phase_of(path) == phase


def test_inventory_is_a_name_or_a_path(tmp_path, monkeypatch):
    (tmp_path / "inventories" / "mine").mkdir(parents=True)
    (tmp_path / "hemera5").mkdir()  # a folder of results, for example, not an inventory
    monkeypatch.chdir(tmp_path)

    mine, hemera5, path, elsewhere = (
        find_inventories([given], folder)[0]
        for given, folder in (("mine", None), ("hemera5", None), ("./hemera5", None), ("hemera5", tmp_path))
    )

    assert mine == str(tmp_path / "inventories" / "mine")
    assert hemera5.endswith("/inventories/hemera5") and not hemera5.startswith(str(tmp_path))
    assert path == elsewhere == str(tmp_path / "hemera5")
    with pytest.raises(Failed, match="^inventory not found: inventories/nope or /.*/inventories/nope$"):
        find_inventories(["nope"], None)
    with pytest.raises(Failed, match="^no inventory is given"):
        find_inventories([], None)


@pytest.mark.parametrize("text, expected", [
    ("server_wait=false", ("server_wait", "false")), ("workers_study=18", ("workers_study", "18")),
    ('databases_studies=["a"]', ("databases_studies", ["a"])), ("workers_study=[a", ("workers_study", "[a")),
    ("instance_name=mine", ("instance_name", "mine")), ("a=", ("a", "")), ("a=b=c", ("a", "b=c")),
])
def test_setting_is_text_or_a_list_or_mapping(text, expected):
    assert setting(text) == expected


def test_command_says_why_it_failed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hpc_db", "up", "nope"])

    assert main() == 1
    assert capsys.readouterr().err.startswith("inventory not found: inventories/nope or ")
