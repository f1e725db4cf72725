# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command lines of sshfs, ssh and fusermount, and the meaning of their errors."""

from __future__ import annotations

import os
import re
import shlex
from typing import Callable, NamedTuple

HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
HOP = re.compile(rf"(?:{USER.pattern}@)?(?:[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?")
# ssh expands these characters in a value, or ends the value there.
SPECIAL = re.compile(r'["\\%$]')


class Refused(Exception):
    """The settings cannot be applied; nothing was changed."""


class Failed(Exception):
    """The mount cannot be brought to the wanted state; the message is for the user."""


class Wanted(NamedTuple):
    """The wanted mount."""

    source: str
    options: list[str]  # sshfs's options, without its name, the source and the mount point
    ssh: list[str]  # arguments of sshfs's call of ssh, without the program, the host last


# --- checks of values; each returns the value in the format of sshfs or ssh


def _flag(value: str) -> str:
    return _one_of(value.lower(), "true", "false")


def _yes_no(value: str) -> str:
    return {"true": "yes", "false": "no"}.get(value.lower()) or _one_of(value, "yes", "no")


def _one_of(value: str, *allowed: str) -> str:
    if value not in allowed:
        raise ValueError(" or ".join(allowed))
    return value


def _number(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,5}", value):
        raise ValueError("a whole number up to 99999")
    return value


def _port(value: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", value) or int(value) > 65535:
        raise ValueError("1 to 65535")
    return value


def _family(value: str) -> str:
    return _one_of(value, "any", "inet", "inet6")


def _name(value: str) -> str:
    if not HOST.fullmatch(value):
        raise ValueError("a name of letters, digits and ._-")
    return value


def _names(value: str) -> str:
    if not re.fullmatch(r"[a-z-]+(?:,[a-z-]+)*", value) or value.startswith("-"):
        raise ValueError("words separated by commas")
    return value


def _user(value: str) -> str:
    if not USER.fullmatch(value):
        raise ValueError("letters, digits and ._@+-, with no dash first")
    return value


def _path(value: str) -> str:
    """Quote a path, because ssh would end it at a space."""
    path = os.path.abspath(os.path.expanduser(value))
    if not value or SPECIAL.search(value) or not value.isprintable():
        raise ValueError('a path without " \\ % $ and line breaks')
    return f'"{path}"'


def _hops(value: str) -> str:
    if value != "none" and not all(HOP.fullmatch(hop) for hop in value.split(",")):
        raise ValueError("[user@]host[:port], separated by commas")
    return value


# Allowed options of a mount and of its connection, with the check of each value.
MOUNT_OPTIONS: dict[str, Callable[[str], str]] = {
    "auto_cache": _flag, "compression": _yes_no, "dcache_timeout": _number, "dir_cache": _yes_no,
    "follow_symlinks": _flag, "noexec": _flag, "transform_symlinks": _flag,
}
SSH_OPTIONS: dict[str, Callable[[str], str]] = {
    "AddressFamily": _family, "CertificateFile": _path, "Compression": _yes_no, "GlobalKnownHostsFile": _path,
    "GSSAPIAuthentication": _yes_no, "GSSAPIDelegateCredentials": _yes_no, "HostKeyAlias": _name, "HostName": _name,
    "IdentitiesOnly": _yes_no, "IdentityAgent": _path, "IdentityFile": _path, "Port": _port,
    "PreferredAuthentications": _names, "ProxyJump": _hops, "PubkeyAuthentication": _yes_no, "User": _user,
    "UserKnownHostsFile": _path,
}
# A mount sets these itself or does not need them.
LEFT_OUT = (
    "BatchMode ConnectTimeout ConnectionAttempts ControlMaster ControlPath ControlPersist ForwardAgent ForwardX11"
    " LogLevel RequestTTY ServerAliveCountMax ServerAliveInterval StrictHostKeyChecking TCPKeepAlive"
).split()
LEFT_OUT_FLAGS = ["-A", "-a", "-q", "-T", "-t", "-v", "-vv", "-vvv", "-X", "-x", "-Y"]
FLAGS = {"-4": ("AddressFamily", "inet"), "-6": ("AddressFamily", "inet6"), "-C": ("Compression", "yes")}
FLAGS_WITH_VALUE = {"-i": "IdentityFile", "-J": "ProxyJump", "-l": "User", "-p": "Port"}


def check(setting: str, name: str, value: object, known: dict[str, Callable[[str], str]]) -> str:
    """Return the value of a known option in the format of ssh or sshfs; raise Refused for any other option."""
    if name not in known:
        raise Refused(f"{setting}: {name!r} is not among the options known here: {', '.join(sorted(known))}")
    try:
        return known[name](str(value))
    except ValueError as error:
        raise Refused(f"{setting}: {name} is {str(value)!r}; allowed is {error}") from None


def read_ssh_arguments(text: str) -> tuple[str | None, dict[str, str]]:
    """Return the ``-F`` file and the options in arguments of ssh, as in ``ansible_ssh_common_args``.

    As in ssh, the first occurrence of an option counts.
    """
    setting = "ssh_arguments"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Refused(f"{setting}: {text!r} cannot be split into words: {error}") from None
    config: str | None = None
    options: dict[str, str] = {}
    while words:
        word = words.pop(0)
        flag = word[:2]
        if word in LEFT_OUT_FLAGS:
            continue
        if word in FLAGS:
            name, value = FLAGS[word]
        elif flag in ("-F", "-o", *FLAGS_WITH_VALUE):
            name, value = FLAGS_WITH_VALUE.get(flag, ""), word[2:] or (words.pop(0) if words else "")
        else:
            raise Refused(f"{setting}: {word!r} is not an ssh argument that a mount supports: -F, -J, -o, …")
        if flag == "-F":
            config = config or os.path.expanduser(value)
            continue
        if flag == "-o":
            name, value = split_option(value)
        if name == "ProxyCommand":
            raise Refused(f"{setting}: ProxyCommand runs a program; use ProxyJump, or set it in a file for ssh_config")
        if name not in LEFT_OUT:
            options.setdefault(name, check(setting, name, value, SSH_OPTIONS))
    return config, options


def split_option(text: str) -> tuple[str, str]:
    """Return name and value of an option of ssh: ``Name=value``, ``name value`` or ``Name="value"``."""
    name, value = re.fullmatch(r"\s*(\w*)\s*=?\s*(.*?)\s*", text, re.DOTALL).groups()  # type: ignore[union-attr]
    spelled = {known.lower(): known for known in (*SSH_OPTIONS, *LEFT_OUT, "ProxyCommand")}
    quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return spelled.get(name.lower(), name), value[1:-1] if quoted else value


def plan(params: dict) -> Wanted:
    """Return the wanted mount; raise Refused for ambiguous values."""
    host, folder = params["host"], params["folder"]
    if not HOST.fullmatch(host):
        raise Refused(f"host: {host!r} is not allowed; letters, digits and ._-, or an address")
    if not folder.isprintable():
        raise Refused(f"folder: {folder!r} has a line break or another character that cannot be printed")
    for name, least in (("alive_interval", 1), ("alive_count", 1), ("connect_timeout", 1), ("timeout", 1)):
        if params[name] < least:
            raise Refused(f"{name}: {params[name]} is too little; allowed is {least} or more")
    config, ssh_options = read_ssh_arguments(params["ssh_arguments"])
    given = {
        "User": ("user", params["user"]), "Port": ("port", params["port"]),
        "IdentityFile": ("identity_file", params["identity_file"]),
        "ProxyJump": ("proxy_jump", ",".join(params["proxy_jump"]) if params["proxy_jump"] else None),
    }
    for name, (setting, value) in given.items():
        if value is not None:
            ssh_options[name] = check(setting, name, value, SSH_OPTIONS)
    config = params["ssh_config"] or config
    # For a jump host, ssh inserts this name unquoted into a shell command.
    if config and not re.fullmatch(r"[\w./+@=,:-]+", config):
        raise Refused(f"ssh_config: {config!r} cannot be passed on by ssh; allowed are letters, digits and ./+@=,:_-")
    if config and (not os.path.exists(config) or os.path.isdir(config)):
        raise Refused(f"ssh_config: the file {config!r} does not exist")
    file = ["-F", os.path.abspath(config)] if config else []

    user = f"{ssh_options.pop('User')}@" if "User" in ssh_options else ""
    address = f"[{host}]" if ":" in host else host
    ssh_options = {**connection(params), **ssh_options}
    # sshfs has its own name for one of them.
    options = [f"{'port' if name == 'Port' else name}={value}" for name, value in ssh_options.items()]
    return Wanted(
        f"{user}{address}:{remote_folder(folder)}",
        [*file, *(word for option in [*mount_options(params), *options] for word in ("-o", escape(option)))],
        [*file, *(f"-o{name}={value}" for name, value in ssh_options.items()), "--", f"{user}{host}"],
    )


def remote_folder(folder: str) -> str:
    """Return the folder for sftp, which starts in the home and has no ~. With the final slash, links are followed."""
    path = re.sub(r"^~(?:/+|$)", "", folder) or "."
    return path if path.endswith("/") else f"{path}/"


def connection(params: dict) -> dict[str, str]:
    """Return ssh's options against hanging, against questions, and against unknown host keys.

    Without the first three, and sshfs's ``reconnect``, a mount whose link was down hangs, even 40 s after the link is
    back. With 3, 2 and 5 there is an error after 6.7 to 8.5 s, and the mount works 0.4 to 1.1 s after the link (sshfs
    3.7.3).
    """
    shared = {} if params["share_connection"] else {"ControlMaster": "no", "ControlPath": "none"}
    return {
        "ServerAliveInterval": str(params["alive_interval"]), "ServerAliveCountMax": str(params["alive_count"]),
        "ConnectTimeout": str(params["connect_timeout"]), "BatchMode": "yes", "StrictHostKeyChecking": "yes", **shared,
    }


def mount_options(params: dict) -> list[str]:
    """Return sshfs's own options."""
    options = ["reconnect", f"idmap={params['idmap']}", *(["ro"] if params["read_only"] else [])]
    for name, value in sorted(params["options"].items()):
        text = check("options", name, value, MOUNT_OPTIONS)
        options += [name] if text == "true" else [] if text == "false" else [f"{name}={text}"]
    return options


def escape(option: str) -> str:
    """Return a value of ``-o`` with its commas escaped, since a comma would begin another option."""
    return re.sub(r"([\\,])", r"\\\1", option)


def check_path(path: str) -> None:
    """Refuse a mount point that is ambiguous in tables of mounts."""
    if not os.path.isabs(path) or not path.isprintable() or os.path.normpath(path) in ("/", "//"):
        raise Refused(f"path: {path!r} is not allowed; a path that begins with / or ~, without line breaks")


# --- commands


def mount_command(sshfs: str, wanted: Wanted, path: str) -> list[str]:
    """Return the call that mounts; it ends once the mount exists, and leaves a process that serves it."""
    return [sshfs, wanted.source, path, *wanted.options]


def unmount_command(program: str, path: str, lazily: bool) -> list[str]:
    """Return the call that unmounts with ``fusermount3``, or with ``umount`` on macOS.

    ``lazily`` also unmounts while processes use the mount or hang in it.
    """
    if os.path.basename(program) == "umount":
        return [program, *(["-f"] if lazily else []), path]
    return [program, "-u", *(["-z"] if lazily else []), path]


def try_command(wanted: Wanted) -> list[str]:
    """Return the call that opens and closes the same connection as sshfs, because sshfs hides ssh's messages."""
    return ["ssh", "-o", "LogLevel=ERROR", "-s", *wanted.ssh, "sftp"]


def is_served_by(arguments: list[str], source: str | None, path: str) -> bool:
    """Return whether these are the arguments of an sshfs that serves ``path``, even one started by hand."""
    if not arguments or os.path.basename(arguments[0]) != "sshfs":
        return False
    # On macOS spaces between arguments cannot be distinguished from spaces within them.
    if path in arguments or f" {path} -" in " ".join(arguments):
        return True
    # A mount point without a leading slash is relative to a folder that is no longer known.
    relative = [os.path.normpath(each).lstrip("./") for each in arguments[1:] if not each.startswith(("/", "-"))]
    return source in arguments and any(each and path.endswith(f"/{each}") for each in relative)


# --- their messages


# The setting to change, the message, and its meaning.
MEANINGS = (
    ("host", r"HOST IDENTIFICATION HAS CHANGED",
     "{host} has another host key than the one known here and is refused: the connection may be intercepted; ask its "
     "administrators, and only if they changed it forget the old one: ssh-keygen -R {host}"),
    ("host", r"key is known for|Host key verification failed|strict checking",
     "the host key of {host}, or of a host on the way there, is not known here, and is refused: log in once with ssh, "
     "and compare the fingerprint with the one that its administrators publish"),
    ("identity_file", r"Permission denied \(",
     "{host} requires a key: load one into ssh-agent, or set its file"),
    ("host", r"Could not resolve hostname", "cannot resolve the name of {host}, or of a host on the way there"),
    ("host", r"timed out|No route to host|Network is unreachable|Connection refused", "{host} cannot be reached"),
    ("host", r"[Ss]ubsystem request failed", "{host} has no sftp, which sshfs needs"),
    ("folder", r"Permission denied", "{source} may not be read"),
    ("path", r"failed to exec fusermount|fusermount\S*: not found", "FUSE is not complete: install the package fuse3"),
    ("path", r"fuse: device not found|/dev/fuse|mount failed: Operation not permitted",
     "FUSE cannot be used here: the kernel has to offer /dev/fuse, to a container as well"),
    ("path", r"no write access to mountpoint", "the mount point is not yours to write to"),
    ("folder", r"No such file or directory|Not a directory", "the folder {source} does not exist"),
)


def explain(said: str, host: str, source: str) -> str:
    """Return the message of ssh or sshfs in one line, preceded by a remedy if one is known."""
    for setting, pattern, meaning in MEANINGS:
        found = next((line for line in said.splitlines() if re.search(pattern, line)), None)
        if found:
            return f"{setting}: {meaning.format(host=host, source=source)} ({' '.join(found.strip('@').split())})"
    return f"host: {' '.join(said.split()) or 'sshfs failed without a message'}"
