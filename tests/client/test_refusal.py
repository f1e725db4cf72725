# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An error that waiting cannot solve is raised at once, in whatever language the server and libpq report it."""

from __future__ import annotations

import contextlib
import locale
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from hpc_db_client import refusal
from hpc_db_client.refusal import english, is_futile
from sqlalchemy.exc import OperationalError

PASSWORD = "Passwort-Authentifizierung für Benutzer »study« fehlgeschlagen"
STARTING = "das Datenbanksystem startet"
SSL, GSS = 80877103, 80877104  # the requests that libpq may send before the user name


def refuse(severity: str, state: str, words: str) -> bytes:
    """Return the message of a server with other lc_messages, in the protocol's format."""
    fields = {"S": severity, "V": "FATAL", "C": state, "M": words}
    said = b"".join(name.encode() + value.encode() + b"\0" for name, value in fields.items()) + b"\0"
    return b"E" + struct.pack("!i", len(said) + 4) + said


@pytest.fixture
def foreigner() -> Iterator[Callable[..., int]]:
    """Start a server that refuses every connection with these messages; return its port."""
    with contextlib.ExitStack() as stack:

        def start(severity: str, state: str, words: str) -> int:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=serve, args=(server, refuse(severity, state, words)), daemon=True).start()
            stack.callback(server.shutdown, socket.SHUT_RDWR)
            return server.getsockname()[1]

        yield start


def serve(server: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection = server.accept()[0]
        except OSError:  # the test has ended
            return
        with connection:
            asked = b""
            while not asked or struct.unpack("!ii", asked[:8])[1] in (SSL, GSS):
                if asked:
                    connection.sendall(b"N")
                asked = connection.recv(1024)
            connection.sendall(answer)


@pytest.mark.parametrize("severity, state, words", [
    ("FATAL", "28P01", PASSWORD), ("ВАЖНО", "28000", "нет записи в pg_hba.conf"),
    ("致命错误", "3D000", '数据库 "study" 不存在'), ("NGHIÊM TRỌNG", "28P01", "sai mật khẩu"),
])
def test_what_a_server_says_in_another_language_is_told_at_once(
    severity: str, state: str, words: str, driver: str, foreigner: Callable[..., int],
) -> None:
    url = f"postgresql+{driver}://study:x@127.0.0.1:{foreigner(severity, state, words)}/study"

    with pytest.raises(OperationalError, match=words) as told:
        sqlalchemy.create_engine(f"{url}?plugin=hpc_db&hpc_db_patience=60").connect()

    assert "did not come back" not in str(told.value)


@pytest.mark.parametrize("state, words", [("57P03", STARTING), ("53300", "tut mir leid, schon zu viele Verbindungen")])
def test_what_passes_is_waited_for_in_another_language_as_well(
    state: str, words: str, driver: str, foreigner: Callable[..., int],
) -> None:
    url = f"postgresql+{driver}://study:x@127.0.0.1:{foreigner('FATAL', state, words)}/study"

    with pytest.raises(OperationalError, match=f"did not come back within 0.3 s .*{words}"):
        sqlalchemy.create_engine(f"{url}?plugin=hpc_db&hpc_db_patience=0.3").connect()


def test_error_without_a_server_is_judged_by_its_words() -> None:
    assert is_futile(OSError('connection to server at "x" failed: fe_sendauth: no password supplied'))
    assert not is_futile(OSError('connection to server at "x" failed: Connection refused'))


def test_python_without_ctypes_connects_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some Pythons were built without libffi's headers."""
    monkeypatch.setattr(refusal, "ctypes", None)

    with pytest.raises(OSError, match="FATAL") as told, english():
        raise OSError("FATAL:  verweigert")
    refusal.note_state(told.value, None, (), {})

    assert told.value.__context__ is None and not is_futile(told.value)


def test_c_library_speaks_english_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does libpq. On a machine without German this only shows that nothing else changes."""
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], check=False)
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    usual = locale.setlocale(locale.LC_ALL)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
    try:
        before = os.strerror(2), locale.localeconv(), locale.setlocale(locale.LC_ALL)
        with english():
            assert os.strerror(2) == "No such file or directory"
        assert (os.strerror(2), locale.localeconv(), locale.setlocale(locale.LC_ALL)) == before
    finally:
        locale.setlocale(locale.LC_ALL, usual)
