# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Workers that wait while their PostgreSQL server moves or restarts: ``?plugin=hpc_db`` in SQLAlchemy's URL."""
