# Copyright: mala.hpc_db contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Text from a cluster, made safe for a terminal, for a comment, and for YAML that Ansible reads as an inventory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Callable

# Ansible evaluates an inventory's string that contains one of these.
TEMPLATE = re.compile(r"\{[{%#]")
# Amounts of memory such as 16G.
SIZE = re.compile(r"[1-9][0-9]*[KMGT]")


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with unprintable characters escaped, such as ``\x1b``, except those in ``keep``.

    These are line breaks, control characters, which a terminal obeys, characters that change the direction of writing,
    and bytes that are not valid text.
    """
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def one_line(said: object) -> str:
    """Return an error in one line for a terminal: its text may come from programs of the cluster."""
    return printable(" ".join(str(said).splitlines()))


def printable_data(value: Any, convert: Callable[[str], str] = printable) -> Any:
    """Apply ``convert`` to every text in lists and dictionaries."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, Mapping):
        return {printable_data(key, convert): printable_data(each, convert) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_data(each, convert) for each in value]
    return value


def encodable_data(value: Any) -> Any:
    r"""Return a module's result with lone surrogates escaped, such as ``\ud800``, because Ansible cannot read them."""
    return printable_data(value, lambda text: text.encode("utf-8", "backslashreplace").decode())


def yaml_data(value: Any, setting: str) -> str:
    """Return a value as YAML that Ansible reads back as the same data; raise ValueError if that is impossible."""
    data = _checked(value, setting)
    if isinstance(data, str) and SIZE.fullmatch(data):
        return data  # the common form
    return json.dumps(data, ensure_ascii=False)  # JSON is YAML, and it quotes every text


def _checked(value: Any, setting: str) -> Any:
    if isinstance(value, Mapping):
        return {_checked(key, setting): _checked(each, setting) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked(each, setting) for each in value]
    if isinstance(value, str) and (not value.isprintable() or TEMPLATE.search(value)):
        raise ValueError(
            f"{setting}: '{printable(value)}' is not allowed in an inventory; allowed are printable characters, "
            "without {{, {% and {#"
        )
    return value
