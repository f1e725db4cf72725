# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: BSD-3-Clause
"""Look up the names in statements in the database, before anything is repeated.

A statement is judged by its text (``sql.py``), but it may also run code in the database: a view, a trigger, a rule, a
default or a constraint can call functions. Their definitions are judged like statements; a name that is also the name
of a function in the database counts as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .sql import TIMES, TRANSACTION_CLOCK, judge_body, judge_definition, judge_expression, judge_view

# Objects that are not part of the server itself have oids from 16384 on (FirstNormalObjectId).
# The query covers the relations with these names, relations that are written together with them (partitions, and tables
# that refer to them), and the types of their columns, including nested types and domains.
MEANING = """
WITH RECURSIVE named AS (
    SELECT unnest(%s::text[]) AS name
), is_part AS (
    SELECT inhparent AS one, inhrelid AS other FROM pg_inherits
    UNION ALL SELECT inhrelid, inhparent FROM pg_inherits
), leads AS (
    SELECT one, other FROM is_part
    UNION ALL SELECT confrelid, conrelid FROM pg_constraint WHERE contype = 'f'
), first AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN named ON named.name = c.relname
    WHERE c.oid >= 16384 AND c.relkind NOT IN ('S', 'i', 'I', 't', 'c') AND n.nspname !~ '^pg_(toast_)?temp_'
        AND (pg_table_is_visible(c.oid) OR n.nspname IN (SELECT name FROM named))
), whole AS (
    SELECT oid FROM first UNION SELECT other FROM whole JOIN is_part ON one = whole.oid
), reached AS (
    SELECT oid FROM first UNION SELECT other FROM reached JOIN leads ON one = reached.oid
), relation AS (
    SELECT c.oid, c.relkind, c.oid::regclass::text AS name FROM reached JOIN pg_class c USING (oid)
), consists AS (
    SELECT oid AS one, typbasetype AS other FROM pg_type
    UNION ALL SELECT oid, typelem FROM pg_type
    UNION ALL SELECT t.oid, atttypid FROM pg_type t JOIN pg_attribute ON attrelid = typrelid
    UNION ALL SELECT rngtypid, rngsubtype FROM pg_range
    UNION ALL SELECT oid, rngtypid FROM pg_type, pg_range WHERE typtype = 'm'
), type AS (
    SELECT oid FROM pg_type JOIN named ON named.name = typname WHERE oid >= 16384
    UNION SELECT atttypid FROM pg_attribute JOIN reached ON attrelid = reached.oid WHERE atttypid >= 16384
    -- guard: types within types
    UNION SELECT other FROM type JOIN consists ON one = type.oid WHERE other >= 16384
), domain AS (
    SELECT t.oid, t.typdefaultbin, format_type(t.oid, NULL) AS name FROM type JOIN pg_type t USING (oid)
    WHERE typtype = 'd'
), foreign_language AS (
    SELECT p.oid FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE l.lanname NOT IN ('c', 'internal')
), own AS (  -- what neither the server nor an extension's library does; an aggregate is what it calls
    SELECT p.oid, p.proname FROM pg_proc p LEFT JOIN pg_aggregate a ON a.aggfnoid = p.oid
    WHERE p.oid >= 16384 AND (
        -- guard: aggregates
        NOT EXISTS (
            SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid
                AND deptype IN ('e', 'i')  -- of an extension, or made with a range type
        )
        OR EXISTS (SELECT FROM foreign_language f WHERE f.oid IN (
            p.oid, aggtransfn, aggfinalfn, aggcombinefn, aggmtransfn, aggminvtransfn, aggmfinalfn
        ))
    )
)
SELECT relname::text, relname::text, 'part' FROM whole JOIN pg_class USING (oid)
    WHERE oid NOT IN (SELECT oid FROM first)
UNION ALL SELECT name, 'a foreign table', 'unknown' FROM relation WHERE relkind NOT IN ('r', 'p', 'v', 'm')
UNION ALL SELECT name, pg_get_viewdef(oid), 'view' FROM relation WHERE relkind = 'v'
UNION ALL SELECT name, 'the rule ' || rulename, 'unknown' FROM relation JOIN pg_rewrite ON ev_class = relation.oid
    WHERE rulename <> '_RETURN'
UNION ALL SELECT name,
        CASE WHEN is_known THEN prosrc ELSE 'the trigger ' || tgname END,
        CASE WHEN is_known THEN 'body' ELSE 'unknown' END
    FROM relation JOIN pg_trigger t ON tgrelid = relation.oid JOIN pg_proc p ON p.oid = tgfoid
    JOIN pg_language l ON l.oid = prolang CROSS JOIN LATERAL (SELECT
        lanname = 'plpgsql' AND proconfig IS NULL
        AND (current_setting('standard_conforming_strings') = 'on' OR strpos(prosrc, chr(92)) = 0) AS is_known
    ) x
    WHERE NOT tgisinternal AND tgenabled <> 'D'
UNION ALL SELECT name, pg_get_triggerdef(t.oid), 'definition' FROM relation JOIN pg_trigger t ON tgrelid = relation.oid
    WHERE NOT tgisinternal AND tgenabled <> 'D'
UNION ALL SELECT name, pg_get_expr(adbin, adrelid), 'expression' FROM relation JOIN pg_attrdef ON adrelid = relation.oid
UNION ALL SELECT name, pg_get_expr(conbin, conrelid), 'expression' FROM relation
    JOIN pg_constraint ON conrelid = relation.oid WHERE conbin IS NOT NULL
UNION ALL SELECT name, pg_get_expr(partexprs, partrelid), 'expression' FROM relation
    JOIN pg_partitioned_table ON partrelid = relation.oid WHERE partexprs IS NOT NULL
UNION ALL SELECT name, pg_get_expr(conbin, 0), 'expression' FROM domain
    JOIN pg_constraint ON contypid = domain.oid WHERE conbin IS NOT NULL
UNION ALL SELECT name, pg_get_expr(typdefaultbin, 0), 'expression' FROM domain WHERE typdefaultbin IS NOT NULL
UNION ALL SELECT name, part, 'expression' FROM relation JOIN pg_index ON indrelid = relation.oid
    CROSS JOIN LATERAL (VALUES (pg_get_expr(indexprs, indrelid)), (pg_get_expr(indpred, indrelid))) x (part)
    WHERE part IS NOT NULL
UNION ALL SELECT name, part, 'policy' FROM relation JOIN pg_policy ON polrelid = relation.oid
    CROSS JOIN LATERAL (VALUES (pg_get_expr(polqual, polrelid)), (pg_get_expr(polwithcheck, polrelid))) x (part)
    WHERE part IS NOT NULL
UNION ALL SELECT own.oid::regprocedure::text, 'a function of the database', 'unknown' FROM own
    JOIN named ON named.name = proname
UNION ALL SELECT oprname::text, 'an operator of the database', 'unknown' FROM pg_operator JOIN own ON own.oid = oprcode
UNION ALL SELECT amproc::regprocedure::text, 'an operator class of the database', 'unknown'
    FROM pg_amproc JOIN own ON own.oid = amproc
UNION ALL SELECT format('%%s to %%s', castsource::regtype, casttarget::regtype), 'a cast of the database', 'unknown'
    FROM pg_cast JOIN own ON own.oid = castfunc
UNION ALL SELECT format_type(t.oid, NULL), 'a type of the database', 'unknown' FROM type JOIN pg_type t USING (oid)
    LEFT JOIN pg_range ON rngtypid = t.oid JOIN own ON own.oid IN (
        typinput, typoutput, typreceive, typsend, typmodin, typmodout, rngcanonical, rngsubdiff
    )
UNION ALL SELECT name, 'it does not exist', 'unknown' FROM unnest(%s::text[]) AS needed (name)
    WHERE NOT EXISTS (SELECT FROM pg_class WHERE relname = name::name)  -- guard: relations that are gone
        AND NOT EXISTS (SELECT FROM pg_attribute WHERE attname = name::name)
        AND name NOT IN (SELECT word FROM pg_get_keywords())
UNION ALL SELECT name, 'a name that this database may read otherwise, as it is not in UTF8', 'unknown' FROM named
    -- guard: other encodings
    WHERE getdatabaseencoding() <> 'UTF8' AND name ~ '[^ -~]'
"""
# The columns whose values can be passed to a repeated INSERT, with their sequences and types, whether the server fills
# them by itself, and whether their values are unique.
COLUMNS = """
SELECT a.attname::text, s.seqrelid::regclass::text, format_type(a.atttypid, a.atttypmod),
    d.oid IS NOT NULL OR a.attidentity <> '',
    EXISTS (
        SELECT FROM pg_index WHERE indrelid = a.attrelid AND indisunique AND indimmediate AND indpred IS NULL
            AND indnkeyatts = 1 AND indkey[0] = a.attnum
    )
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p')
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_sequence s ON s.seqrelid IN (
    SELECT refobjid FROM pg_depend WHERE classid = 'pg_attrdef'::regclass AND objid = d.oid
        AND refclassid = 'pg_class'::regclass
    UNION ALL SELECT objid FROM pg_depend WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass
        AND refobjid = a.attrelid AND refobjsubid = a.attnum AND deptype = 'i'
)
WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
    AND NOT EXISTS (  -- a BEFORE INSERT trigger, which would change the returned values a second time
        SELECT FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 6 = 6
            AND (tgrelid = c.oid OR tgrelid IN (SELECT relid FROM pg_partition_tree(c.oid)))
    )
"""
# The increment of a sequence, and the tables that it provides with keys; NULL if there are none.
SEQUENCE = """
SELECT s.seqrelid::regclass::text, s.seqincrement, s.seqcycle, s.seqcache > 1, (
    SELECT string_agg(DISTINCT c.relname, '/') FROM pg_depend p
    LEFT JOIN pg_attrdef d ON p.classid = 'pg_attrdef'::regclass AND d.oid = p.objid
    JOIN pg_class c ON c.oid = CASE WHEN p.objid = s.seqrelid THEN p.refobjid ELSE d.adrelid END
    WHERE (p.classid = 'pg_class'::regclass AND p.objid = s.seqrelid AND p.refclassid = 'pg_class'::regclass
            AND p.deptype IN ('a', 'i'))
        OR (p.refclassid = 'pg_class'::regclass AND p.refobjid = s.seqrelid)
)
FROM pg_sequence s WHERE s.seqrelid = to_regclass(%s)
"""
JUDGES: dict[str, Callable[[str], tuple[str, frozenset[str]]]] = {
    "view": judge_view, "body": judge_body, "definition": judge_definition, "expression": judge_expression,
    "policy": judge_expression, "part": lambda name: ("", frozenset((name,))),
}
# Kinds that may read tables. PostgreSQL allows no queries in other expressions.
LOOK = {"view", "body", "policy", "part"}
_CLOCK = re.compile(rf"(?i)\b({'|'.join(sorted(TRANSACTION_CLOCK))})\b|'({'|'.join(sorted(TIMES))})'")
# Maximum depth of nested definitions, such as views of views.
MOST_ROUNDS = 10


class Sequence(NamedTuple):
    """Properties of a sequence."""

    name: str
    step: int
    cycles: bool
    caches: bool  # each session reserves several keys at once
    tables: str | None


def follow(
    ask_all: Callable[[str, tuple], list], names: Iterable[str], relations: Iterable[str] = (),
    timed: Iterable[str] = (),
) -> tuple[str, set[str]]:
    """Return the first unknown code that statements with these names may run, and the names that they may read.

    The former is "" if there is none; the latter are those of views, functions and partitions behind the names.

    ``relations`` are the names that must exist. Definitions of the kinds ``timed`` (keys of JUDGES) must not read the
    clock, since the program may remember an earlier value.
    """
    known: set[str] = set()
    seen: set[str] = set()
    new = set(names)
    for _round in range(MOST_ROUNDS):
        if not new:
            return "", seen
        known |= new
        found: set[str] = set()
        for name, text, kind in ask_all(MEANING, (sorted(known), sorted(relations))):
            if kind == "unknown":
                return f"{name}: {text}", seen
            if kind in timed and _CLOCK.search(text):  # guard: clock that is not named
                return f"{name}: it reads the clock", seen
            why, more = JUDGES[kind](text)
            if why:
                return f"{name}: {why}", seen
            found |= more
            if kind in LOOK:
                seen |= more
        new = found - known
    return "views of views", seen


class Column(NamedTuple):
    """A column whose value can be passed to a repeated INSERT."""

    sequence: str  # "" for none
    kind: str
    fills: bool  # by a default, or as an identity
    unique: bool


def settable_columns(ask_all: Callable[[str, tuple], list], relation: str) -> dict[str, Column]:
    """Return the columns of a table whose values can be passed to a repeated INSERT."""
    found: list[Any] = ask_all(COLUMNS, (relation,))
    return {name: Column(sequence or "", *others) for name, sequence, *others in found}


def sequence(ask_all: Callable[[str, tuple], list], name: str) -> Sequence | None:
    """Return the properties of a sequence, given by its name as in a statement; None if there is none."""
    found: list[Any] = ask_all(SEQUENCE, (name,))
    return Sequence(*found[0]) if found else None
