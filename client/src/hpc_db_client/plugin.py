# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""The plugin that SQLAlchemy loads for ``?plugin=hpc_db``: takes settings from the URL and sets pool and dialect."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.engine import URL, CreateEnginePlugin, Engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

# Longer than a takeover after a node failure (minutes), but short enough that a node does not idle for long in vain.
PATIENCE_SECONDS = 600.0
LONGEST_PATIENCE_SECONDS = 7 * 86400.0
# Limit while a server job is queued: one night. A lost result costs more than an idle worker.
MAX_WAIT_SECONDS = 12 * 3600.0
PREFIX = "hpc_db_"
SETTINGS = {"hpc_db_patience": PATIENCE_SECONDS, "hpc_db_max_wait": MAX_WAIT_SECONDS}
DRIVERS = ("psycopg2", "psycopg")


class HpcDb(CreateEnginePlugin):  # type: ignore[misc]
    """The plugin; SQLAlchemy makes one object for each call of ``create_engine``."""

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        unknown = sorted(name for name in url.query if name.startswith(PREFIX) and name not in SETTINGS)
        if unknown:
            raise ArgumentError(f"{unknown[0]}: not a setting of the plugin hpc_db; allowed are {', '.join(SETTINGS)}")
        self._seconds = {name: _seconds(name, url.query.get(name, default)) for name, default in SETTINGS.items()}
        base = url.get_dialect()
        self._driver = base.driver
        is_async = kwargs.get("_is_async") or getattr(base, "is_async", False)
        if base.name != "postgresql" or self._driver not in DRIVERS or is_async:
            given = "create_async_engine" if is_async else f"{url.drivername}://"
            raise ArgumentError(
                f"the plugin hpc_db works with postgresql+psycopg2:// and postgresql+psycopg://, not {given}"
            )
        if kwargs.get("pool") is not None:
            raise ArgumentError("pool: not allowed with the plugin hpc_db; set poolclass, pool_size and the like")
        self._url = url.difference_update_query(["plugin", *SETTINGS])

    def update_url(self, url: URL) -> URL:
        """Return the URL without our settings and with our dialect."""
        name = f"{PREFIX}{self._driver}"
        registry.register(f"postgresql.{name}", f"hpc_db_client.with_{self._driver}", "Dialect")
        return url.difference_update_query([*SETTINGS]).set(drivername=f"postgresql+{name}")

    def handle_dialect_kwargs(self, dialect_cls: type, dialect_args: dict[str, Any]) -> None:
        """Pass the limits for an outage, the service and a description of the server to the dialect."""
        service, host = self._url.query.get("service"), self._url.host or self._url.query.get("host")
        dialect_args.update(self._seconds, hpc_db_service=service if isinstance(service, str) else "")
        if isinstance(host, tuple):
            host = ", ".join(host)
        dialect_args["hpc_db_server"] = f"service {service}" if service else f"host {host}" if host else "default host"

    def handle_pool_kwargs(self, pool_cls: type, pool_args: dict[str, Any]) -> None:
        """Make the pool check connections before use; allow as many in use as without the plugin."""
        pool_args["pre_ping"] = True
        self._keeps_all = "pool_size" in pool_args
        if issubclass(pool_cls, QueuePool):
            # A thread that waits for another thread's connection may thereby wait for the server.
            pool_args.setdefault("timeout", 30 + max(self._seconds.values()))

    def engine_created(self, engine: Engine) -> None:
        """Wrap the pool's connections, and restore the user's URL."""
        engine.dialect.keep_up(engine.pool)
        if self._keeps_all:
            engine.pool.at_rest = None
        engine.url = self._url


def _seconds(name: str, given: object) -> float:
    try:
        seconds = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_PATIENCE_SECONDS:
        raise ArgumentError(f"{name}: {given!r} is not allowed; seconds from 0 to {LONGEST_PATIENCE_SECONDS:.0f}")
    return seconds
