# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's inventories: real roles write the job, and a real sbatch checks its options.

Also an inventory written by the playbook discover.yml.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.module_utils.host.scheduler import Queue
from ansible_collections.mala.hpc_db.plugins.module_utils.host.schedulers.slurm import parse_time
from target import CLUSTER, ROOT, Target

# Each site: settings that the user fills in, and partitions with their longest walltimes from the cluster's own pages;
# those of rosi5 and of JURECA are not published.
SITES: dict[str, tuple[dict, dict[str, str]]] = {
    "barnard": ({"server_job_options": {"account": "p_number_crunch"}}, {}),
    "example": ({"server_job_options": {"partition": "batch"}}, {"batch": "1-00:00:00"}),
    "frontier": ({"server_job_options": {"account": "abc123"}}, {"extended": "1-00:00:00"}),
    "hemera5": ({}, {"defq": "7-00:00:00"}),
    "jureca": ({"hpc_db_project": "slts"}, {"dc-cpu": "1-00:00:00"}),
    "lumi": ({"hpc_db_project": "project_465000001"}, {"small": "3-00:00:00"}),
    "perlmutter": ({"hpc_db_project": "m1234"}, {}),
    "rosi5": ({"server_job_options": {"time": "24:00:00"}}, {"gpu-v100": "1-00:00:00"}),
}
# Job options that the collection itself sets; and options of every site that Slurm checks without accounting.
OWN = {"dependency", "job-name", "no-requeue", "open-mode", "output", "parsable", "signal"}
JUDGED = {"constraint", "cpus-per-task", "mem", "nodes", "partition", "time"}

COMMANDS = "sbatch scancel scontrol sinfo squeue srun"
NEW = "/opt/slurm/bin"


@pytest.fixture(scope="module")
def slurm_lines() -> list[str]:
    """Configure nodes as large as the sites', in name only."""
    return ["NodeName=c[1-2] CPUs=128 RealMemory=600000 Feature=cpu State=UNKNOWN"]


def settings_of(name: str) -> dict:
    """Return an inventory's variables for its one host; tests/unit reads them with Ansible."""
    folder = ROOT / "inventories" / name
    (host,) = yaml.safe_load((folder / "hosts.yml").read_text())["hpc_db"]["hosts"].values()
    return {**yaml.safe_load((folder / "group_vars" / "all.yml").read_text()), **host}


@pytest.fixture(scope="module")
def sites(mini: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The files that the roles have written for each cluster, all on the login node of the test cluster."""
    state = mini.environment["HPC_DB_CLUSTER"]
    here = {
        "ansible_host": "login", "ansible_user": "alice", "ansible_ssh_common_args": f"-F {state}/ssh_config",
        "ansible_control_path_dir": f"{state}/control", "ansible_ssh_private_key_file": f"{state}/id_ed25519",
        "ansible_ssh_args": "-o ControlMaster=auto -o ControlPersist=60s",
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    hosts = {}
    for name, (filled, _partitions) in SITES.items():
        settings = settings_of(name)
        options = {**settings["server_job_options"], **filled.get("server_job_options", {})}
        root = {} if "instance_root" in settings else {"instance_root": f"~/sites/{name}"}
        hosts[name] = {**settings, **filled, **root, **here, "server_job_options": options}

    partitions = {partition: limit for _filled, some in SITES.values() for partition, limit in some.items()}
    as_root = [f"scontrol create partition={partition} nodes=ALL maxtime={limit} state=up" for partition, limit in
               partitions.items()]
    folders = "/global/cfs/cdirs /p/project1 /project"
    for host, script in ("ctl", "; ".join(["set -e", *as_root])), ("login", f"mkdir -p -m 1777 {folders}"):
        subprocess.run([str(CLUSTER), "exec", "--state", state, host, "--", "sh", "-c", script], check=True)

    inventory = tmp_path_factory.mktemp("sites") / "hosts.json"
    inventory.write_text(json.dumps({"hpc_db": {"hosts": hosts}}))
    command = ["ansible-playbook", f"--inventory={inventory}", "--forks=4", "tests/integration/job_script.yml"]
    played = subprocess.run(
        command, cwd=ROOT, env=mini.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )
    assert played.returncode == 0, played.stdout
    return hosts


@pytest.fixture(scope="module")
def submitted(mini: Target, sites: dict[str, dict]) -> dict[str, list[str]]:
    """The sbatch call for each cluster's successor, as the supervisor will run it."""
    text = mini.run("find ~/sites /project /p /global -name settings.json -exec cat {} + | tr -d '\\n' || true")
    decoder, found = json.JSONDecoder(), {}
    while text.strip():
        settings, end = decoder.raw_decode(text.strip())
        text = text.strip()[end:]
        found[settings["cluster"]] = Queue(settings, "1").successor_command()
    assert set(found) == set(SITES)
    return found


def words(output: str) -> str:
    """Return the output in one line."""
    return " ".join(output.replace("''", "'").split())


def judge(mini: Target, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Return sbatch's verdict on each of these jobs, without submitting one."""
    lines = [f"{shlex.join([call[0], '--test-only', *call[1:]])} 2>&1 | tr '\\n' ' '; echo" for call in commands]
    said = mini.run("\n".join(lines)).splitlines()
    assert len(said) == len(commands)
    return [(0 if " to start at " in line else 1, line) for line in said]


def test_slurm_takes_every_clusters_job(mini: Target, sites: dict[str, dict], submitted: dict[str, list[str]]) -> None:
    heads = mini.run(f"head --quiet --lines=2 {shlex.join(command[-1] for command in submitted.values())}")
    assert heads.count("#!/bin/sh\n# Written by mala.hpc_db: the server job of") == len(SITES)
    for (name, command), (code, said) in zip(submitted.items(), judge(mini, list(submitted.values()))):
        assert code == 0, f"{name}: {said}"
        asked = {flag.lstrip("-").partition("=")[0] for flag in command[1:-1]} - OWN
        wanted = {key for key, value in sites[name]["server_job_options"].items() if value is not False}
        assert wanted <= asked <= wanted | {"mem"}, name
        # Slurm accepts a job above the limit, but never starts it.
        asked_time = parse_time(sites[name]["server_job_options"]["time"]) or 0
        assert all(asked_time <= (parse_time(limit) or 0) for limit in SITES[name][1].values()), name
        assert "FILL_IN" not in " ".join(command)


def test_slurm_would_refuse_a_wrong_option(mini: Target, submitted: dict[str, list[str]]) -> None:
    wrong = []
    for command in submitted.values():
        wrong.append([command[0], "--no-such-option=1", *command[1:]])
        for index, flag in enumerate(command):
            key, equals, _value = flag.partition("=")
            if equals and key.lstrip("-") in JUDGED:
                wrong.append([*command[:index], f"{key}=no such", *command[index + 1:]])

    results = judge(mini, wrong)

    assert len(wrong) > 4 * len(submitted)
    assert [(call, said) for call, (code, said) in zip(wrong, results) if code == 0] == []


def test_what_is_to_be_filled_in_is_refused_before_anything_connects(mini: Target) -> None:
    # Nothing listens there: a playbook that connects would report that.
    nowhere = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    jureca = Target([Path("inventories/jureca")], [], mini.environment)

    played = jureca.play("hpc_db", nowhere)

    assert played.returncode == 2
    said = re.findall(r"^ +msg: (.*(?:\n {8,}.*)*)", played.stdout, re.MULTILINE)
    assert len(said) == 1, played.stdout
    assert " ".join(said[0].split()).strip("'") == (
        "ansible_user: FILL_IN must be replaced by your own value, in inventories/jureca/hosts.yml line 8: your user "
        "name there, such as surname1; hpc_db_project: FILL_IN must be replaced by your own value, in "
        "inventories/jureca/group_vars/all.yml line 17: your project, as `jutil user projects` lists it there"
    )
    assert "unreachable=0" in played.stdout


def test_all_goes_over_the_connection_that_was_opened_by_hand(mini: Target, tmp_path: Path) -> None:
    state = mini.environment["HPC_DB_CLUSTER"]
    options = settings_of("jureca")["ansible_ssh_args"].replace("~/.ssh", state)
    by_hand = ["ssh", "-F", f"{state}/ssh_config", *shlex.split(options)]
    settings = {
        "ansible_host": "login", "ansible_user": "alice", "ansible_ssh_args": options,
        # Only alice has a key; other users cannot log in.
        "ansible_ssh_common_args": f"-F {state}/ssh_config -o PubkeyAuthentication=no",
    }
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": {"site": settings}}}))
    ask = ["ansible", f"--inventory={tmp_path}/hosts.json", "site", "--module-name=raw", "--args=echo in as $USER"]

    def answer() -> str:
        return subprocess.run(ask, cwd=ROOT, env=mini.environment, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=120, check=False).stdout

    subprocess.run([*by_hand, "alice@login", "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, timeout=60, check=True)
    over_it = answer()
    subprocess.run([*by_hand, "-O", "exit", "alice@login"], capture_output=True, timeout=60, check=True)

    assert "in as alice" in over_it
    assert "UNREACHABLE" in answer()


@pytest.fixture
def elsewhere(mini: Target) -> Iterator[str]:
    """Remove Slurm's commands from every user's PATH, on all nodes."""
    def everywhere(script: str) -> None:
        for host in ("login", "c1", "c2"):
            command = [str(CLUSTER), "exec", "--state", mini.environment["HPC_DB_CLUSTER"], host, "--", "sh", "-c"]
            subprocess.run([*command, f"set -e; {script}"], check=True)

    everywhere(f"mkdir -p {NEW}; cd /usr/bin; mv {COMMANDS} {NEW}")
    yield NEW
    everywhere(f"cd {NEW}; mv {COMMANDS} /usr/bin")


def test_a_discovered_inventory_works(mini: Target, elsewhere: str, bindir: Path, tmp_path: Path) -> None:
    written, state = tmp_path / "found", mini.environment["HPC_DB_CLUSTER"]
    login = Target([Path("login,")], mini.shell, mini.environment)
    settings = {
        "discover_name": "found", "discover_folder": str(written), "ansible_user": "alice",
        "ansible_ssh_common_args": f"-F {state}/ssh_config", "ansible_control_path_dir": f"{state}/control",
        "postgres_channels": ["file:///srv/channel"], "postgres_python_wheelhouse": "/srv/wheels",
    }
    job = {**settings, "discover_submit_job": "true"}

    lost = login.play("discover", settings)
    mini.run(f"echo 'PATH=$PATH:{elsewhere}' > .bash_profile")
    tried = login.play("discover", settings, "--check")
    assert (lost.returncode, tried.returncode) == (2, 0), lost.stdout + tried.stdout
    assert not written.exists()
    before = mini.run("ls -A")
    played = login.play("discover", job)
    again = login.play("discover", settings)

    assert "no compute node was checked; allow a short job with -e discover_submit_job=true" in tried.stdout
    assert re.search(r"msg: .login: sbatch is not on the PATH, nor on that of a login shell( \(found qsub of a "
                     r"scheduler that discover.yml does not support\))?; set its folder with -e server_bin_dir=",
                     words(lost.stdout))
    assert played.returncode == 0, played.stdout
    assert mini.run("ls -A") == before
    assert again.returncode == 2
    assert f"discover_folder: {written} is not allowed; a new folder, since an existing one" in words(again.stdout)
    text = (written / "group_vars" / "all.yml").read_text()
    settings = yaml.safe_load(text)
    assert settings["server_bin_dir"] == elsewhere
    assert settings["server_job_options"] == {
        "partition": "work", "time": "04:00:00", "mem": "16G", "cpus-per-task": 4,
    }
    assert (settings["postgres_channels"], "postgres_staged" in settings) == (["file:///srv/channel"], False)
    assert re.search(r"^# Compute node c[12]: Python 3\.\d+\.\d+, \w+; /tmp can be written ", text, re.MULTILINE)
    assert "# The login node reaches it by its name; another compute node does [a job]" in text
    assert re.search(r"^#   HOME /home/alice: \w+, .* free, seen by c[12]; ", text, re.MULTILINE)

    # Decide the lines marked "choose"; an installed PostgreSQL is the quickest.
    chosen = {
        "databases_workers: 100": "databases_workers: 20",
        "postgres_provider: rattler":
            f"postgres_provider: system\npostgres_bindir: {bindir}\npostgres_major: {bindir.parts[-2]}",
        "  mem: 16G": "  mem: 1000M",
    }
    for before, after in chosen.items():
        assert f"\n{before} # choose" in text
        text = text.replace(before, after)
    (written / "group_vars" / "all.yml").write_text(text)
    found = Target([written], mini.shell, mini.environment)
    checked = found.play("hpc_db", None, "--check")
    hosted = found.play("hpc_db")

    assert (checked.returncode, hosted.returncode) == (0, 0), checked.stdout + hosted.stdout
    assert re.search(r"^\[found\] hpc_db: serving on c[12]:5432 after ", hosted.stdout, re.MULTILINE)
    assert "\npostgresql+psycopg2:///?service=hpc_db\n" in hosted.stdout
