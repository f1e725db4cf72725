# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The instance directory: every path below it that Python code uses."""

import os


class Layout:
    """The paths of one instance. Programs that run in its folder ``host`` use ``..`` as the root."""

    def __init__(self, root: str) -> None:
        def below(*names: str) -> str:
            return os.path.join(root, *names)

        self.root = root
        # The supervisor, its settings, and the job script; written by hpc_db.yml.
        self.host = below("host")
        self.package = below("host", "hpc_db_host")
        self.settings = below("host", "settings.json")
        # The state of the running server, and its lease; written by the supervisor.
        self.run = below("run")
        self.endpoint = below("run", "endpoint.json")
        self.state = below("run", "state.json")
        # A successor's request for the lease, and the holder's answer.
        self.request = below("run", "request.json")
        self.answer = below("run", "answer.json")
        self.temporary_server = below("run", "bootstrap.json")
        # Whether the workers' jobs may start the server.
        self.wanted = below("run", "wanted.json")
        # A file that candidates write to learn the file server's time.
        self.clock = below("run", "clock.json")
        self.local_job = below("run", "local_job.json")
        # The state after the last full run of hpc_db.yml, for its quick check.
        self.recorded_state = below("run", "kept.json")
        self.log = below("log")
        self.job_log = below("log", "job.log")
        self.temporary_server_log = below("log", "bootstrap.log")
        self.events = below("log", "events.jsonl")
        # PostgreSQL's configuration, data, passwords and dumps.
        self.conf = below("conf")
        self.hba = below("conf", "pg_hba.conf")
        self.certificate = below("conf", "server.crt")
        self.key = below("conf", "server.key")
        self.data = below("data")
        self.pgpass = below("secrets", "pgpass")
        self.dumps = below("dumps")

    def settings_of(self, major: int) -> str:
        """Return the settings file for a move to another major version; it becomes ``settings`` at the end."""
        return os.path.join(self.host, "settings-%d.json" % major)

    def place(self, number: int) -> str:
        """Return the file of one of the candidates that wait actively, in the workers' jobs."""
        return os.path.join(self.run, "candidate.%d" % number)

    def stop_request(self, job: str) -> str:
        """Return the file that asks a job to stop with ``{"stop": true}``, for schedulers that can only kill jobs."""
        return os.path.join(self.run, "stop.%s" % job)
