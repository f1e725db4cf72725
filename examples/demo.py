# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo of `make demo`: runs the playbook on this machine, then four workers on one study with the printed URL."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 4
TRIALS = 40

RESULT = """
import optuna, sys
study = optuna.load_study(storage=sys.argv[1], study_name=sys.argv[2])
states = [trial.state.name.lower() for trial in study.trials]
new = [trial.state.name.lower() for trial in study.trials if trial.datetime_start.timestamp() >= float(sys.argv[3])]
print("trials:     " + ", ".join(f"{new.count(state)} {state}" for state in sorted(set(new))))
if len(new) < len(states):
    print(f"study:      {len(states)} trials, including earlier runs")
print(f"best value: {study.best_value:.4f} in trial {study.best_trial.number}")
print("with:       " + ", ".join(f"{name} = {value:.3f}" for name, value in study.best_params.items()))
"""


class Place(NamedTuple):
    """The working directory and the arguments of the commands that a user would type."""

    folder: Path
    inventory: str
    added: str  # the demo's own inventory, in addition to that one
    playbook: str

    def command(self, name: str) -> list[str]:
        """Return the command that a user would type to run a playbook."""
        program = Path(sys.executable).with_name("ansible-playbook")
        return [str(program), "-i", self.inventory, "-i", self.added, self.playbook.format(name)]


def installed(folder: Path, name: str) -> Place:
    """Return the place of a user who has installed the collection; copies the inventory there."""
    shutil.copytree(ROOT / "inventories" / "local", folder / "local", dirs_exist_ok=True)
    return Place(folder, "local", name, "mala.hpc_db.{}")


def checkout(name: str) -> Place:
    """Return this checkout, with an additional inventory for an instance of that name."""
    return Place(ROOT, "inventories/local", f".cache/inventories/{name}", "playbooks/{}.yml")


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Wait for another run of the same user, also from another checkout, since both use the same instance."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mala.hpc_db"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run of the demo: {Path(lock.name).read_text()}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        print(f"process {os.getpid()} in {ROOT}", end="", file=lock, flush=True)
        yield


def owner(name: str) -> str:
    """Return the user who owns the demo's server. For root, create a user, since PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    user = f"hpc-db-{name}"
    try:
        pwd.getpwnam(user)
    except KeyError:
        print(f"PostgreSQL does not run as root: creating the user {user} (userdel -r {user} removes it)")
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", user], check=True)
    return user


def home_of(user: str) -> str:
    """Return the home directory of the server's owner."""
    return pwd.getpwnam(user).pw_dir if os.geteuid() == 0 else os.path.expanduser("~")


def as_user(user: str, command: list[str]) -> list[str]:
    """Return the command that runs ``command`` as this user."""
    return command if os.geteuid() else ["runuser", "-u", user, "--", *command]


def usable_python(user: str) -> str:
    """Return a Python that this user may run: other users cannot access the one in root's home."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        # from /, since the user may have no access to our working directory
        tried = subprocess.run(as_user(user, [python, "-c", "import venv"]), cwd="/", capture_output=True)
        if tried.returncode == 0:
            return python
    sys.exit(f"make demo: the user {user} cannot run Python; install python3 for all users")


def write_inventory(folder: Path, name: str, user: str) -> None:
    """Write the differences to inventories/local: a named study, pinned packages, and for root the demo's user."""
    pins = (ROOT / "requirements" / "cluster.txt").read_text().splitlines()
    packages = [line for line in pins if not line.startswith(("#", " ", "pip==", "py-rattler=="))]
    variables: dict[str, object] = {
        "instance_name": name,
        "databases_studies": [{"name": "studies", "studies": [{"name": "demo"}]}],
        "postgres_python_packages": packages,
    }
    if os.geteuid() == 0:
        become = {"ansible_become": True, "ansible_become_user": user, "ansible_become_method": "su"}
        variables.update(become, ansible_python_interpreter=usable_python(user))
    folder.mkdir(parents=True, exist_ok=True)
    # JSON is YAML
    content = {"hpc_db": {"hosts": {"localhost": variables}}}
    (folder / "hosts.yml").write_text(json.dumps(content, indent=2) + "\n")


def provision(place: Place) -> str:
    """Run the playbook, pass its output on, and return the URL that it prints."""
    url = ""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = place.command("hpc_db")
    with subprocess.Popen(command, cwd=place.folder, env=environment, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("postgresql+psycopg2://"):
                url = line.strip()
    if running.returncode or not url:
        sys.exit(running.returncode or "the playbook printed no URL")
    return url


def optimise(name: str, user: str, url: str) -> None:
    """Run workers that share the study, as jobs on a cluster would; then print the result."""
    python = os.path.join(home_of(user), "hpc_db", name, "python", "bin", "python")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        script = shutil.copy(ROOT / "examples" / "study.py", folder)
        os.chmod(script, 0o644)
        command = as_user(user, [python, script, url, "demo", str(TRIALS // WORKERS)])
        environment = {**os.environ, "HOME": home_of(user)}
        began = time.time()
        workers = [subprocess.Popen(command, cwd="/", env=environment) for _each in range(WORKERS)]
        ends = [worker.wait() for worker in workers]
        if any(ends):
            sys.exit("a worker failed; see above")
    result = as_user(user, [python, "-c", RESULT, url, "demo", str(began)])
    subprocess.run(result, cwd="/", env=environment, check=True)


def main() -> None:
    """Run the demo with the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--installed", type=Path, metavar="FOLDER", help="a folder for the inventory, outside of any "
                        "checkout: the playbooks are then those of the installed collection")
    parser.add_argument("--name", default="demo", help="the instance's")
    given = parser.parse_args()
    with only_one(given.name):
        run(given.name, given.installed)


def run(name: str, folder: Path | None) -> None:
    """Start the server, run the workers, and print further commands."""
    place = installed(folder, name) if folder else checkout(name)
    user = owner(name)
    write_inventory(place.folder / place.added, name, user)
    url = provision(place)
    print(f"{WORKERS} workers share {TRIALS} trials of one study through {url}", flush=True)
    optimise(name, user, url)
    for what, verb in [("look further", "status"), ("in a browser", "dashboard"), ("stop it", "stop")]:
        program, *arguments = place.command(verb)
        print(f"{what + ':':14} {os.path.relpath(program, place.folder)} {' '.join(arguments)}")
    again = " ".join(sys.argv) if folder or name != "demo" else "make demo"
    print(f"run again:     {again}   (reuses everything and continues the study)")


if __name__ == "__main__":
    main()
