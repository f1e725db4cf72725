# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conda channel over HTTP with injected faults: ``channel_server.py FOLDER``, in a folder of its own.

The first word of a URL's path selects the fault: ``login`` requires a password, ``busy-NAME`` is unavailable while
``NAME/log`` has less than two lines, ``scarce-NAME`` lacks packages while it has less than three, ``held-NAME`` stops
before a package of PostgreSQL while that file exists.
The port is written to the file ``port`` here, the requested paths to ``asked``.
"""

from __future__ import annotations

import base64
import functools
import io
import sys
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

ALLOWED = "Basic " + base64.b64encode(b"alice:secret").decode()


class Channel(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        mood, _slash, rest = self.path[1:].partition("/")
        kind, _dash, name = mood.partition("-")
        with Path("asked").open("a") as asked:
            asked.write(f"{self.path}\n")
        if kind == "login" and self.headers.get("Authorization") != ALLOWED:
            self.send_error(401)
            return None
        enough = 2 if kind == "busy" else 3 if kind == "scarce" and rest.endswith(".conda") else 0
        if enough and len(Path(name, "log").read_text().splitlines()) < enough:
            self.send_error(503)
            return None
        while kind == "held" and "/postgresql-" in rest and Path(mood).exists():
            time.sleep(0.05)
        self.path = f"/{rest}"
        return super().send_head()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Channel, directory=sys.argv[1]))
    Path("asked").touch()
    Path("port.new").write_text(str(server.server_port))
    Path("port.new").rename("port")
    server.serve_forever()
