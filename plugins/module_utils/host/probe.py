# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Report the packages of a worker's environment, and try to connect. Run by that environment's own Python.

    PYTHON probe.py URL    prints one JSON object

That Python finds optuna_schema in this file's folder.
"""

import json
import sys

if __package__:
    from . import optuna_schema
else:
    import optuna_schema  # type: ignore

# Every role may read these numbers; pg_stat_activity hides other roles' sessions.
CONNECTIONS = "SELECT sum(numbackends)::int, current_setting('max_connections') FROM pg_stat_database"


def look(url):  # type: (str) -> dict
    """Return the packages' versions, and the result of ``connect``."""
    said = {"python": ".".join(str(number) for number in sys.version_info[:3])}  # type: dict
    if sys.version_info < (3, 8):
        return said
    for name in ("sqlalchemy", "optuna", "hpc-db-client"):
        said[name] = optuna_schema.version_of(name)
    optuna = optuna_schema.installed_optuna()
    said["revisions"] = optuna.revisions if optuna else []
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
            if all(connection.execute(sqlalchemy.text(optuna_schema.HAS_SCHEMA)).first()):
                said["schema"] = list(connection.execute(sqlalchemy.text(optuna_schema.SCHEMA)).first())
        engine.dispose()
        return said
    except Exception as error:  # any reason why a worker cannot connect
        return {"error": " ".join(str(getattr(error, "orig", None) or error).split())}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look(sys.argv[1])) + "\n")
