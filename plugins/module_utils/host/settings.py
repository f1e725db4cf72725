# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor's settings: the file host/settings.json, written by hpc_db.yml, with types and defaults."""

from typing import Any, Dict

from . import files
from .layout import Layout
from .lease import DEFAULT_TTL

# Memory in MB besides shared_buffers and connections: PostgreSQL's own processes, the supervisor and a dump. Measured.
BASE_MB = 128
# Each value gets the type of its default, since ansible-core before 2.19 writes numbers as text. On each run, a name
# that with the prefix server_ is a setting gets that setting's value, and the others up to "proxy" a derived one
# (_plan.py). The rest is for tests, and for an older file.
DEFAULTS: Dict[str, Any] = {
    "lease_ttl": DEFAULT_TTL,
    # Maximum restarts of PostgreSQL, or of a sidecar, within 10 minutes.
    "restarts": 5,
    # Seconds between the scheduler's signal and the walltime.
    "stop_notice": 120,
    # When the successor may take over: a time after the start of the job, or a share of its walltime; "" at its end.
    "handover_after": "50%",
    # Where the server runs: in a "job" of its own, or in the jobs of the "workers".
    "placement": "job",
    # For the workers' jobs: how many candidates wait actively, PostgreSQL's cache, and how many workers there may be.
    "candidates": 3,
    "workers_shared_buffers": "512MB",
    "workers": 100,
    "dump_minutes": 60.0,
    "dump_keep": 5,
    "chain": False,
    "bin_dir": "",
    "advertise": "",
    "config": "",
    "cluster": "",
    "databases": [],
    "service": {},
    "pooler": {},
    "proxy": {},
    # Time limits in seconds for a start with crash recovery, and for a shutdown.
    "start_patience": 300.0,
    "stop_patience": 60.0,
    # Seconds that running transactions get before a stop: Optuna's take milliseconds, and a cancelled job may have only
    # ten seconds.
    "drain_seconds": 5.0,
    # Seconds between two checks that PostgreSQL accepts writes.
    "probe_seconds": 10.0,
    "service_file": "~/.pg_service.conf",
}


def read_settings(root: str) -> Dict[str, Any]:
    """Return the settings of an instance. If there are none, raise FileNotFoundError naming the playbook to run."""
    path = Layout(root).settings
    held = files.read_json(path)
    if held is None:
        raise FileNotFoundError("%s is missing; run the playbook hpc_db.yml first" % path)
    return complete(dict(held, root=root))


def complete(held: Dict[str, Any]) -> Dict[str, Any]:
    """Return the settings, converted to their types, with defaults for missing ones."""
    found = dict(held)
    for name, default in DEFAULTS.items():
        value = held.get(name)
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        found[name] = default if value is None else type(default)(value) if number else value
    return found
