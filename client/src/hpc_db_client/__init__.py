# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Workers that wait while their PostgreSQL server moves or restarts: ``?plugin=hpc_db`` in SQLAlchemy's URL."""
