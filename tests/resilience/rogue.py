# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rogue server on a port that a real one had: python rogue.py PORT [CERTIFICATE KEY].

It speaks enough of PostgreSQL's protocol to ask each client for its password in clear text, and prints as
hexadecimal digits what it got after the start-up packet. With a certificate it offers TLS.
"""

import socket
import ssl
import struct
import sys

SSL_REQUEST = 80877103
CLEAR_TEXT_PASSWORD = struct.pack("!cII", b"R", 8, 3)


def packet(client: socket.socket) -> bytes:
    """Read a packet of the kind that has no type, which a connection begins with."""
    length = client.recv(4, socket.MSG_WAITALL) if not isinstance(client, ssl.SSLSocket) else client.recv(4)
    return client.recv(struct.unpack("!I", length)[0] - 4) if len(length) == 4 else b""


def trick(client: socket.socket, tls: "ssl.SSLContext | None") -> bytes:
    """Ask for the password; return what came."""
    start = packet(client)
    while len(start) == 4 and struct.unpack("!I", start)[0] != 196608:  # asks for TLS, or for GSS
        wants_tls = struct.unpack("!I", start)[0] == SSL_REQUEST
        client.sendall(b"S" if wants_tls and tls else b"N")
        if wants_tls and tls:
            client = tls.wrap_socket(client, server_side=True)
        start = packet(client)
    if not start:
        return b""
    client.sendall(CLEAR_TEXT_PASSWORD)
    return client.recv(1000)


def main() -> None:
    """Serve until killed."""
    port, *certificate = sys.argv[1:]
    tls = None
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*certificate)
    with socket.create_server(("", int(port))) as server:
        print("listens", flush=True)
        while True:
            client = server.accept()[0]
            client.settimeout(5)
            try:
                got = trick(client, tls)
            except OSError:
                got = b""
            print("got", got.hex(), flush=True)
            client.close()


if __name__ == "__main__":
    main()
