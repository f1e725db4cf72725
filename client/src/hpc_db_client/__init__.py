# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""A SQLAlchemy plugin: workers wait while their PostgreSQL server moves or restarts (``?plugin=hpc_db`` in the URL)."""
