# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Report the packages of a worker's environment, and try to connect. Run by that environment's own Python.

    PYTHON probe.py URL    prints one JSON object

Optuna is not imported, since that takes seconds: its version and the revisions of its schema are read from its files.
"""

import glob
import importlib.util
import json
import os
import re
import sys

REVISION = re.compile(r"""^(down_)?revision(?:: .*)? = ["']([^"']+)""", re.MULTILINE)
SCHEMA = "SELECT library_version, version_num FROM version_info, alembic_version"
# Every role may read these numbers; pg_stat_activity hides other roles' sessions.
CONNECTIONS = "SELECT sum(numbackends)::int, current_setting('max_connections') FROM pg_stat_database"


def version_of(name):  # type: (str) -> str
    """Return the version of an installed distribution; empty if there is none."""
    metadata = importlib.import_module("importlib.metadata")  # since Python 3.8
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def optuna_revisions():  # type: () -> list
    """Return the schema revisions that the installed Optuna knows: first the one it needs, the others unordered."""
    spec = importlib.util.find_spec("optuna")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = os.path.join(list(spec.submodule_search_locations)[0], "storages", "_rdb", "alembic", "versions")
    steps = []
    for path in glob.glob(os.path.join(glob.escape(folder), "*.py")):
        with open(path, encoding="utf-8") as stream:
            steps.append(dict(REVISION.findall(stream.read())))
    known = [step[""] for step in steps if "" in step]
    before = [step.get("down_") for step in steps]
    return sorted(known, key=lambda revision: revision in before)


def look(url):  # type: (str) -> dict
    """Return the packages' versions, and the result of ``connect``."""
    said = {"python": ".".join(str(number) for number in sys.version_info[:3])}  # type: dict
    if sys.version_info < (3, 8):
        return said
    for name in ("sqlalchemy", "optuna", "hpc-db-client"):
        said[name] = version_of(name)
    said["revisions"] = optuna_revisions()
    try:
        import psycopg2

        said["driver"] = psycopg2.__version__.split()[0]
        said["libpq"] = psycopg2.__libpq_version__
    except Exception as error:  # a missing library may raise any exception
        said["driver"], said["why"] = "", " ".join(str(error).split())
        return said
    if said["sqlalchemy"]:
        said.update(connect(url))
    return said


def connect(url):  # type: (str) -> dict
    """Connect with this URL as a worker does; return the connections and the schema, or the error."""
    try:
        import sqlalchemy

        engine = sqlalchemy.create_engine(url, connect_args={"application_name": "hpc_db doctor"})
        with engine.connect() as connection:
            used, largest = connection.execute(sqlalchemy.text(CONNECTIONS)).first()
            said = {"used": used - 1, "max_connections": int(largest), "schema": []}
            there = connection.execute(sqlalchemy.text("SELECT to_regclass('alembic_version')")).scalar()
            if there:
                said["schema"] = list(connection.execute(sqlalchemy.text(SCHEMA)).first())
        engine.dispose()
        return said
    except Exception as error:  # any reason why a worker cannot connect
        return {"error": " ".join(str(getattr(error, "orig", None) or error).split())}


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
