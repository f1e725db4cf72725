# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    """Options for the connection to the instance's PostgreSQL."""

    DOCUMENTATION = r"""
options:
  host:
    description: Host name of the server, or folder of its unix socket.
    type: str
    required: true
  port:
    description: Port of the server.
    type: int
    required: true
  user:
    description: PostgreSQL role to connect as.
    type: str
    required: true
  passfile:
    description: Password file of libpq on the target, mode 0600. Its content never leaves the target.
    type: path
    required: true
  tls:
    description:
      - Require TLS with channel binding for connections over the network.
      - If V(false), passwords are only sent with SCRAM, but a rogue server on the same port could relay the login.
    type: bool
    default: true
attributes:
  action_group:
    description: Use C(group/mala.hpc_db.postgresql) in C(module_defaults) to set these options for several tasks.
    support: full
    membership: [mala.hpc_db.postgresql]
requirements:
  - psycopg2
"""
