# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What `make demo` runs: the playbook on this machine, then four workers on one study through the printed URL."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the demo adds to inventories/local.
INVENTORY = ROOT / ".cache" / "demo"
WORKERS = 4
TRIALS = 40
# PostgreSQL does not run as root; as root (in a container) the demo works as this user.
DEMO_USER = "hpc-db-demo"

RESULT = """
import optuna, sys
study = optuna.load_study(storage=sys.argv[1], study_name=sys.argv[2])
states = [trial.state.name.lower() for trial in study.trials]
print("trials:     " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))))
print(f"best value: {study.best_value:.4f} in trial {study.best_trial.number}")
print("with:       " + ", ".join(f"{name} = {value:.3f}" for name, value in study.best_params.items()))
"""


def owner() -> str:
    """Return the user who owns the demo's server; as root, one that is made for it."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    try:
        pwd.getpwnam(DEMO_USER)
    except KeyError:
        print(f"PostgreSQL does not run as root: making the user {DEMO_USER} (userdel -r {DEMO_USER} removes it)")
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", DEMO_USER], check=True)
    return DEMO_USER


def as_user(user: str, command: list[str]) -> list[str]:
    """Return the command as it runs for that user."""
    return command if os.geteuid() else ["runuser", "-u", user, "--", *command]


def usable_python(user: str) -> str:
    """Return a Python that this user may run: the one below root's home is closed to others."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        # from /, since the user may not enter the folder we are in
        tried = subprocess.run(as_user(user, [python, "-c", "import venv"]), cwd="/", capture_output=True)
        if tried.returncode == 0:
            return python
    sys.exit(f"make demo: the user {user} can run no Python here; install python3 for all users")


def write_inventory(user: str) -> None:
    """Say what differs from inventories/local: a named study, pinned packages, and the user if we are root."""
    pins = (ROOT / "requirements" / "cluster.txt").read_text().splitlines()
    packages = [line for line in pins if not line.startswith(("#", " ", "pip==", "py-rattler=="))]
    variables: dict[str, object] = {
        "instance_name": "demo",
        "databases_studies": [{"name": "studies", "studies": [{"name": "demo"}]}],
        "postgres_python_packages": packages,
    }
    if os.geteuid() == 0:
        become = {"ansible_become": True, "ansible_become_user": user, "ansible_become_method": "su"}
        variables.update(become, ansible_python_interpreter=usable_python(user))
    INVENTORY.mkdir(parents=True, exist_ok=True)
    # JSON is YAML
    content = {"hpc_db": {"hosts": {"localhost": variables}}}
    (INVENTORY / "hosts.yml").write_text(json.dumps(content, indent=2) + "\n")


def playbook(name: str) -> list[str]:
    """Return the command that a user would type."""
    program = Path(sys.executable).with_name("ansible-playbook")
    return [str(program), "-i", "inventories/local", "-i", ".cache/demo", f"playbooks/{name}.yml"]


def provision() -> str:
    """Run the playbook with its output on the screen; return the URL that it prints."""
    url = ""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(playbook("hpc_db"), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("postgresql+psycopg2://"):
                url = line.strip()
    if running.returncode or not url:
        sys.exit(running.returncode or "the playbook printed no URL")
    return url


def optimise(user: str, url: str) -> None:
    """Let the workers share the study, as jobs on a cluster would; then show what they found."""
    python = os.path.join(pwd.getpwnam(user).pw_dir, "hpc_db", "demo", "python", "bin", "python")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        script = shutil.copy(ROOT / "examples" / "study.py", folder)
        os.chmod(script, 0o644)
        command = as_user(user, [python, script, url, "demo", str(TRIALS // WORKERS)])
        environment = {**os.environ, "HOME": pwd.getpwnam(user).pw_dir}
        workers = [subprocess.Popen(command, cwd="/", env=environment) for _each in range(WORKERS)]
        ends = [worker.wait() for worker in workers]
        if any(ends):
            sys.exit("a worker failed; see above")
    subprocess.run(as_user(user, [python, "-c", RESULT, url, "demo"]), cwd="/", env=environment, check=True)


def main() -> None:
    """Run the demo."""
    user = owner()
    write_inventory(user)
    url = provision()
    print(f"{WORKERS} workers share {TRIALS} trials of one study through {url}", flush=True)
    optimise(user, url)
    look, see, stop = (
        " ".join([".venv/bin/ansible-playbook", *playbook(name)[1:]]) for name in ("status", "dashboard", "stop")
    )
    print(f"\nlook further:  {look}\nin a browser:  {see}\nstop it:       {stop}")
    print("once more:     make demo   (reuses all of it)")


if __name__ == "__main__":
    main()
