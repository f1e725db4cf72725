# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Invalid input is refused with one line that names the setting, before anything has changed."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from target import ROOT, Target

JOB = {"partition": "work", "time": "01:00:00", "mem": "1000M"}


def refusal(output: str) -> str:
    """Return the only message of the only task that failed."""
    assert len(re.findall(r"^(?:fatal|failed): \[", output, re.MULTILINE)) == 1, output
    said = re.findall(r"^ +msg: (.*(?:\n {8,}.*)*)", output, re.MULTILINE)
    return " ".join(said[-1].replace("''", "'").split())


def check_refused(target: Target, variables: dict, given: list[tuple[dict, str]], folder: Path) -> None:
    """Run one play with a host for each of these settings, and check that each is refused without any change."""
    hosts = {f"case{number}": {**variables, **settings} for number, (settings, _says) in enumerate(given)}
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"hpc_db": {"hosts": hosts}}))
    before = target.files()

    played = target.play("hpc_db", None, f"--inventory={inventory}", "--limit=case*", "--forks=8")

    for number, (settings, says) in enumerate(given):
        said = re.findall(rf"^(?:fatal|failed): \[case{number}\].*(?:\n .*)*", played.stdout, re.MULTILINE)
        assert len(said) == 1, (settings, played.stdout)
        assert re.search(says, " ".join(said[0].replace("''", "'").split())), (settings, said)
        assert re.search(rf"^case{number} .* changed=0 .* failed=1 ", played.stdout, re.MULTILINE), settings
    assert target.files() == before


def test_refused_on_a_cluster(mini: Target, tmp_path: Path) -> None:
    mini.run(
        "cd; mkdir -p env/conda-meta full half/run half/postgresql-17; touch full/thesis half/postgresql-17/thesis;"
        "chmod 700 half half/run; printf '#!/bin/sh\\necho 3.6 /usr/bin/python3.6\\n' > old; chmod 755 old"
    )
    given: list[tuple[dict, str]] = [
        ({"postgres_provider": "apt"}, r"postgres_provider: apt is not allowed; rattler, conda, embedded, system"),
        ({"server_job_options": {**JOB, "partition": "nope"}}, r"server_job_options: .*: invalid partition .*: nope"),
        ({"server_job_options": {**JOB, "mem": "999G"}}, r"server_job_options: .*node configuration is not available"),
        ({"server_job_options": {**JOB, "mem": "12Q"}}, r"instance_memory: 12Q is not allowed; .* such as 16G"),
        ({"instance_memory": "a lot"}, r"instance_memory: a lot is not allowed; .* such as 16G"),
        ({"server_job_options": {**JOB, "time": "tomorrow"}}, r"time: .*tomorrow"),
        ({"server_job_options": {**JOB, "time": 259200}}, r"time: .*259200.*quote"),
        ({"server_job_options": {**JOB, "time": "99:00:00"}}, r"time.*99:00:00.*work.*4:00:00"),
        ({"server_job_options": {**JOB, "no such": 1}}, r"no such"),
        ({"databases_studies": [{"name": "My-Study"}]}, r"databases_studies: My-Study is not allowed as a database's"),
        ({"databases_studies": [{"name": "alice"}]}, r"databases_studies: alice is not allowed as a database's name"),
        ({"databases_studies": [{"name": "a"}, {"name": "a"}]}, r"databases_studies: .*each name once"),
        ({"databases_studies": []}, r"databases_studies: an empty list is not allowed"),
        ({"server_bin_dir": "/opt/nothing"}, r"server_bin_dir"),
        ({"server_scheduler": "pbs"}, r"server_scheduler: pbs is not allowed; slurm, local, gridengine"),
        ({"instance_root": "~/env/envs/db"}, r"instance_root: .*lies inside the conda environment /home/alice/env,"),
        ({"instance_root": "~/full"}, r"instance_root: /home/alice/full contains other files"),
        ({"instance_root": "~/a'b"}, r"instance_root: .* contains .*; allowed are letters"),
        ({"instance_root": "~/half"}, r"/home/alice/half/postgresql-17 exists and is not a conda environment"),
        ({"instance_name": "Ω 1"}, r"instance_name: Ω 1 is not allowed; lower case letters"),
        ({"postgres_port": 80}, r"postgres_port: 80 is not allowed; a port from 1024 to 65535"),
        ({"postgres_networks": ["10.0.0.0"]}, r"postgres_networks: 10.0.0.0 is not allowed; .*10.1.0.0/16"),
        ({"ansible_python_interpreter": "/home/alice/old"}, r"is Python 3.6 there, .*set ansible_python_interpreter"),
        ({"ansible_python_interpreter": "/no/python"}, r"does not run there, .*set ansible_python_interpreter"),
    ]
    (usual,) = yaml.safe_load((ROOT / "molecule/default/inventory/hosts.yml").read_text())["hpc_db"]["hosts"].values()
    check_refused(mini, usual, given, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be refused as root")
def test_refused_for_root(here: Target) -> None:
    root = f"/tmp/hpc-db-refused-{os.getpid()}"
    # The inventory's become user is omitted, so that root itself is the owner.
    played = here.play("hpc_db", {"ansible_become": False, "instance_root": root})

    assert "the owner is root, but PostgreSQL does not run as root: set ansible_user" in refusal(played.stdout)
    assert not os.path.exists(root)


def test_refused_on_this_machine(here: Target, tmp_path: Path) -> None:
    given: list[tuple[dict, str]] = [
        ({"postgres_listen_addresses": "*"}, r"postgres_listen_addresses: \* .*127.0.0.1, since the provider embedded"),
        ({"postgres_lock_file": "my.lock"}, r"postgres_lock_file: my.lock with postgres_provider embedded is not al"),
        ({"postgres_staged": True}, r"postgres_staged: True with postgres_provider embedded is not allowed; only"),
        ({"postgres_major": 17}, r"postgres_major: 17 .*18, which the provider embedded contains"),
        ({"server_pooler": True}, r"server_pooler_program: nothing with postgres_provider embedded is not allowed"),
        ({"databases_workers": 0}, r"databases_workers: 0 is not allowed"),
    ]
    check_refused(here, {**here.variables, "ansible_connection": "local"}, given, tmp_path)


# The path /tmp/ plus this many bytes is one byte longer than server_socket_parent allows: 75 minus the instance's name.
TOO_MANY = 75 - len(f"it{os.getpid()}") - len("/tmp/") + 1
RULE = {"type": "local", "method": "peer"}
# Names and paths that a shell, a configuration file, a scheduler or libpq could misread.
HOSTILE = [
    *[("instance_name", name) for name in ("a b", "a\n", "-x", "it's", "$(touch CANARY)", "{x}", "a,b", "x" * 41)],
    *[("instance_root", f"~/{name}") for name in ("it's", 'a"b', "$(touch CANARY)", "a\nb", "{x}", "a\\b", "a;b")],
    *[("instance_root", name) for name in ("relative", "-x")],
    *[("instance_cluster", name) for name in ("a\nb", "$(touch CANARY)", "")],
    *[("instance_study_role", name) for name in ("a\n", 'a"b', "pg_a", "\u03a9")],
    *[("databases_reader_role", name) for name in ("a\n", 'a"b', "pg_a", "study", "")],
    *[("server_job_name", name) for name in ("a b", "-x", "a\n", "$(touch CANARY)", "\u03a9", "")],
    *[("server_python", name) for name in ("-c", "a\ntouch CANARY", "$(touch CANARY)", "")],
    *[("server_address", name) for name in ("a b", "c1\n[other]", "-x", "a,b")],
    *[("server_socket_parent", name) for name in ("tmp", "/tmp/a,b", "/tmp/it's", "/tmp/a\nb", "/tmp/{x}")],
    *[("server_socket_parent", f"/tmp/{name}") for name in ("x" * TOO_MANY, "\u03a9" * (TOO_MANY // 2 + 1))],
    *[("server_pooler_program", name) for name in ("pgbouncer", "/a\nb", "-x")],
    *[("server_pooler_connections", text) for text in ("10\nauth_type = any", "0", "many")],
    ("server_pooler_port", 80), ("server_proxy_port", 80), ("server_proxy_connections", 0),
    *[("client_environment", name) for name in ("env", "/no/such", "/tmp/$(touch CANARY)")],
    ("client_environment", "/bin/true"), ("databases_workers", -1),
    ("server_lease_ttl", 0), ("server_stop_notice", 0),
    *[("postgres_networks", [name]) for name in ("10.0.0.0/33", "300.0.0.1/8", "::1/129", "all\n", "all trust")],
    *[("postgres_max_connections", text) for text in ("100\nfsync = off", "0", "many")],
    *[("postgres_settings", {name: 1}) for name in ("work mem", "work_mem\n", "it's", "-x")],
    *[("postgres_settings", {name: 1}) for name in ("log_line_prefix", "lc_messages")],
    *[("postgres_hba_rules", [{**RULE, "users": [name]}]) for name in ('a" trust', "a\nb", "")],
    ("postgres_hba_rules", [{**RULE, "options": "map=a\nlocal all all trust"}]),
    *[("databases_studies", [{"name": name}]) for name in ("a\n", "$(touch CANARY)", "it's", "-x", "\u03a9")],
]


@pytest.mark.parametrize("part", range(3))
def test_hostile_settings_are_refused(here: Target, tmp_path: Path, part: int) -> None:
    """One host for each setting, in three plays of one or two minutes each."""
    canary = here.run("cd; pwd -P") + "/canary"
    given = json.loads(json.dumps(HOSTILE[part::3]).replace("CANARY", canary))
    variables = {**here.variables, "ansible_connection": "local"}
    hosts = {f"case{number}": {**variables, setting: value} for number, (setting, value) in enumerate(given)}
    inventory = tmp_path / "hosts.json"
    inventory.write_text(json.dumps({"hpc_db": {"hosts": hosts}}))
    before = here.files()

    played = here.play("hpc_db", None, f"--inventory={inventory}", "--limit=case*", "--forks=8")

    for number, (setting, value) in enumerate(given):
        said = re.findall(rf"^(?:fatal|failed): \[case{number}\].*(?:\n .*)*", played.stdout, re.MULTILINE)
        assert said and setting.replace("server_job_", "") in said[0], (setting, value, said)
        recap = re.search(rf"^case{number} .* changed=0 .* failed=1 ", played.stdout, re.MULTILINE)
        assert recap, (setting, value)
    assert here.files() == before  # and the canary file was not created


def test_unusual_names_are_used_as_they_are(
    here: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = ["it's", 'say "hi"', "$(touch ~/canary)", "a\nb", "-x", "{x}", "a,b", "\u03a9", "%s", "a\\"]
    sockets = f"/tmp/-a b \u03a9 {os.getpid()}"
    settings = {
        "instance_root": "~/a b, \u03a9=+@/-x", "server_socket_parent": sockets,
        "databases_studies": [{"name": "mala", "studies": [{"name": name} for name in studies]}],
    }
    here.run(f"mkdir -p '{sockets}'")

    played = here.play("hpc_db", settings)
    assert played.returncode == 0, played.stdout
    again = here.play("hpc_db", settings)
    monkeypatch.setitem(here.environment, "PIP_NO_INDEX", "1")
    monkeypatch.setitem(here.environment, "PIP_FIND_LINKS", str(ROOT / ".cache" / "wheels"))
    workstation = {**settings, "dashboard_root": str(tmp_path / "it's $(touch ~/canary), %s")}
    shown = here.play("dashboard", workstation)
    address = re.search(r"^optuna-dashboard shows mala: (http://\S+/)$", shown.stdout, re.MULTILINE)
    assert address, shown.stdout
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with ask.open(f"{address.group(1)}api/studies", timeout=100) as answer:
        page = json.load(answer)
    ended = here.play("dashboard", {**workstation, "dashboard_state": "stopped"})
    stopped = here.play("stop", settings)

    assert re.search(r"localhost .* changed=0 .* failed=0", again.stdout), again.stdout
    assert [study["study_name"] for study in page["study_summaries"]] == studies
    assert re.search(r"localhost .* changed=1 .* failed=0", ended.stdout), ended.stdout
    with pytest.raises(urllib.error.URLError):
        ask.open(address.group(1), timeout=100)
    assert stopped.returncode == 0, stopped.stdout
    here.run(f"cd; test ! -e canary && rm -r 'a b, \u03a9=+@' && rmdir '{sockets}'")


def test_what_is_allowed_but_dangerous_is_named(here: Target) -> None:
    rules = [{"type": "host", "address": "0.0.0.0/0", "method": "trust"}]

    played = here.play("hpc_db", {"postgres_hba_rules": rules, "databases_workers": 1000}, "--check")

    assert played.returncode == 0, played.stdout
    # 2G: 10 % shared buffers, 128 MB fixed, and 3020 connections with the minimum of memory each
    too_little = r"^instance_memory: 2G is too little for the 3020 connections .* 12412 MB, .*mem in server_job_options"
    assert re.search(too_little, played.stdout, re.MULTILINE), played.stdout
    assert len(re.findall(r"^postgres_hba_rules: host all all 0.0.0.0/0 trust: any client that", played.stdout,
                          re.MULTILINE)) == 1


def test_unfit_programs_are_refused_before_anything_changes(
    here: Target, bindir: Path, open_folder: Path, tmp_path: Path
) -> None:
    """One host for each case, in a single play."""
    incomplete, no_tls = open_folder / "incomplete", open_folder / "no_tls"
    for folder, left_out in ((incomplete, "initdb"), (no_tls, "postgres")):
        folder.mkdir()
        for program in bindir.iterdir():
            if program.name != left_out:
                (folder / program.name).symlink_to(program)
    # Debian's build has TLS; this wrapper hides that.
    tell_no_library = 'case "$*" in *ssl_library*) exit; esac'
    (no_tls / "postgres").write_text(f'#!/bin/sh\n{tell_no_library}\nexec {bindir}/postgres "$@"\n')
    (no_tls / "postgres").chmod(0o755)
    bare = open_folder / "bare"  # like Debian's Python without the package python3-venv
    no_ensurepip = '[ "$2" != ensurepip ] || { echo No module named ensurepip >&2; exit 1; }'
    bare.write_text(f'#!/bin/sh\n{no_ensurepip}\nexec python3 "$@"\n')
    bare.chmod(0o755)
    major = int(bindir.parts[-2])
    settings = {
        "postgres_provider": "system", "postgres_major": major, "postgres_bindir": str(bindir), "postgres_tls": True,
    }
    given: list[tuple[dict, str]] = [
        ({"postgres_bindir": "/nowhere"}, r"postgres_bindir: /nowhere has no program postgres, initdb, "),
        ({"postgres_bindir": str(incomplete)}, f"postgres_bindir: {incomplete} has no program initdb; "),
        ({"postgres_bindir": str(no_tls)},
         rf"postgres_tls: True is not allowed; {no_tls} contains PostgreSQL {major}\S* without TLS, so set fa"),
        ({"postgres_major": 14}, rf"postgres_major: 14 is not allowed; {bindir} contains .*, so set {major}"),
        ({"postgres_major": 9}, "postgres_major: 9 is not allowed; 14 or newer"),
        ({"postgres_bindir": "bin"}, "postgres_bindir: 'bin' is not absolute"),
        ({"postgres_bindir": ""}, "postgres_bindir: neither this nor postgres_module_load is set"),
        ({"postgres_bindir": "", "postgres_module_load": "module load PostgreSQL/0"},
         "postgres_module_load: 'module load PostgreSQL/0' failed in a login shell: .*PostgreSQL/0"),
        ({"postgres_bindir": "", "postgres_module_load": "PATH=/usr/bin:/bin"},
         "postgres_module_load: '.*' adds no program postgres to the PATH; set postgres_bindir"),
        ({"postgres_python": str(bare)}, f"No module named ensurepip .{bare} cannot make environments with pip: set p"),
        ({"postgres_python_provider": "conda"}, "postgres_python_provider: conda with .* no conda packages"),
    ]
    check_refused(here, {**here.variables, "ansible_connection": "local", **settings}, given, tmp_path)


def test_text_is_what_it_says(mini: Target) -> None:
    """Ansible treats values of ``-e`` as text."""
    switches = "server_chain=false server_pooler=false server_proxy=true server_wait=false postgres_tls=false"
    text = f"{switches} databases_upgrade_schema=true databases_workers=40 postgres_networks=10.0.0.0/8,samenet"

    played = mini.play("hpc_db", None, "--check", "--diff", f"--extra-vars={text}")

    assert played.returncode == 0, played.stdout
    written = dict(re.findall(r'^\+ {4}"(\w+)": (.*?),?$', played.stdout, re.MULTILINE))
    assert written["chain"] == "false" and written["successor"] == "{}" and written["pooler"] == "{}"
    assert written["proxy"] == "{"  # and more
    assert re.search(r"^\+max_connections = 140$", played.stdout, re.MULTILINE)
    assert re.search(r"^\+host .* 10.0.0.0/8 scram-sha-256", played.stdout, re.MULTILINE)
    assert not re.search(r"^\+(ssl_cert_file|hostssl) ", played.stdout, re.MULTILINE)
    assert re.search(r"^postgresql\+psycopg2:///\?service=\w+$", played.stdout, re.MULTILINE)
