# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Print a digest of a database for comparison: python rows.py URL.

For each table, the number of rows and a digest of all of them, as Python reads them; for each study, the data that
Optuna reads.
"""

import hashlib
import sys

import optuna
import sqlalchemy


def digest(lines: "list[str]") -> str:
    """Return a digest of the lines that ignores their order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def in_order(value: object) -> object:
    """Return a dictionary's items sorted by name, since the database returns attributes in any order."""
    return sorted(value.items()) if isinstance(value, dict) else value


def main() -> None:
    """Print one line for each table and each study."""
    url = sys.argv[1]
    engine = sqlalchemy.create_engine(url)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        for name, table in sorted(tables.tables.items()):
            rows = [repr(tuple(row)) for row in connection.execute(sqlalchemy.select(table))]
            print(name, len(rows), digest(rows))
    for name in optuna.get_all_study_names(url):
        study = optuna.load_study(storage=url, study_name=name)
        trials = [repr([in_order(value) for _field, value in sorted(vars(trial).items())]) for trial in study.trials]
        best = [(trial.number, trial.values) for trial in study.best_trials]
        print(repr(name), len(trials), digest(trials), repr(in_order(study.user_attrs)), best)


if __name__ == "__main__":
    main()
