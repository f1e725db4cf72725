# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Print the errors of a worker in various failures; run as the owner, with the Python of the instance.

    worker_errors.py INSTANCE STATE    serving, or stopped
"""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
import time
import warnings
from collections.abc import Iterator

import optuna
import psycopg2
import sqlalchemy
from sqlalchemy.dialects import plugins

INSTANCE, STATE = sys.argv[1:]
URL = f"postgresql+psycopg2:///?service={INSTANCE}"
PASSFILE = os.path.expanduser(f"~/hpc_db/{INSTANCE}/secrets/pgpass")


@contextlib.contextmanager
def tried(what: str) -> Iterator[None]:
    """Print the error raised inside; there must be one."""
    try:
        yield
    except Exception as error:
        print(f"{what}: {type(error).__module__}.{type(error).__qualname__}: {error}")
    else:
        sys.exit(f"{what}: no error")


def connect(url: str = URL) -> None:
    sqlalchemy.create_engine(url).connect().close()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def wait_for_slots() -> None:
    """Closed connections take time to end."""
    limit = time.monotonic() + 100
    while True:
        try:
            with contextlib.closing(psycopg2.connect(f"service={INSTANCE}")) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = current_user")
                if cursor.fetchone()[0] < 10:
                    return
        except psycopg2.OperationalError:
            pass  # there is no slot yet
        if time.monotonic() > limit:
            sys.exit("the connections have not ended")
        time.sleep(0.2)


def with_plugin() -> sqlalchemy.engine.Engine:
    """Return an engine with the client package, which is on the path but not installed."""
    plugins.register("hpc_db", "hpc_db_client.plugin", "HpcDb")
    return sqlalchemy.create_engine(f"{URL}&plugin=hpc_db&hpc_db_patience=1")


def as_owner(statement: str) -> None:
    """Run a statement with the owner's privileges."""
    user = getpass.getuser()
    with contextlib.closing(psycopg2.connect(f"service={INSTANCE} user={user} dbname={user}")) as connection:
        connection.autocommit = True
        connection.cursor().execute(statement)


def while_serving() -> None:
    """Provoke the errors of a worker while the server is running."""
    study = optuna.create_study(storage=URL, study_name="errors")
    with tried("old URL"):
        connect(f"postgresql:///?service={INSTANCE}")
    with tried("no plugin"):
        connect(f"{URL}&plugin=hpc_db")
    with tried("password"), environment("PGPASSWORD", "wrong"):
        connect()
    os.chmod(PASSFILE, 0o644)
    with tried("open password file"):
        connect()
    os.chmod(PASSFILE, 0o600)
    with tried("other database"):
        connect(f"postgresql+psycopg2:///nope?service={INSTANCE}")
    with tried("no TLS"):
        connect(f"{URL}&sslmode=disable")
    with tried("refused"):
        connect(f"{URL}&host=127.0.0.1&port=1")
    with tried("name"):
        connect(f"{URL}&host=c1.invalid")
    with tried("slots"):
        connections = []
        while True:
            connections.append(psycopg2.connect(f"service={INSTANCE}"))
    for connection in connections:
        connection.close()
    wait_for_slots()
    with tried("study is there"):
        optuna.create_study(storage=URL, study_name="errors")
    trial = study.ask()
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    with tried("failed trial"):
        study.tell(trial, 1.0)
    engine = sqlalchemy.create_engine(URL)
    put = sqlalchemy.text("UPDATE alembic_version SET version_num = :version")
    with engine.begin() as connection:
        version = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        connection.execute(put, {"version": "v3.0.0.d"})
    with tried("old tables"):
        optuna.load_study(storage=URL, study_name="errors")
    with engine.begin() as connection:
        connection.execute(put, {"version": version})
    with tried("server ends"), engine.connect() as connection:
        pid = connection.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
        with sqlalchemy.create_engine(URL).connect() as other:
            other.execute(sqlalchemy.text(f"SELECT pg_terminate_backend({pid}, 60000)"))
        connection.execute(sqlalchemy.text("SELECT 1"))
    engine = with_plugin()
    with engine.connect() as connection:
        database = connection.scalar(sqlalchemy.text("SELECT current_database()"))
    engine.dispose()
    as_owner(f"ALTER DATABASE {database} SET hpc_db.generation = 'errors'")
    with tried("other data"):
        engine.connect()
    as_owner(f"ALTER DATABASE {database} RESET hpc_db.generation")


def while_stopped() -> None:
    """Connect while the server is stopped."""
    with tried("no server"):
        connect()
    with tried("no server, with the plugin"):
        with_plugin().connect()


warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
{"serving": while_serving, "stopped": while_stopped}[STATE]()
