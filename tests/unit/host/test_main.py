# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor with a postgres that only records calls; tests/integration has the real one."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hpc_db_host import __main__ as program
from hpc_db_host import endpoint, files, handover, processes, scheduler
from hpc_db_host.layout import Layout
from hpc_db_host.lease import Lease
from hpc_db_host.postgres import Failed
from hpc_db_host.threads import STOP_SIGNALS

SECTION = "[hpc_db]\ndbname=mala\nhost=c1\nport=5433\n"


class FakePostgres:
    """Records calls, and the state visible to others at that moment. ``during`` runs while the server is running."""

    port, socket = 5433, "/tmp/hpc_db-x"
    clean = True

    def __init__(self, settings, listen, keeper, parameters):
        self.events, self.root, self.keeper = settings["events"], settings["root"], keeper
        self.data = settings["data"]
        self.note(f"made listen={listen} {sorted(parameters)}")

    def note(self, what):
        published = files.read_json(os.path.join(self.root, "run", "endpoint.json"))
        self.events.append(f"{what}{' published' if published else ''}")

    def start(self):
        self.note("start")

    def wait_for_write(self, patience, alive):
        self.note("write")

    def returncode(self):
        self.note("serving")
        return self.during()

    def during(self):
        os.kill(os.getpid(), signal.SIGTERM)

    def query(self, statement, patience):
        self.note(statement)
        return ""

    def renew_heartbeats(self, databases):
        self.note("heartbeats")

    def drain(self, seconds):
        self.note(f"drain {seconds}")
        return 0

    def stop(self, patience):
        self.note("stop")
        return self.clean


@pytest.fixture
def host(tmp_path, monkeypatch):
    for folder in ("run", "host", "log"):
        (tmp_path / folder).mkdir()
    settings = {
        "instance": "hpc_db", "cluster": "hemera5", "scheduler": "slurm", "bindir": "/bin", "advertise": "c1",
        "service": {"dbname": "mala"}, "service_file": str(tmp_path / "service"), "data": str(tmp_path / "data"),
        "restarts": 0, "probe_seconds": 60, "databases": [], "dump_minutes": 0, "dump_keep": 5, "root": str(tmp_path),
    }
    (tmp_path / "host" / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(program, "Postgres", FakePostgres)
    monkeypatch.setattr(program, "check_programs", lambda _settings: None)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(socket, "getaddrinfo", lambda _name, _port: [])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    umask = os.umask(0o077)
    made = Instance(tmp_path, monkeypatch)
    monkeypatch.setattr(processes, "kill_below", lambda _pid: made.events.append("killed"))
    yield made
    os.umask(umask)
    for number, handler in before.items():
        signal.signal(number, handler)


class Instance:
    """An instance directory, and the supervisor run on it."""

    def __init__(self, root, monkeypatch):
        self.root, self.service, self._monkeypatch = root, root / "service", monkeypatch
        self.events: list[str] = []
        real = files.read_json
        monkeypatch.setattr(
            files, "read_json",
            lambda path: dict(real(path) or {}, events=self.events) if path.endswith("settings.json") else real(path),
        )

    def configure(self, **changes):
        path = self.root / "host" / "settings.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def run(self, *arguments):
        self._monkeypatch.setattr(sys, "argv", ["hpc_db_host", *arguments, "--root", str(self.root)])
        return program.main()

    def state(self):
        state = json.loads((self.root / "run" / "state.json").read_text())
        return state["state"], state["reason"]

    def said(self, name):
        return json.loads((self.root / "run" / f"{name}.json").read_text())

    def elsewhere(self, **changes):
        """Hold the lease as job 8 on another node, which looks dead after a second without a heartbeat."""
        lease = self.lease(silence=1.0, **changes)
        assert lease.try_acquire()
        path = self.root / "run" / "lease.1"
        path.write_text(json.dumps({**json.loads(path.read_text()), "place": "another boot"}))
        self.configure(lease_ttl=1.0)
        return lease

    def lease(self, ended=True, host="c2", **changes):
        """Hold the lease as another job."""
        holder = {"host": host, "pid": os.getpid(), "job": "8", "kind": "slurm", "cluster": "hemera5", **changes}
        return Lease(str(self.root / "run"), holder, lambda _holder: ended)


def test_endpoint_is_there_only_between_the_first_write_and_the_stop(host):
    assert host.run("serve") == 0

    assert host.events == [
        "made listen=True []", "start", "write", "heartbeats", "serving published", "drain 5.0", "stop",
    ]
    assert host.state() == ("ended", "stopped by SIGTERM")
    assert host.service.read_text() == ""
    assert host.lease().holder() is None


def test_engine_is_published_while_it_answers_and_told_while_not(host, monkeypatch):
    class FakeEngine:
        name, reason, polls = "pooler", "", 0
        port = None

        def __init__(self, _settings, postgres, address):
            self.postgres, self.address = postgres, address

        def poll(self):
            self.polls += 1
            self.port, self.reason = (6432, "") if self.polls != 2 else (None, "pooler ended")

        def stop(self):
            self.postgres.note("engine stopped")

    seen = []

    def look(postgres):
        where = json.loads((host.root / "run" / "endpoint.json").read_text())
        seen.append((where.get("pooler"), "[hpc_db-pooled]" in host.service.read_text(), host.state()[1]))
        return os.kill(os.getpid(), signal.SIGTERM) if len(seen) == 4 else None

    monkeypatch.setattr(program, "engines_of", lambda *found: [FakeEngine(*found)])
    monkeypatch.setattr(FakePostgres, "during", look)

    assert host.run("serve") == 0

    there = ({"host": "c1", "port": 6432}, True)
    assert seen == [
        (None, False, "it accepts writes"), (*there, "it accepts writes"), (None, False, "pooler ended"),
        (*there, "it accepts writes"),
    ]
    assert host.events[-2:] == ["engine stopped", "stop"]
    assert host.service.read_text() == ""


def test_file_that_asks_for_the_end_is_a_clean_end(host, monkeypatch):
    wishes = iter(["stop.8", "stop.7"])  # the first is another job's

    def ask(_postgres):
        files.write_state(str(host.root / "run" / next(wishes)), {"stop": True})

    monkeypatch.setattr(FakePostgres, "during", ask)

    assert host.run("serve") == 0
    assert host.state() == ("ended", f"stopped by {host.root}/run/stop.7")
    assert host.events.count("serving published") == 2
    assert not (host.root / "run" / "stop.7").exists()
    assert host.lease().holder() is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_is_a_clean_end(number, host, monkeypatch):
    monkeypatch.setattr(FakePostgres, "during", lambda self: os.kill(os.getpid(), number))

    assert host.run("serve") == 0
    assert host.state() == ("ended", f"stopped by {signal.Signals(number).name}")


def test_second_signal_changes_nothing(host, monkeypatch):
    def stop_slowly(self, patience):
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # not to one of pytest's threads
        return True

    monkeypatch.setattr(FakePostgres, "stop", stop_slowly)
    for end in (lambda self: 1, lambda self: os.kill(os.getpid(), signal.SIGINT)):
        monkeypatch.setattr(FakePostgres, "during", end)
        host.run("serve")

        assert host.lease().holder() is None


@pytest.mark.parametrize("clean, after", [(True, None), (False, "c1")])
def test_lease_is_given_back_only_after_a_clean_stop(clean, after, host, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "c1")
    monkeypatch.setattr(FakePostgres, "clean", clean)

    host.run("serve")

    assert (host.lease().holder() or {}).get("host") == after


def raise_(error):
    raise error


@pytest.mark.parametrize("during, reason", [
    (lambda self: 1, "postgres exited unexpectedly with code 1"),
    (lambda self: raise_(Failed("no")), "no"),
    (lambda self: raise_(OSError("the file system went away")), "the file system went away"),
])
def test_failure_is_told_and_the_server_withdrawn(during, reason, host, monkeypatch):
    monkeypatch.setattr(FakePostgres, "during", during)

    assert host.run("serve") == 1
    assert host.state() == ("failed", reason)
    assert host.service.read_text() == ""
    assert host.events[-1] == "stop"


def test_service_file_that_cannot_be_edited_keeps_postgres_from_nothing(host, monkeypatch):
    def break_it(_postgres):
        monkeypatch.setattr(endpoint, "edit_services", full)
        return 1

    monkeypatch.setattr(FakePostgres, "during", break_it)

    assert host.run("serve") == 1
    assert host.events[-1] == "stop"
    assert host.lease().holder() is None
    assert host.state() == (
        "failed", "postgres exited unexpectedly with code 1; the endpoint is not withdrawn: [Errno 28] no space",
    )


def full(*_arguments, **_unused):
    raise OSError(errno.ENOSPC, "no space")


@pytest.fixture
def queue(host, monkeypatch):
    """The scheduler's queue, with a successor in it until that is cancelled."""

    class FakeQueue:
        successors = ["8"]
        successor, predecessor, earliest, trouble = {"id": "8", "state": "PENDING"}, "", None, ""

        def __init__(self, settings, job):
            pass

        def look(self, timeout):
            pass

        def ensure_successor(self):
            return "job 8 follows"

        def cancel_successors(self):
            self.successors.clear()

    host.configure(chain=True)
    monkeypatch.setattr(program, "Queue", FakeQueue)
    return FakeQueue


@pytest.mark.parametrize("broken, name", [
    (endpoint, "edit_services"), (files, "remove"), (files, "write_state"), (files, "write_atomically"),
    (Lease, "is_ours"), (Lease, "release"), (sys.stderr, "write"), (FakePostgres, "drain"), (program, "print"),
])
@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), TimeoutError("locked"), ValueError("no number")])
def test_nothing_on_the_way_out_replaces_the_wish_to_stop(broken, name, error, host, queue, monkeypatch):
    def break_it(_postgres):
        monkeypatch.setattr(broken, name, lambda *_arguments, **_unused: raise_(error), raising=False)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FakePostgres, "during", break_it)

    assert host.run("serve") == 0

    assert host.events.count("start") == 1 and host.events[-1].startswith("stop")
    assert queue.successors == ["8"]


@pytest.fixture
def predecessor(host, queue, monkeypatch):
    """Job 8 on another node, which holds the lease; its heartbeat continues while this job waits."""
    lease = host.elsewhere()
    monkeypatch.setattr(time, "sleep", lambda _seconds: moment() or lease.renew())
    monkeypatch.setattr(handover, "check_ready", lambda _settings: None)
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: False)
    return lease


def moment():
    """Sleep really, but briefly."""
    threading.Event().wait(0.01)


def dies(monkeypatch):
    """Stop the predecessor's heartbeat; the scheduler notices that its job has ended, but not at once."""
    notices = time.monotonic() + 2.5
    monkeypatch.setattr(time, "sleep", lambda _seconds: moment())
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: time.monotonic() > notices)


def answers(host, monkeypatch, lease, *answer):
    """Have the predecessor answer each request."""
    side = handover.Predecessor(Layout(str(host.root)), "8")

    def sleep(_seconds):
        moment()
        lease.renew()
        request = host.said("request")
        if request.get("who"):
            side.answer(request, *answer)

    monkeypatch.setattr(handover, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(time, "sleep", sleep)
    return side


SERVE = ("serve", "--lease-patience", "1.2")


def test_successor_gives_up_before_a_predecessor_that_lives(host, predecessor):
    assert host.run(*SERVE) == 3
    assert host.events == []


def test_successor_waits_longer_for_a_predecessor_that_may_have_failed(host, predecessor, monkeypatch, capsys):
    """The scheduler notices a failed node after minutes; if the successor gave up before, no job would be left."""
    dies(monkeypatch)

    assert host.run(*SERVE) == 0

    said = capsys.readouterr().err
    assert "its heartbeat has stopped, but its job has not ended: its node may have failed" in said
    assert "job 8 follows" in said  # our walltime may end before that
    assert "start" in host.events


def test_successor_waits_for_a_predecessor_that_was_cut_off(host, predecessor, monkeypatch, capsys):
    """Slurm has given up its node; there it serves on, so that it does not hand over before the time."""
    answers(host, monkeypatch, predecessor, "refused", "job 8 hands over 1800 s after its start; 68 s have passed")
    began, answering = time.monotonic(), time.sleep
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: True)

    def sleep(seconds):
        if time.monotonic() < began + 3.0:
            answering(seconds)
        elif predecessor.holder():
            predecessor.release()

    monkeypatch.setattr(time, "sleep", sleep)
    assert host.run(*SERVE) == 0
    assert "its job has ended, but its heartbeat continues: its node may be cut off" in capsys.readouterr().err
    assert "start" in host.events


def test_successor_that_cannot_serve_ends_once_its_predecessor_says_that_it_continues(
    host, predecessor, monkeypatch, capsys
):
    monkeypatch.setattr(handover, "check_ready", lambda _settings: raise_(Failed("no programs")))
    answers(host, monkeypatch, predecessor, "refused", "job 8 continues to serve")

    assert host.run(*SERVE) == 1

    assert "failed: cannot take over: no programs; job 8 continues to serve" in capsys.readouterr().err
    assert host.events == []


def test_successor_that_seems_unable_to_serve_tries_if_its_predecessor_is_dead(host, predecessor, monkeypatch):
    monkeypatch.setattr(handover, "check_ready", lambda _settings: raise_(Failed("little memory")))
    dies(monkeypatch)

    assert host.run(*SERVE) == 0
    assert "start" in host.events


def test_successor_waits_as_long_as_its_predecessor_prepares(host, predecessor, monkeypatch):
    side = answers(host, monkeypatch, predecessor, "accepted")
    began = time.monotonic()

    def renew_or_release(_seconds, sleep=time.sleep):
        if time.monotonic() < began + 3.0:
            sleep(0.0)
        elif predecessor.holder():
            predecessor.release()

    monkeypatch.setattr(time, "sleep", renew_or_release)
    assert host.run(*SERVE) == 0
    assert "start" in host.events
    assert side.is_taken(host.said("request"))


def test_request_that_cannot_be_written_ends_nothing(host, predecessor, monkeypatch):
    monkeypatch.setattr(handover.Successor, "ask", lambda *_asked: raise_(OSError(errno.EIO, "stale")))
    dies(monkeypatch)

    assert host.run(*SERVE) == 0


@pytest.mark.parametrize("before, after", [
    ({"state": "ended", "follows": {"id": "7", "told": "queued"}}, "8"),
    ({"follows": {"id": "", "told": "server job submitted at 10:00"}}, "8"),
    ({"state": "serving", "follows": {"id": "7", "told": "queued"}}, "7"),
    ({"state": "ended", "follows": {"id": "9", "told": "queued"}}, "9"),
])
def test_workers_do_not_wait_for_a_job_that_failed_before_it_had_the_lease(before, after, host, queue, monkeypatch):
    (host.root / "run" / "state.json").write_text(json.dumps(before))
    monkeypatch.setattr(socket, "getaddrinfo", full)

    assert host.run("serve") == 1

    said = host.said("state")
    assert said["follows"]["id"] == after
    assert said.get("state") == before.get("state")


def test_stop_request_of_a_job_that_was_killed_is_removed(host, queue, monkeypatch):
    host.elsewhere()
    (host.root / "run" / "stop.8").write_text('{"stop": false}')
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: True)

    assert host.run(*SERVE) == 0
    assert not (host.root / "run" / "stop.8").exists()


def test_state_names_the_lease_and_a_starting_job_is_one_to_wait_for(host, queue, monkeypatch):
    """A worker tells by the heartbeat whether a server that was killed serves."""
    said = []
    monkeypatch.setattr(queue, "successor", None)
    monkeypatch.setattr(FakePostgres, "note", lambda self, what: said.append(
        json.loads((host.root / "run" / "state.json").read_text())))

    host.run("serve")

    assert said[0]["state"] == "starting" and said[0]["follows"]["told"] == f"job 7 is starting on {said[0]['host']}"
    assert said[0]["lease"] == {"epoch": 1, "ttl": 90.0}


def test_wish_to_stop_outlives_what_takes_its_place(host, queue, monkeypatch):
    def during(_postgres):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            full()

    monkeypatch.setattr(FakePostgres, "during", during)

    assert host.run("serve") == 0
    assert host.state() == ("ended", "stopped by SIGTERM")
    assert queue.successors == ["8"]


def test_file_that_asks_for_the_end_and_stays_is_no_reason_to_go_on(host, queue, monkeypatch):
    def remove(path, real=files.remove):
        return full() if path.endswith("stop.7") else real(path)

    monkeypatch.setattr(files, "remove", remove)

    def ask(_postgres):
        (host.root / "run" / "stop.7").write_text('{"stop": true}')

    monkeypatch.setattr(FakePostgres, "during", ask)

    assert host.run("serve") == 0
    assert host.state()[0] == "ended"
    assert host.events.count("start") == 1


def test_lease_is_not_released_before_postgres_has_ended(host, monkeypatch):
    monkeypatch.setattr(FakePostgres, "stop", lambda self, patience: full())

    host.run("serve")

    assert host.lease().holder()["job"] == "7"


def test_place_that_cannot_be_told_is_told_later_while_postgres_serves(host, monkeypatch):
    looks = []

    def during(_postgres):
        looks.append(host.state())
        if len(looks) == 2:
            monkeypatch.undo_full()
        if len(looks) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    host.service.write_text(SECTION.replace("c1", "a-node-of-last-week") + "[other]\nhost=elsewhere\n")
    real = endpoint.edit_services
    monkeypatch.setattr(endpoint, "edit_services", full)
    monkeypatch.undo_full = lambda: monkeypatch.setattr(endpoint, "edit_services", real)
    monkeypatch.setattr(program, "PUBLISH_SECONDS", 0.0)
    published = []
    monkeypatch.setattr(FakePostgres, "during", lambda self: published.append(host.service.read_text()) or during(self))

    assert host.run("serve") == 0

    assert [state for state, _reason in looks] == ["serving", "unhealthy", "serving", "serving"]
    assert looks[1][1] == "cannot publish the endpoint: [Errno 28] no space"
    assert published[-1] == "[other]\nhost=elsewhere\n" + SECTION
    assert host.events.count("start published") + host.events.count("start") == 1


def test_takeover_leaves_everything_to_the_next_holder(host, monkeypatch):
    def overtake(postgres):
        other = json.dumps({"host": "c2", "state": "serving"})
        for name in ("endpoint.json", "state.json", "lease.2"):
            (host.root / "run" / name).write_text(other)
        postgres.keeper.renew()

    monkeypatch.setattr(FakePostgres, "during", overtake)

    assert host.run("serve") == 1

    # Killed before the stop, which would write a checkpoint into a directory that now belongs to another server.
    assert host.events.index("killed") < host.events.index("stop published")
    assert host.service.read_text() == SECTION
    assert json.loads((host.root / "run" / "state.json").read_text())["host"] == "c2"
    assert not (host.root / "run" / "released.2").exists()


def test_a_reason_stays_in_its_line_of_the_log(host, capsys):
    reason = "psql: x\n2026-11-22T10:00:00+0000 serving: ok\r\x1b[2J"
    program.Host(str(host.root), bootstrap=False).tell("failed", reason)

    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.strip().isprintable()
    assert r"failed: psql: x\n2026-11-22T10:00:00+0000 serving: ok\r\x1b[2J" in said


def test_refusal_names_the_holder_and_touches_nothing(host, capsys):
    host.lease().try_acquire()
    before = sorted(os.listdir(host.root / "run"))

    assert host.run("serve") == 3

    assert "failed: the data directory is held by job 8 on c2" in capsys.readouterr().err
    assert sorted(os.listdir(host.root / "run")) == before
    assert host.events == []


def test_what_a_dead_holder_left_behind_is_withdrawn_before_anything_serves(host, monkeypatch):
    host.service.write_text(SECTION)
    (host.root / "run" / "endpoint.json").write_text("{}")
    monkeypatch.setattr(FakePostgres, "wait_for_write", lambda *_given: raise_(Failed(host.service.read_text())))

    host.run("serve")

    assert host.state() == ("failed", "")


def test_bootstrap_tells_only_who_knows_its_socket(host, monkeypatch):
    said = []

    def read(_postgres):
        said.append(json.loads((host.root / "run" / "bootstrap.json").read_text()))

    monkeypatch.setattr(FakePostgres, "during", read)

    assert host.run("bootstrap", "--lifetime", "0") == 0

    where = said[0]
    assert (where["socket"], where["pid"], where["job"]) == (FakePostgres.socket, os.getpid(), "")
    assert host.events[0] == f"made listen=False {sorted(program.BOOTSTRAP_PARAMETERS)}"
    assert not any("published" in event for event in host.events)
    assert sorted(os.listdir(host.root / "run")) == ["hb.1", "lease.1", "released.1"]


def test_without_settings_one_line_says_what_to_do(tmp_path):
    called = subprocess.run(
        [sys.executable, "-m", "hpc_db_host", "serve", "--root", tmp_path], capture_output=True, text=True,
        cwd=os.path.dirname(os.path.dirname(program.__file__)), check=False,
    )

    assert called.returncode == 1
    assert called.stderr == f"{tmp_path}/host/settings.json is missing; run the playbook hpc_db.yml first\n"


@pytest.mark.parametrize("holder, ended", [
    ({"kind": "bootstrap", "job": ""}, True),
    ({"kind": "bootstrap", "scheduler": "slurm", "allocation": ""}, True),
    ({"kind": "bootstrap", "scheduler": "slurm", "allocation": "7"}, True),
    ({"kind": "bootstrap", "scheduler": "slurm", "allocation": "8"}, True),
    ({"kind": "bootstrap", "scheduler": "slurm", "allocation": "9"}, False),
    ({"kind": "bootstrap", "scheduler": "slurm", "allocation": "8", "cluster": "another"}, False),
    ({"kind": "slurm", "job": "7"}, True),  # our own job, which was queued again
    ({"kind": "slurm", "job": "8"}, True),
    ({"kind": "slurm", "job": "9"}, False),
    ({"kind": "slurm", "job": "8", "cluster": "another"}, False),
    ({"kind": "local", "job": "8", "host": socket.gethostname()}, True),  # before a reboot
    ({"kind": "local", "job": "8", "host": "another"}, False),
    ({"kind": "local", "job": "8", "host": "an-old-name", "machine": ["this", "one"]}, True),
    ({"kind": "local", "job": "8", "host": "another", "machine": ["that"]}, False),
    ({"kind": "local", "job": "8", "host": "another", "machine": []}, False),
    ({"kind": "local", "job": "8", "host": "another", "machine": ["this"], "cluster": "another"}, False),
    ({"kind": "slurm", "job": "9", "host": "another", "machine": ["this"]}, False),
    ({}, False),
])
def test_which_holders_have_ended(holder, ended, host, monkeypatch):
    monkeypatch.setattr(scheduler, "job_has_ended", lambda kind, bin_dir, job: (kind, job) == ("slurm", "8"))
    monkeypatch.setattr(processes, "this_machine", lambda: ["this", "too"])

    assert program.Host(str(host.root), bootstrap=False)._has_ended({"cluster": "hemera5", **holder}) is ended


@pytest.mark.parametrize("holder, told", [
    ({}, "it has died, it is replaced after"), ({"kind": "bootstrap"}, "it was killed, it can be replaced at once on"),
    ({"cluster": "another"}, None),
])
def test_who_waits_for_the_lease_says_for_how_long(holder, told, host, monkeypatch, capsys):
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: False)
    host.lease(**holder).try_acquire()

    assert host.run("bootstrap", "--lease-patience", "0.05") == 3

    (waiting,) = re.findall("starting: waiting: the data directory is held by (.*)", capsys.readouterr().err)
    assert (f"; if {told}" in waiting) if told else ("replaced" not in waiting)


def test_job_waits_for_a_holder_that_is_cut_off_and_nobody_else_does(host, monkeypatch, capsys):
    cut_off, asked = host.lease(), []
    cut_off.try_acquire()

    def job_has_ended(kind, bin_dir, job):
        asked.append(job)
        if len(asked) == 3:
            cut_off.release()
        return True

    monkeypatch.setattr(scheduler, "job_has_ended", job_has_ended)

    assert host.run("bootstrap", "--lifetime", "0") == 3
    monkeypatch.delenv("SLURM_JOB_ID")
    assert (host.run("serve"), asked) == (3, [])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert (host.run("serve", "--lease-patience", "0.05"), asked) == (0, ["8", "8", "8"])
    assert capsys.readouterr().err.count("its job has ended, but its heartbeat continues: its node may be cut off") == 1


def test_instance_serves_again_after_a_reboot(host, monkeypatch):
    settings = json.loads((host.root / "host" / "settings.json").read_text())
    changes = {"scheduler": "local", "lease_ttl": "3"}
    (host.root / "host" / "settings.json").write_text(json.dumps({**settings, **changes}))
    monkeypatch.setattr(processes, "this_host", lambda: "boot1 pid:[1]")
    host.lease(host=socket.gethostname(), kind="local").try_acquire()
    monkeypatch.setattr(processes, "this_host", lambda: "boot2 pid:[1]")

    assert host.run("serve", "--lease-patience", "20") == 0
    assert host.state()[0] == "ended"


@pytest.mark.parametrize("here, code", [(["card 1", "card 2"], 0), (["card 3"], 3), ([], 3)])
def test_laptop_serves_again_after_a_reboot_under_another_name(here, code, host, monkeypatch, capsys):
    host.configure(scheduler="local", lease_ttl="3")
    monkeypatch.setattr(processes, "this_host", lambda: "boot 1")
    monkeypatch.setattr(processes, "this_machine", lambda: ["card 2"], raising=False)
    host.lease(host="laptop.home.lan", kind="local", silence=0).try_acquire()
    monkeypatch.setattr(processes, "this_host", lambda: "boot 2")
    monkeypatch.setattr(processes, "this_machine", lambda: here, raising=False)

    assert host.run("serve", "--lease-patience", "0.1" if code else "20") == code
    assert ("run the playbook break_lease.yml" in capsys.readouterr().err) is (code == 3)


@pytest.mark.parametrize("holder, hint", [({"cluster": "an-old-name"}, True), ({}, False)])
def test_refusal_names_the_way_out_where_only_the_user_can_know(holder, hint, host, monkeypatch, capsys):
    monkeypatch.setattr(scheduler, "job_has_ended", lambda *_asked: False)
    host.lease(**holder).try_acquire()

    assert host.run("serve") == 3

    assert ("if it has, run the playbook break_lease.yml" in capsys.readouterr().err) is hint


def test_node_that_cannot_run_postgres_is_told_once(host, monkeypatch):
    settings = json.loads((host.root / "host" / "settings.json").read_text())
    (host.root / "host" / "settings.json").write_text(json.dumps({**settings, "restarts": 5}))
    monkeypatch.setattr(program, "check_programs", lambda _settings: raise_(Failed("postgres does not run on c1: no")))

    assert host.run("serve") == 1

    assert host.events == []
    assert host.state() == ("failed", "postgres does not run on c1: no")
    assert host.lease().holder() is None


class FakeUpgrade:
    """Records calls, and the holder of the lease during them. ``during`` runs then."""

    def __init__(self, settings, following, keeper):
        self.settings, self.following = settings, following
        keeper.check()

    def run(self, back):
        with open(os.path.join(self.settings["root"], "run", "lease.1")) as stream:
            holder = json.load(stream)
        self.settings["events"].append((self.following, back, holder["kind"], holder["pid"]))
        self.during()
        return {"way": "kept"}

    def during(self):
        assert not os.path.exists(os.path.join(self.settings["root"], "run", "released.1"))


@pytest.mark.parametrize("arguments, back", [([], False), (["--back"], True)])
def test_upgrade_holds_the_lease_and_prints_what_was_compared(arguments, back, host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Upgrade", FakeUpgrade)

    assert host.run("upgrade", "--settings", "next.json", *arguments) == 0

    assert host.events == [("next.json", back, "bootstrap", os.getpid())]
    assert json.loads(capsys.readouterr().out) == {"way": "kept"}
    assert host.lease().holder() is None


@pytest.mark.parametrize("during, told", [
    (lambda self: raise_(Failed("pg_upgrade: no")), "failed: pg_upgrade: no"),
    (lambda self: os.kill(os.getpid(), signal.SIGTERM), "ended: stopped by SIGTERM"),
])
def test_upgrade_that_does_not_end_well_is_no_success(during, told, host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Upgrade", FakeUpgrade)
    monkeypatch.setattr(FakeUpgrade, "during", during)

    assert host.run("upgrade", "--settings", "next.json") == 1

    said = capsys.readouterr()
    assert told in said.err and said.out == ""
    assert host.lease().holder() is None


def test_nothing_is_upgraded_while_somebody_serves(host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Upgrade", FakeUpgrade)
    host.lease().try_acquire()

    assert host.run("upgrade", "--settings", "next.json") == 3
    assert "failed: the data directory is held by job 8 on c2" in capsys.readouterr().err
    assert host.events == []


def test_who_waited_for_an_upgrade_serves_what_it_has_made(host, monkeypatch):
    upgrade = host.lease()
    upgrade.try_acquire()
    path = host.root / "host" / "settings.json"

    def end_upgrade(_seconds):
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": "/data/18"}))
        upgrade.release()

    monkeypatch.setattr(time, "sleep", end_upgrade)
    monkeypatch.setattr(FakePostgres, "start", lambda self: self.note(self.data))

    assert host.run("serve", "--lease-patience", "5") == 0
    assert host.events[1] == "/data/18"
