# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Setup for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Run the tests in a home directory of their own, and with the signal handlers of a program on a terminal."""
    show = "import json, os; print(json.dumps({**os.environ}))"
    command = [str(ROOT / "tools" / "apart"), sys.executable, "-c", show]
    environment = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    # A shell ignores SIGINT for background programs, and all processes that the tests start would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, a skipped test counts as failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
