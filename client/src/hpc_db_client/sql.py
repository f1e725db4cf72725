# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Decide which statements can be repeated, by an allow-list over PostgreSQL's tokens.

``judge`` examines the text that the driver gets, whether SQLAlchemy compiled it or a program wrote it. A statement is
known if it is of one of a few kinds, and if everything in it that could call a function is a known function or a
keyword. All other names may be tables, columns or types; ``catalog.py`` looks them up in the database before anything
is repeated. An unknown statement is never repeated, and its session is never replaced.
"""

from __future__ import annotations

import datetime
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

_WORDS = r"[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*"
_TOKEN = re.compile(
    rf"""
    (?P<space>[ \t\n\r\f\v]+|--[^\n\r]*)
    |(?P<comment>/\*)
    |(?P<unknown>[uU]&['"]|""(?!"))
    |(?P<escaped>[eE]')
    |(?P<string>[nNbBxX]?')
    |(?P<quoted>")
    |(?P<name>{_WORDS})
    |(?P<dollar>\$(?:[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_\u0080-\U0010ffff]*)?\$)
    |(?P<number>0[xX][0-9a-fA-F_]+|(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\$\d+)
    |(?P<placeholder>%(?:\([^()%'"]*\))?[sbt]|%%)
    |(?P<mark>::|:=|[()\[\],;:.])
    |(?P<operator>[-+*/<>=~!@\#%^&|`?])
    """,
    re.VERBOSE | re.DOTALL,
)
_NESTED = re.compile(r"/\*|\*/")
# Possible ends of literals and quoted names: an odd number of quotes, since two quotes stand for one inside.
_QUOTES = {"escaped": re.compile(r"\\.|'+", re.DOTALL), "string": re.compile("'+"), "quoted": re.compile('"+')}
# Longer texts are unknown; a text longer than MOST_REMEMBERED is judged each time.
MOST_CHARACTERS = 4 * 1024**2
MOST_TOKENS = 200_000
MOST_REMEMBERED = 8 * 1024

# Words that may precede a parenthesis and, unless quoted, cannot be the name of a function, or only of the server's
# own. (The catalog looks for a function of each name in any case.)
KEYWORDS = frozenset("""
    all and any array as asc between both by case cast coalesce collate cross default delete desc distinct do else end
    except exists extract false fetch for from full greatest group grouping having ilike in inner insert intersect into
    is isnull join lateral leading least left like limit natural not notnull null nullif offset on only or order outer
    overlaps overlay position returning right row select set setof similar some substring symmetric table tablesample
    then to trailing treat trim true union unique update using values variadic when where window with xmlelement
""".split())  # fmt: skip
# Words that could be functions, except after one of these words.
_CONTEXT = {
    "by": {"group", "order", "partition"}, "cube": {"group by"}, "delete": set(), "first": {"fetch"},
    "insert": set(), "key": {"primary", "foreign"}, "materialized": {"as", "as not"}, "next": {"fetch"},
    "rollup": {"group by"}, "sets": {"grouping"}, "update": set(), "zone": {"time"},
}
_MAY_STAND_BEFORE = KEYWORDS.difference(_CONTEXT)
# Functions that at most read, and leave no state behind.
_READING = frozenset("""
    abs acos acosh any_value array_agg array_append array_cat array_dims array_fill array_length array_lower array_ndims
    array_position array_positions array_prepend array_remove array_replace array_reverse array_sample array_shuffle
    array_sort array_to_json array_to_string array_upper ascii asin asinh atan atan2 atanh avg bigint bit bit_and
    bit_count bit_length bit_or bit_xor bool bool_and bool_or boolean broadcast btrim bytea cardinality casefold cbrt
    ceil ceiling char char_length character character_length chr col_description concat concat_ws corr cos cosd cosh cot
    count covar_pop covar_samp crc32 crc32c cume_dist current_database current_schema current_schemas current_setting
    date date_bin date_part date_trunc datemultirange daterange decimal decode degrees dense_rank div double encode
    enum_range erf erfc every exp factorial family first_value float floor format format_type gcd gen_random_uuid
    generate_series generate_subscripts get_bit get_byte has_table_privilege host hstore inet_client_addr initcap int
    int4 int4multirange int4range int8 int8multirange int8range integer interval isempty isfinite json json_agg
    json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object json_object_agg json_object_keys
    json_populate_record json_populate_recordset json_strip_nulls json_to_record json_to_recordset json_typeof jsonb
    jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object
    jsonb_each jsonb_each_text jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg
    jsonb_object_keys jsonb_path_exists jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first
    jsonb_path_query_tz jsonb_populate_record jsonb_populate_recordset jsonb_pretty jsonb_set jsonb_strip_nulls
    jsonb_to_record jsonb_to_recordset jsonb_typeof justify_days justify_hours justify_interval lag last_value lcm lead
    left length ln log log10 lower lower_inc lower_inf lpad ltrim make_date make_interval make_time make_timestamp
    make_timestamptz masklen max md5 min min_scale mod mode nchar netmask network nth_value ntile num_nonnulls num_nulls
    numeric nummultirange numnode numrange obj_description octet_length parse_ident percent_rank percentile_cont
    percentile_disc pg_collation_is_visible pg_column_size pg_database_size pg_get_constraintdef pg_get_expr
    pg_get_indexdef pg_get_partkeydef pg_get_serial_sequence pg_get_userbyid pg_get_viewdef pg_relation_size
    pg_size_pretty pg_sleep pg_table_is_visible pg_table_size pg_total_relation_size pg_type_is_visible pg_typeof
    phraseto_tsquery pi plainto_tsquery power querytree quote_ident quote_literal quote_nullable radians random
    range_agg range_intersect_agg range_merge rank real regexp_count regexp_instr regexp_like regexp_match
    regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr regr_avgx regr_avgy
    regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy repeat replace reverse right round
    row_number row_to_json rpad rtrim scale setweight sha224 sha256 sha384 sha512 shobj_description sign sin sind sinh
    smallint split_part sqrt starts_with stddev stddev_pop stddev_samp string_agg string_to_array string_to_table strip
    strpos substr sum tan tand tanh text time timestamp timestamptz timezone to_bin to_char to_date to_hex to_json
    to_jsonb to_number to_oct to_regclass to_timestamp to_tsquery to_tsvector translate trim_array trim_scale trunc
    ts_headline ts_rank ts_rank_cd tsmultirange tsrange tstzmultirange tstzrange tsvector_to_array unnest upper
    upper_inc upper_inf uuid uuidv7 var_pop var_samp varbit varchar variance varying version websearch_to_tsquery
    width_bucket
""".split())  # fmt: skip
# Clock functions that return a constant value within a transaction, but another one when it is repeated.
TRANSACTION_CLOCK = frozenset("""
    current_date current_time current_timestamp localtime localtimestamp now transaction_timestamp
""".split())
CLOCK = TRANSACTION_CLOCK | frozenset("age clock_timestamp statement_timestamp timeofday".split())
# Functions whose effects end with the transaction, or (nextval) do no harm if they happen twice.
_DOING = frozenset("""
    nextval pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_try_advisory_xact_lock
    pg_try_advisory_xact_lock_shared
""".split())
FUNCTIONS = _READING | CLOCK | _DOING
# Words that a SELECT must not contain if it only reads.
_WRITING = frozenset("delete for insert merge update".split()) | _DOING
_DEFINITIONS = {
    "create": {"index", "sequence", "table", "type", "unique"}, "alter": {"index", "sequence", "table", "type"},
    "drop": {"index", "sequence", "table", "type"}, "comment": {"on"},
}
_DEFINING = frozenset("check identity include".split())
_PARTITIONS = frozenset("hash list range".split())
_DEFINED = frozenset("exists on references table using".split())
# Literals that stand for the current time when they are cast to a date or timestamp.
TIMES = frozenset("now today tomorrow yesterday".split())
# Settings that may be changed for one transaction, since they do not affect the meaning of names.
_LOCAL = frozenset("idle_in_transaction_session_timeout lock_timeout statement_timeout timezone work_mem".split())
# Words that may begin a statement in a PL/pgSQL trigger function.
_BODY = frozenset("""
    begin delete else elsif end exception if insert null perform raise return select update when with
""".split())
_BEGINNERS = frozenset("begin else loop then".split())
LONGEST_NAME = 63  # bytes; PostgreSQL truncates longer names


class Unknown(Exception):
    """A statement is not known to be repeatable; the message says why."""


class Token(NamedTuple):
    kind: str  # as in _TOKEN; "dollar" is a whole literal
    text: str  # as the server gets it
    start: int
    end: int

    @property
    def word(self) -> str:
        """The keyword or name in lower case; "" for quoted names and other tokens."""
        return self.text.lower() if self.kind == "name" else ""

    @property
    def name(self) -> str:
        """The name as PostgreSQL looks it up, without quotes; "" for tokens that are not names."""
        if self.kind == "quoted":
            name = self.text[1:-1].replace('""', '"')
        elif self.kind == "name":
            name = re.sub("[A-Z]+", lambda found: found.group().lower(), self.text)
        else:
            return ""
        return name.encode()[:LONGEST_NAME].decode("utf-8", "ignore")


class Insert(NamedTuple):
    """Positions in an INSERT ... RETURNING where the values of the first run can be added for a repetition."""

    relation: str  # as the server gets it
    table: str
    columns: dict[str, int]  # the named columns and their positions
    first_column: int  # where another column can be added before them; 0 if no columns are named
    overriding: int  # where OVERRIDING SYSTEM VALUE can be added
    default_values: tuple[int, int]  # where DEFAULT VALUES is, if present
    rows: list[list[tuple[int, int]]]  # where the values of each row are; empty for DEFAULT VALUES
    counted: int  # where the list of SELECT begins, if sen_counter numbers the rows; else 0
    returning: list[str]  # columns; "" for other expressions
    conflict: frozenset[str]  # names in ON CONFLICT
    has_arguments: bool


class Judgement:
    """Properties of a statement, determined before it is sent."""

    __slots__ = (
        "why", "binds", "free", "head", "names", "relations", "clock", "gives", "adds", "isolates", "sequence",
        "insert", "returns", "writes",
    )

    def __init__(self) -> None:
        self.why = ""  # why the statement cannot be repeated
        self.binds = False  # it may leave state in the session
        self.free = False  # it only reads
        self.head = ""
        self.names: frozenset[str] = frozenset()
        self.relations: frozenset[str] = frozenset()  # the names that must exist in the database
        self.clock = False
        self.gives = False  # an INSERT whose rows are given
        self.adds = False  # the same, without ON CONFLICT
        self.isolates = False  # it may change the transaction's isolation level
        self.sequence = ""  # the statement only gets a key from this sequence
        self.insert: Insert | None = None
        self.returns = False
        self.writes = False  # it writes or locks rows


def tokens(text: str, has_arguments: bool = False, standard_strings: bool = True) -> list[Token]:
    """Split a text into tokens as PostgreSQL does, without spaces and comments; raise Unknown if that is uncertain."""
    found: list[Token] = []
    place, end = 0, len(text)
    while place < end:
        if end > MOST_CHARACTERS or len(found) >= MOST_TOKENS:  # guard: long texts
            raise Unknown("it is too long to be checked")
        match = _TOKEN.match(text, place)
        kind = match.lastgroup if match else "unknown"
        if match is None or kind is None or kind == "unknown":
            raise Unknown(f"{text[place:place + 10]!r} in it cannot be parsed")
        start, place = place, match.end()
        if kind == "comment":
            place = _end_of_comment(text, place)
        elif kind == "dollar":
            place = text.find(match.group(), place) + len(match.group())
            if place < start + 2 * len(match.group()):
                raise Unknown("it has an unterminated literal")
        elif kind in _QUOTES:
            place = _end_of_literal(text, place, _QUOTES[kind])
            if kind == "string" and not standard_strings and text.find("\\", start, place) >= 0:
                raise Unknown("a backslash in a literal, with standard_conforming_strings off")
            if kind == "string" and found and found[-1].kind == "escaped":
                raise Unknown("a literal in two parts")
        elif kind == "number" and place < end and (text[place].isalnum() or text[place] in "_$"):
            raise Unknown(f"{text[start:place + 5]!r} in it cannot be parsed")
        part = text[start:place]
        if has_arguments and (
            "%" in part.replace("%%", "") if kind not in ("placeholder", "operator") else part == "%"
        ):
            raise Unknown("a parameter within a literal, a name or a comment")
        if not has_arguments and kind == "placeholder":
            kind, place = "operator", start + 1
            part = "%"
        if kind not in ("space", "comment"):
            meant = part.replace("%%", "%") if has_arguments else part  # guard: percent signs in names
            found.append(Token("operator" if part == "%%" else kind, meant, start, place))
    return found


def _end_of_literal(text: str, place: int, ends: re.Pattern[str]) -> int:
    """Return the end of a literal or quoted name that began before ``place``.

    One pattern for the whole literal would need 300 bytes of memory per character.
    """
    while True:
        mark = ends.search(text, place)
        if not mark:
            raise Unknown("it has an unterminated literal")
        place = mark.end()
        if len(mark.group()) % 2:
            return place


def _end_of_comment(text: str, place: int) -> int:
    depth = 1
    while depth:
        mark = _NESTED.search(text, place)
        if not mark:
            raise Unknown("it has an unterminated comment")
        depth += 1 if mark.group() == "/*" else -1
        place = mark.end()
    return place


def judge(text: str, has_arguments: bool = False, standard_strings: bool = True) -> Judgement:
    """Return whether, and under which conditions, a statement can be repeated."""
    remembers = len(text) <= MOST_REMEMBERED
    return (_remembered if remembers else _judge)(text, has_arguments, standard_strings)


def _judge(text: str, has_arguments: bool, standard_strings: bool) -> Judgement:
    judged = Judgement()
    shown = f"({' '.join(text[:200].split())[:60]}...)"
    adds = True
    try:
        found = tokens(text, has_arguments, standard_strings)
        parts = _parts(found)
        judged.names = frozenset(each.name for each in found if each.name)
        judged.relations = _relations(found)
        judged.clock = any(each.word in CLOCK or each.text.strip("'").lower() in TIMES for each in found)
        if any(name.startswith("pg_temp") for name in judged.names):
            raise Unknown("a temporary table")
        for part in parts:
            try:
                _judge_part(judged, part, has_arguments)
            except IndexError:
                raise Unknown("it is incomplete") from None
            adds = adds and judged.adds
        if len(parts) > 1:
            judged.free = False
            judged.insert = None
            judged.sequence = ""
            judged.gives = judged.adds = adds
            if not judged.why and not adds:
                judged.why = f"several statements in one {shown}"
    except Unknown as unknown:
        judged.why = f"a statement that is not known to be repeatable: {unknown} {shown}"
        judged.binds, judged.free = True, False
    return judged


_remembered = lru_cache(maxsize=2000)(_judge)


def _relations(found: list[Token]) -> frozenset[str]:
    """Return the names in places of tables and views, or of a column (SUBSTRING), except those the statement defines.

    If the catalog does not find such a name, the database may read it differently, or it was dropped meanwhile.
    """
    named, own = set(), set()
    for place, token in enumerate(found[:-1]):
        before, after = found[place - 1], found[place + 1]
        if before.word in ("as", "with", "recursive") or (after.text == "(" and before.text == ","):
            own.add(token.name)  # an alias, a query in WITH, or a function
        elif after.word == "as" and any(
            not each.name or each.word in ("materialized", "not") for each in found[place + 2:place + 3]
        ):
            own.add(token.name)  # a query in WITH
        if token.word in ("from", "into", "join", "only", "table", "update", "using"):
            at = place + 1
            while at + 2 < len(found) and found[at + 1].text == "." and found[at].name:
                at += 2
            is_called = at + 1 < len(found) and found[at + 1].text == "(" and token.word != "into"
            if found[at].name and found[at].word not in KEYWORDS and not is_called:
                named.add(found[at].name)
    return frozenset(named - own)


def _parts(found: list[Token]) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in found:
        if token.text == ";" and token.kind == "mark":
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    return parts


def _judge_part(judged: Judgement, part: list[Token], has_arguments: bool) -> None:
    """Judge one statement of several and update ``judged``; raise Unknown."""
    if not part:
        raise Unknown("it is empty")
    words = [token.word for token in part]
    judged.head = head = next((token.word for token in part if token.text != "("), "")
    judged.adds = False
    plain = all(token.name or token.text in (".", ",") for token in part)
    if head in ("select", "insert", "update", "delete", "with", "values", "table"):
        _judge_query(judged, part, words, has_arguments)
    elif head == "show" and plain:
        judged.free = True
    elif head == "lock" and plain:
        pass
    elif plain and _is_savepoint(words):
        pass
    elif plain and words[:2] in (["set", "transaction"], ["set", "constraints"]):
        judged.isolates = words[1] == "transaction"
    elif words[:2] == ["set", "local"] and len(part) == 5 and words[2] in _LOCAL and (
        part[3].text == "=" or words[3] == "to"
    ) and part[4].kind in ("name", "string", "number"):
        pass
    elif (len(words) > 1 and words[1] in _DEFINITIONS.get(head, ())) or (head == "truncate" and plain):
        check_calls(part, definition="select" not in words)
        judged.why = judged.why or "it changes tables"
    else:
        raise Unknown("its kind is not on the allow-list")


def _is_savepoint(words: list[str]) -> bool:
    size = len(words)
    return (
        (words[0] == "savepoint" and size == 2) or (words[0] == "release" and size in (2, 3))
        or (words[:2] == ["rollback", "to"] and size in (3, 4))
    )


def _judge_query(judged: Judgement, part: list[Token], words: list[str], has_arguments: bool) -> None:
    check_calls(part)
    for place, word in enumerate(words):
        if word == "into" and words[place - 1] != "insert":
            raise Unknown("INTO creates a table")
        if words[place:place + 2] == ["current", "of"]:
            raise Unknown("a cursor")
    names = {token.name for token in part}
    judged.free = judged.head in ("select", "values", "with", "table") and not _WRITING & names
    judged.returns = "returning" in words or judged.head in ("select", "values", "with", "table")
    if not judged.free and _has_server_s_own(names):
        raise Unknown("it may change one of the server's own tables")
    if words[:2] == ["select", "nextval"] and len(part) > 3 and part[3].kind == "string":
        rest = [token.text.lower() for token in part[4:]]
        if rest[:2] == ["::", "regclass"]:
            del rest[:2]
        if rest == [")"] or (rest[:2] == [")", "as"] and len(rest) == 3):
            judged.sequence = part[3].text[1:-1].replace("''", "'")
    judged.writes = judged.writes or not (judged.free or judged.sequence)
    if judged.head == "insert" and part[0].word == "insert":
        judged.gives = given = _values_only(part, words)
        judged.adds = given and "conflict" not in words
        judged.insert = _insert(part, has_arguments)
        if judged.insert and judged.insert.counted and not given:
            judged.insert = None


def _has_server_s_own(names: Iterable[str]) -> bool:
    return any(
        (name.startswith("pg_") and not _is_of_function(name) and name != "pg_catalog") or name == "information_schema"
        for name in names
    )


def _is_of_function(name: str) -> bool:
    """Return whether a name is that of a known function, or SQLAlchemy's label for its result."""
    return name in FUNCTIONS or name.rstrip("0123456789").rstrip("_") in FUNCTIONS


def check_calls(part: Sequence[Token], definition: bool = False, also: frozenset[str] = frozenset()) -> None:
    """Raise Unknown if an unknown function might be called."""
    for place in range(len(part) - 1):
        token, after = part[place], part[place + 1]
        if not token.name or not (after.text == "(" or after.kind == "placeholder"):
            continue
        first = place
        while first >= 2 and part[first - 1].text == "." and part[first - 2].name:
            first -= 2
        before = part[first - 1] if first else None
        qualifiers = [each.name for each in part[first:place:2]]
        if (token.word in _MAY_STAND_BEFORE or token.word in also) and first == place:
            continue
        if token.name in FUNCTIONS and qualifiers in ([], ["pg_catalog"]):
            continue
        if after.kind == "placeholder":
            pass  # psycopg2 writes a tuple with parentheses
        elif first == place and _is_syntax(part, place, definition):
            continue
        elif before and (before.word in ("into", "as", "with", "recursive") or before.text == "::"):
            continue  # a table with its columns, an alias with its columns, a type with its size
        elif definition and (token.word in _DEFINING or (before and before.word in _DEFINED)):
            continue
        raise Unknown(f"the effect of {token.text}{after.text if after.kind == 'placeholder' else '()'}")


def _is_syntax(part: Sequence[Token], place: int, definition: bool) -> bool:
    """Return whether the context shows that the name at ``place``, before a parenthesis, is not a function."""
    token, before = part[place], part[place - 1] if place else None
    if before is None:
        return False
    two = " ".join(each.word for each in part[max(place - 2, 0):place])
    if {before.word, two} & _CONTEXT.get(token.word, set()):  # guard: words that are not reserved
        return True
    close = _close(part, place + 1)
    after = [each.word or each.text for each in part[close + 1:close + 4]]
    if token.word == "conflict":
        joins = any(each.word == "join" for each in part[:place])
        return before.word == "on" and (after[:1] == ["do"] or (after[:1] == ["where"] and not joins))
    if token.word in _PARTITIONS:
        return definition and two == "partition by"
    if token.word == "operator":
        inner = part[place + 2:close]
        return [each.text.lower() for each in inner[:2]] == ["pg_catalog", "."] and all(
            each.kind == "operator" for each in inner[2:]
        )
    if before.word == "tablesample":
        return token.word in ("bernoulli", "system") and after[:1] == ["repeatable"]  # returns the same rows again
    if before.text == ",":  # the second query in WITH RECURSIVE: no alias of a function is followed by this
        return after in (["as", "(", "select"], ["as", "(", "with"], ["as", "(", "("])
    if before.text == ")":  # FROM f(1) g(n), FROM (SELECT ...) g(n), f(1) OVER (...), but not DISTINCT ON (a) f(b)
        opened = _open(part, place - 1)
        ahead = part[opened - 1] if opened else before
        is_name = ahead.name != "" and ahead.word not in KEYWORDS
        return is_name or ahead.text == "," or ahead.word in ("from", "group", "join", "lateral")
    return False


def _open(part: Sequence[Token], place: int) -> int:
    """Return the place of the opening parenthesis for the one at ``place``."""
    depth = 0
    for at in range(place, -1, -1):
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(part[at].text, 0)
        if not depth:
            return at
    raise Unknown("it has an unbalanced parenthesis")


def judge_expression(text: str) -> tuple[str, frozenset[str]]:
    """Judge a default or a constraint as printed by the server; return why it is unknown ("" if not), and its names."""
    judged = judge(f"SELECT {text}")
    return judged.why, judged.names


def judge_view(text: str) -> tuple[str, frozenset[str]]:
    """Judge the query of a view; return the same as ``judge_expression``."""
    judged = judge(text)
    why = judged.why or ("" if judged.free else "it is not read-only")
    if not why and _has_server_s_own(judged.names):  # guard: the server's own tables, in views
        why = "writing to it may change one of the server's own tables"
    return why, judged.names


def judge_body(text: str) -> tuple[str, frozenset[str]]:
    """Judge the source of a PL/pgSQL function; return the same as ``judge_expression``."""
    try:
        found = tokens(text)
        names = frozenset(each.name for each in found if each.name)
        if _has_server_s_own(names):
            raise Unknown("it may change one of the server's own tables")
        check_calls(found, also=frozenset(("if", "elsif", "return")))
        # DECLARE may be a name elsewhere; its section at the beginning can only do calls, which are checked above.
        begins, declares = True, found[:1] != [] and found[0].word == "declare"
        for place, token in enumerate(found):
            declares = declares and token.word != "begin"  # guard: DECLARE
            known = declares or token.word in _BODY or token.text == ";" or _is_assignment(found, place)
            if begins and not known:
                raise Unknown(f"{token.text} in it")
            begins = token.text == ";" or token.word in _BEGINNERS
    except Unknown as unknown:
        return str(unknown), frozenset()
    return "", names


def _is_assignment(found: list[Token], place: int) -> bool:
    while place + 2 < len(found) and found[place].name and found[place + 1].text == ".":
        place += 2
    return place + 1 < len(found) and bool(found[place].name) and found[place + 1].text in (":=", "=")


def judge_definition(text: str) -> tuple[str, frozenset[str]]:
    """Judge the definition of a trigger as printed by the server; return the same as ``judge_expression``."""
    try:
        found = tokens(text)
        words = [token.word for token in found]
        called = max(
            place for place in range(len(words) - 1)
            if words[place] == "execute" and words[place + 1] in ("function", "procedure")
        )
        when = words.index("when") if "when" in words[:called] else called
        check_calls(found[when:called])
    except Unknown as unknown:
        return str(unknown), frozenset()
    return "", frozenset(each.name for each in found[when:called] if each.name)


def _values_only(part: list[Token], words: list[str]) -> bool:
    """Return whether an INSERT reads no table: its rows are given by VALUES, or by a SELECT from VALUES."""
    selects = words.count("select")
    if not selects:
        return "with" not in words and "table" not in words
    place = words.index("select")
    froms = [at for at, word in enumerate(words) if word == "from"]
    return (
        selects == 1 and len(froms) == 1 and part[froms[0] + 1].text == "(" and words[froms[0] + 2] == "values"
        and "join" not in words and "with" not in words and "table" not in words and place < froms[0]
    )


def _close(part: Sequence[Token], place: int) -> int:
    """Return the place of the closing parenthesis for the one at ``place``."""
    depth = 0
    for at in range(place, len(part)):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(part[at].text, 0)
        if not depth:
            return at
    raise Unknown("it has an unbalanced parenthesis")


def _items(part: list[Token], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each item in a comma-separated list from ``first`` up to ``last``."""
    place = begin = first
    while place < last:
        if part[place].text in "([":
            place = _close(part, place)
        elif part[place].text == ",":
            yield begin, place
            begin = place + 1
        place += 1
    if begin < last:
        yield begin, last


def _insert(part: list[Token], has_arguments: bool) -> Insert | None:
    """Return where values can be added to an INSERT ... RETURNING; None if it is too complex."""
    place = 2
    while place + 1 < len(part) and part[place].name and part[place + 1].text == ".":
        place += 2
    relation = "".join(token.text for token in part[2:place + 1])
    table = part[place].name
    place += 1
    words = [token.word for token in part]
    if "returning" not in words[place:] or "overriding" in words:
        return None
    returned = place + words[place:].index("returning")
    columns: dict[str, int] = {}
    first_column = 0
    if part[place].text == "(":
        first_column, end = part[place].end, _close(part, place)
        columns = {part[first].name: number for number, (first, _last) in enumerate(_items(part, place + 1, end))}
        place = end + 1
    overriding = part[place - 1].end
    rows: list[list[tuple[int, int]]] = []
    counted = 0
    default_values = 0, 0
    if words[place:place + 2] == ["default", "values"]:
        default_values = part[place].start, part[place + 1].end
        place += 2
    elif words[place] == "values":
        place += 1
        while part[place].text == "(":
            end = _close(part, place)
            rows.append([(part[a].start, part[b - 1].end) for a, b in _items(part, place + 1, end)])
            place = end + 1
            if part[place].text != ",":
                break
            place += 1
    elif words[place] == "select" and "sen_counter" in words:
        counted = part[place].end
        place = returned
    conflict: frozenset[str] = frozenset()
    if words[place:place + 2] == ["on", "conflict"]:
        conflict = frozenset(token.name for token in part[place:returned])
        place = returned  # conflicting rows are found before the key is examined
    if place != returned or not (first_column or not rows):
        return None
    returning = []
    for a, b in _items(part, returned + 1, len(part)):
        item = part[a:b]
        if len(item) > 2 and item[-2].word == "as":
            item = item[:-2]
        simple = item and all(
            token.name if number % 2 == 0 else token.text == "." for number, token in enumerate(item)
        ) and len(item) % 2
        returning.append(item[-1].name if simple else "")
    return Insert(
        relation, table, columns, first_column, overriding, default_values, rows, counted, returning, conflict,
        has_arguments,
    )


def literal(value: Any) -> str | None:
    """Return a value as a literal for PostgreSQL; None for types that may not be preserved exactly."""
    if type(value) is int:
        return str(value) if value >= 0 else f"({value})"
    if isinstance(value, (str, uuid.UUID)):
        if "\\" in str(value):  # guard: values with a backslash
            return None  # its meaning depends on standard_conforming_strings
        return "'" + str(value).replace("'", "''") + "'"
    if isinstance(value, (datetime.date, datetime.datetime)) and 1 < value.year < 9999:  # else it may be infinite
        return f"'{value.isoformat()}'"
    return None


def sequence_asked(expressions: set[str]) -> str | None:
    """Return the sequence from which these expressions take their keys.

    Return "" for functions without arguments, such as ``gen_random_uuid()``, and None for all other expressions.
    """
    if all(re.fullmatch(r"(?!nextval)\w+\(\)", each) for each in expressions):
        return ""
    found = {re.fullmatch(r"nextval\('([^'%]+)'(?:::regclass)?\)", each) for each in expressions}
    names = {match.group(1) if match else "" for match in found}
    return names.pop() or None if len(names) == 1 else None


def with_values(text: str, insert: Insert, given: dict[str, tuple[str, list[Any]]]) -> str:
    """Return the INSERT with given values for columns that the server filled; each has a type and one value per row."""

    def double(part: str) -> str:
        return part.replace("%", "%%") if insert.has_arguments else part

    changes: list[tuple[int, int, str]] = []
    more = []
    for column, (kind, values) in given.items():
        said = [literal(value) for value in values]
        if None in said or len(set(map(type, values))) > 1:
            continue
        place = insert.columns.get(column)
        if place is None:
            more.append((column, double(kind), [double(each) for each in said if each]))
        elif insert.rows:
            for row, each in zip(insert.rows, said):
                # Keep placeholders: without one, a positional argument would be left over.
                if each and not re.search(r"^%\(\w+\)s$|%[sbt]", text[slice(*row[place])]):
                    changes.append((*row[place], double(each)))
    if more:
        names = "".join('"' + double(column.replace('"', '""')) + '", ' for column, _kind, _said in more)
        if insert.first_column:
            changes.append((insert.first_column, insert.first_column, names))
            changes.append((insert.overriding, insert.overriding, " OVERRIDING SYSTEM VALUE"))
        if insert.counted:
            lists = "".join(f" (ARRAY[{', '.join(said)}]::{kind}[])[sen_counter + 1]," for _column, kind, said in more)
            changes.append((insert.counted, insert.counted, lists))
        elif insert.rows:
            for number, row in enumerate(insert.rows):
                changes.append((row[0][0], row[0][0], "".join(f"{said[number]}, " for _column, _kind, said in more)))
        else:
            if insert.first_column:
                return text
            values_text = ", ".join(said[0] for _column, _kind, said in more)
            changes = [(*insert.default_values, f"({names[:-2]}) OVERRIDING SYSTEM VALUE VALUES ({values_text})")]
    for start, end, new in sorted(changes, key=lambda change: change[:2], reverse=True):
        text = text[:start] + new + text[end:]
    return text
