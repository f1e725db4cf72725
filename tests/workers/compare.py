# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare a study with the workers' logs: python compare.py URL STUDY LOG...

Every acknowledged trial must be in the database exactly once, complete and with its value.
"""

import sys

import optuna


def main() -> int:
    """Print a summary; exit with 1 and the differences if there are any."""
    url, name, *paths = sys.argv[1:]
    acknowledged = {}
    for path in paths:
        with open(path, encoding="utf-8") as log:
            for line in log:
                number, value, host = line.split()
                if number in acknowledged:
                    print(f"trial {number} was acknowledged twice")
                    return 1
                acknowledged[number] = (float(value), host)
    trials = optuna.load_study(storage=url, study_name=name).trials
    complete = {str(trial.number): trial.value for trial in trials if trial.state.name == "COMPLETE"}
    lost = [number for number, (value, _host) in acknowledged.items() if complete.get(number) != value]
    doubled = len(trials) - len({trial.number for trial in trials})
    hosts = sorted({host for _value, host in acknowledged.values()})
    others = [trial.state.name for trial in trials if trial.state.name != "COMPLETE"]
    print(
        f"acknowledged={len(acknowledged)} complete={len(complete)} lost={len(lost)} doubled={doubled} "
        f"running={others.count('RUNNING')} failed={others.count('FAIL')} hosts={hosts}"
    )
    return 1 if lost or doubled else 0


if __name__ == "__main__":
    sys.exit(main())
