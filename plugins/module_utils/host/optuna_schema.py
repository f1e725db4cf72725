# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The schema of Optuna's tables: the one in a database, and those that an installed Optuna knows.

Optuna is not imported, since that takes seconds: its version and the revisions of its schema are read from its files.
"""

import glob
import importlib.util
import os
import re
from typing import List, NamedTuple, Optional

# Since Optuna 0.9 the migrations of its schema are in these files.
REVISIONS = "storages/_rdb/alembic/versions/*.py"
REVISION = re.compile(r"""^(down_)?revision(?:: .*)? = ["']([^"']+)""", re.MULTILINE)

HAS_SCHEMA = "SELECT to_regclass('version_info'), to_regclass('alembic_version')"
SCHEMA = "SELECT library_version, version_num FROM version_info, alembic_version"


class Optuna(NamedTuple):
    """The installed Optuna: its version, and the schema revisions that it knows, the required one first."""

    version: str
    revisions: List[str]


class Schema(NamedTuple):
    """A schema in a database: the version of Optuna that created or upgraded it, and its revision."""

    library: str
    revision: str


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution; empty if there is none. Needs Python 3.8."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def installed_optuna() -> Optional[Optuna]:
    """Return the Optuna that this interpreter would import; None if there is none. Needs Python 3.8."""
    spec = importlib.util.find_spec("optuna")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = next(iter(spec.submodule_search_locations))
    steps = []
    for path in glob.glob(os.path.join(glob.escape(folder), REVISIONS)):
        with open(path, encoding="utf-8") as stream:
            steps.append(stream.read())
    return Optuna(version_of("optuna"), newest_first(steps))


def newest_first(steps: List[str]) -> List[str]:
    """Return the revisions in the texts of Optuna's migration files, the newest first."""
    found = [dict(REVISION.findall(step)) for step in steps]
    before = {step[""]: step.get("down_") for step in found if "" in step}
    chain = sorted(set(before) - set(before.values()))[-1:]
    while chain and before.get(chain[-1]):
        chain.append(str(before[chain[-1]]))
    return chain


def is_older(schema: Schema, optuna: Optuna) -> bool:
    """Return whether the installed Optuna needs an upgrade of the schema."""
    return schema.revision in optuna.revisions[1:]


def is_newer(schema: Schema, optuna: Optuna) -> bool:
    """Return whether the schema is unknown to the installed Optuna; false if Optuna's revisions are unreadable."""
    return bool(optuna.revisions) and schema.revision not in optuna.revisions
