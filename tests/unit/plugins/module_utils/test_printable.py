# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Text from a cluster, made safe for one line, for a page and for YAML."""

import json

import pytest
import yaml
from ansible_collections.mala.hpc_db.plugins.module_utils import _conda, _lock, _printable, _report


@pytest.mark.parametrize("text, shown", [
    ("plain \u03a9 'x' \\ \U0001f600", "plain \u03a9 'x' \\ \U0001f600"), ("a\nb\r\tc", r"a\nb\r\tc"),
    ("\x1b[2J", r"\x1b[2J"),
    ("\x00\x7f\x9b", r"\x00\x7f\x9b"), ("\u202ex\u2028\u200b", r"\u202ex\u2028\u200b"), ("\udc80", r"\udc80"), ("", ""),
])
def test_text_is_in_one_line(text, shown):
    assert _printable.printable(text) == shown
    assert _printable.printable_data({text: [text, 1, None, True, (text,)]}) == {shown: [shown, 1, None, True, [shown]]}


def test_result_can_be_encoded_and_is_the_same_otherwise():
    given = {"a\ud800\n": ["\udc80", "\0 \u03a9", 1.5, None, {"x": ("\ud83d",)}]}

    shown = _printable.encodable_data(given)

    assert shown == {"a\\ud800\n": ["\\udc80", "\0 \u03a9", 1.5, None, {"x": ["\\ud83d"]}]}
    json.dumps(shown, ensure_ascii=False).encode()


def test_why_something_failed_is_in_one_line():
    assert _printable.one_line(ValueError("sbatch: no\nmore \x1b[2J")) == r"sbatch: no more \x1b[2J"


@pytest.mark.parametrize("value", [
    "", "x", "yes", "null", "1", "12:30:00", "a: b # c", "- x", "!unsafe x", "*x", "'\"\\", "\u03a9 \U0001f600", 1,
    None, True, False, ["a", {"b: c": ["#"]}], {}, "16G",
])
def test_value_is_the_same_in_yaml(value):
    assert yaml.safe_load(f"setting: {_printable.yaml_data(value, 'setting')} # a comment") == {"setting": value}


@pytest.mark.parametrize("text", ["a\nb", "\r", "\x1b", "\u2028", "\u202e", "\udc80", "{{ x }}", "{% x", "{# x"])
@pytest.mark.parametrize("wrap", [str, lambda text: [text], lambda text: {"a": [text]}, lambda text: {text: 1}])
def test_value_that_is_no_data_is_refused(wrap, text):
    with pytest.raises(ValueError, match="^bin_dir: '.*' is not allowed in an inventory") as refused:
        _printable.yaml_data(wrap(text), "bin_dir")
    assert str(refused.value).isprintable()


def test_a_report_has_no_character_that_is_not_seen():
    assert _report.table([("<x>", "a\x1b\u202e\nb")]) == (
        r"<table><tbody><tr><th>&lt;x&gt;</th><td>a\x1b\u202e\nb</td></tr></tbody></table>"
    )


def test_a_lock_file_has_no_character_that_is_not_seen():
    record = {"name": "x", "version": "1", "build": "0", "url": "file:///c\x1b/noarch/x-1-0.conda", "sha256": 64 * "a"}

    with pytest.raises(_conda.CondaError, match="cannot be locked"):
        _lock.lock_text([record], "linux-64")
