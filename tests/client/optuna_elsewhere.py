# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pytest plugin for Optuna's own tests: replaces SQLite by the storage at ELSEWHERE.

That is a URL, or the directory of an instance with a storage proxy.
"""

from __future__ import annotations

import os
from typing import Any

import optuna
from optuna.storages import RDBStorage, _CachedStorage
from optuna.testing import storages

ELSEWHERE = os.environ["ELSEWHERE"]
IS_URL = "://" in ELSEWHERE
MODES = ["sqlite", "cached_sqlite"] if IS_URL else ["grpc_rdb"]

# Optuna's tests take these lists from there.
storages.STORAGE_MODES[:] = MODES
storages.STORAGE_MODES_HEARTBEAT[:] = ["sqlite", "cached_sqlite"] if IS_URL else []
_enter, _leave = storages.StorageSupplier.__enter__, storages.StorageSupplier.__exit__


def enter(self: Any) -> Any:
    """Give a test the storage, without any study in it."""
    if self.storage_specifier not in MODES:
        return _enter(self)
    if not IS_URL:
        from hpc_db_client import proxy

        self.storage = proxy.storage(ELSEWHERE, patience=60)
    else:
        self.storage = RDBStorage(ELSEWHERE, **self.extra_args)
        if self.storage_specifier == "cached_sqlite":
            self.storage = _CachedStorage(self.storage)
    for study in self.storage.get_all_studies():
        self.storage.delete_study(study._study_id)
    return self.storage


def leave(self: Any, *error: Any) -> None:
    """Close the storage of a test."""
    if self.storage_specifier == "grpc_rdb" and not IS_URL:
        self.storage.close()
    else:
        _leave(self, *error)


storages.StorageSupplier.__enter__, storages.StorageSupplier.__exit__ = enter, leave
optuna.logging.set_verbosity(optuna.logging.WARNING)
