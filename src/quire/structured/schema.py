"""Rewrites every JSON schema before it is compiled.

llguidance refuses keywords that demand nothing, an unknown `$schema`, and integers written as 2.0. So it
is given a new schema that has only keywords it enforces. Annotations and keywords that demand nothing are
left out. Forms of older drafts are rewritten as in 2020-12. Some keywords are expressed by others with
exactly the same meaning. All other keywords are refused, with their name and place. The table of keywords
is `schema_keywords.py`.

References are resolved here: each target becomes an entry of the new schema's `$defs`, so that any part
can be moved or left out. The new schema never allows a value that the old one forbids, except for unknown
string formats, which are reported as warnings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quire.structured.base import invalid
from quire.structured.schema_arrays import read_arrays
from quire.structured.schema_keywords import FORMAT_RULES, FORMATS, READ
from quire.structured.schema_logic import (
    ALL_TYPES,
    LOWER,
    UPPER,
    Logic,
    Schema,
    all_of,
    any_of,
    is_anything,
    type_of,
    types_of,
)
from quire.structured.schema_node import Node, shown
from quire.structured.schema_objects import read_objects
from quire.structured.schema_refs import MAX_SCHEMAS, References, Target

MAX_NESTING = 64
MAX_DEPTH = 60
"""Limit on the nesting of schemas that are prepared while another one is being prepared."""
MAX_SIZE = 2**31
"""Limit for lengths and numbers of items: no output is longer."""
MAX_BOUND = 9223372036854774784
"""The largest double below 2^63, which is llguidance's limit."""
MAX_EXACT = 2**53
MAX_EXCLUSIVE = 8
"""Most alternatives of a `oneOf` that are separated by excluding all the others from each."""

LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
APPLICATORS = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if")
ROOT = "#"


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    schema: dict[str, Any]
    """A new object; parts that it shares with the client's are not changed."""
    warnings: tuple[str, ...]


def prepare(
    schema: dict[str, Any],
    *,
    lenient: bool = False,
    coerce_one_of: bool = False,
    close: bool = False,
) -> PreparedSchema:
    """A schema for llguidance with the meaning of `schema`, which is not changed.

    lenient: leave out what cannot be enforced, with a warning. coerce_one_of: read `oneOf` as `anyOf`.
    close: schemas of objects without `additionalProperties` allow no other properties.

    Raises `InvalidParameterError` naming the keyword and where it is.
    """
    try:
        run = Pass(schema, lenient=lenient, coerce_one_of=coerce_one_of or lenient, close=close)
        return PreparedSchema(run.whole(), tuple(run.warnings()))
    except RecursionError:
        raise invalid("the schema is nested too deeply; flatten it.") from None


class Pass:
    """The rewriting of one schema."""

    def __init__(
        self, document: dict[str, Any], *, lenient: bool, coerce_one_of: bool, close: bool
    ) -> None:
        self.refs = References(document)
        self.logic = Logic(self._resolve)
        self.exact = False
        """Inside a condition, whose complement is needed: no part may be made narrower."""
        self.close = close
        self._document = document
        self._lenient = lenient
        self._coerce_one_of = coerce_one_of
        self._names: dict[int, str] = {}
        self._targets: dict[str, Target] = {}
        self._prepared: dict[str, Schema] = {}
        self._open: set[str] = set()
        self._narrow: set[str] = set()
        self._narrowed = False
        self._depth = 0
        self._count = 0
        self._formats: dict[str, None] = {}
        self._ignored: dict[str, None] = {}

    def whole(self) -> dict[str, Any]:
        self._names[id(self._document)] = ROOT
        root = self.schema(self._document, "#", "")
        self._prepared[ROOT] = root
        while left := [name for name in self._targets if name not in self._prepared]:
            for name in left:
                self._prepare(name)
        if root is False:
            raise invalid("the schema allows no value at all.")
        defs = {name: self._prepared[name] for name in self._targets}
        return ({} if root is True else root) | ({"$defs": defs} if defs else {})

    def warnings(self) -> Iterator[str]:
        for what, names in (("formats", self._formats), ("keywords", self._ignored)):
            if names:
                listed = [ascii(name)[1:-1][:40] for name in names][:8]
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                yield f"not enforced by the schema: the {what} {', '.join(listed)}{more}"

    def refuse(self, node: Node, keyword: str, why: str) -> None:
        """Raise for a keyword that cannot be enforced. In lenient mode, note a warning and leave it out."""
        if not self._lenient:
            raise invalid(f"{keyword} at {shown(node.at)} cannot be enforced: {why}.")
        self._ignored[keyword] = None

    def wrong(self, node: Node, keyword: str, rule: str) -> Exception:
        """The error for a keyword with an invalid value: `raise run.wrong(...)`."""
        value = node.given.get(keyword)
        return invalid(f"{keyword} at {shown(node.at)} must be {rule}.", value)

    # --- one schema ---

    def schema(self, source: object, at: str, base: str) -> Schema:
        if isinstance(source, bool):
            return source
        if not isinstance(source, dict):
            raise invalid(f"the schema at {shown(at)} must be an object or a boolean.", source)
        self._count += 1
        self._depth += 1
        if self._count > MAX_SCHEMAS:
            raise invalid(f"the schema has over {MAX_SCHEMAS} parts; simplify it.")
        if self._depth > MAX_DEPTH + MAX_NESTING + 2:
            raise invalid(f"the schema is nested deeper than {MAX_NESTING} levels; flatten it.")
        given = {
            keyword: value
            for keyword, value in source.items()
            if keyword in READ and (value is not None or keyword == "const")
        }
        node = Node(given, at, self.refs.base_of(source, base), base)
        found = self._read(node)
        self._depth -= 1
        return found

    def part(self, node: Node, where: str) -> Schema:
        """The schema that a keyword of `node` holds."""
        return self.schema(node.given[where], f"{node.at}/{where}", node.base)

    def parts(self, node: Node, where: str) -> list[Schema]:
        value = node.given[where]
        if not isinstance(value, (list, tuple)):
            raise self.wrong(node, where, "a list of schemas")
        return [
            self.schema(part, f"{node.at}/{where}/{index}", node.base)
            for index, part in enumerate(value)
        ]

    @contextmanager
    def exactly(self) -> Iterator[None]:
        before, self.exact = self.exact, True
        yield
        self.exact = before

    def _read(self, node: Node) -> Schema:
        given = node.given
        self._read_type(node)
        if node.types & {"integer", "number"}:
            self._read_numbers(node)
        if "string" in node.types:
            self._read_strings(node)
        if "object" in node.types:
            read_objects(self, node)
        if "array" in node.types:
            read_arrays(self, node)
        values = self._values(node)
        order = list(given)
        first = next((order.index(key) for key in ("properties", *node.block) if key in given), 0)
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        for keyword in [key for key in order if key in APPLICATORS]:
            found = self._applied(node, keyword)
            if found.keys() & (before.keys() | after.keys()):
                node.extras.append(found)
            else:
                (before if order.index(keyword) < first else after).update(found)
        return _joined(before | node.block | values | after, node.extras)

    def _read_type(self, node: Node) -> None:
        if "type" not in node.given:
            return
        named = node.given["type"]
        names = [named] if isinstance(named, str) else named
        if (
            not isinstance(names, (list, tuple))
            or not names
            or not all(isinstance(name, str) and name in ALL_TYPES for name in names)
        ):
            raise self.wrong(node, "type", f"one or several of {', '.join(sorted(ALL_TYPES))}")
        names = list(dict.fromkeys(names))
        if node.given.get("nullable") is True and "null" not in names:
            names.append("null")
        if "number" in names and "integer" in names:
            names.remove("integer")
        node.block["type"] = names[0] if len(names) == 1 else names
        node.types = types_of(node.block)

    # --- numbers, strings, values ---

    def _read_numbers(self, node: Node) -> None:
        given = dict(node.given)
        for plain, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(given.get(exclusive), bool) and given.pop(exclusive) and plain in given:
                given[exclusive] = given.pop(plain)  # draft 4
        for keyword in (*LOWER, *UPPER):
            if keyword in given:
                bound = self._bound(node, keyword, given[keyword])
                if bound is not None:
                    node.block[keyword] = bound
        if "multipleOf" in given:
            step = _number(given["multipleOf"])
            if step is None or step <= 0:
                raise self.wrong(node, "multipleOf", "a number above 0")
            node.block["multipleOf"] = step

    def _bound(self, node: Node, keyword: str, value: object) -> int | float | None:
        """The bound, or the nearest stricter one that llguidance handles correctly."""
        bound = _number(value)
        if bound is None:
            raise self.wrong(node, keyword, "a number")
        inside = bound
        if abs(bound) > MAX_BOUND:
            far = -MAX_BOUND if keyword in LOWER else MAX_BOUND
            inside = far if (bound < 0) == (far < 0) else math.nan
        elif abs(bound) > MAX_EXACT and int(float(bound)) != bound:
            near = float(bound)
            if (int(near) < bound) == (keyword in LOWER):
                near = math.nextafter(near, math.inf if keyword in LOWER else -math.inf)
            inside = int(near)
        if inside != bound and (self.exact or math.isnan(inside)):
            self.refuse(node, keyword, f"numbers beyond {MAX_BOUND} are not compared")
            return None
        self._narrowed |= inside != bound
        return inside

    def size(self, node: Node, keyword: str) -> int | None:
        """A length or a number of items, or None if it demands nothing."""
        if keyword not in node.given:
            return None
        value = _number(node.given[keyword])
        if not isinstance(value, int) or value < 0:
            raise self.wrong(node, keyword, "a whole number of at least 0")
        if keyword.startswith("max"):
            return value if value <= MAX_SIZE else None
        if value > MAX_SIZE:
            self.refuse(node, keyword, "no output is that long")
            return None
        return value or None

    def _read_strings(self, node: Node) -> None:
        for keyword in ("minLength", "maxLength"):
            size = self.size(node, keyword)
            if size is not None:
                node.block[keyword] = size
        for keyword in ("pattern", "format"):
            if not isinstance(node.given.get(keyword, ""), str):
                raise self.wrong(node, keyword, "a string")
        if "pattern" in node.given:
            self._read_pattern(node, node.given["pattern"])
        name = node.given.get("format")
        if name in FORMATS:
            node.block["format"] = name
            node.extras += [dict(rule) for rule in [FORMAT_RULES.get(name)] if rule]
        elif name is not None:
            self._formats[name] = None

    def _read_pattern(self, node: Node, pattern: str) -> None:
        irregular = _irregular(pattern)
        if irregular is not None:
            if node.given.get("format") in FORMATS and not self.exact:
                self._ignored["pattern"] = None  # zod 4 writes both, with the same meaning
                return
            why = f"{irregular} is look-around or a back-reference; write the pattern without it"
            self.refuse(node, "pattern", why)
        else:
            node.block["pattern"] = pattern

    def _values(self, node: Node) -> dict[str, Any]:
        """`const` and `enum`, without values whose type `type` forbids."""
        found: dict[str, Any] = {}
        for keyword in ("const", "enum"):
            if keyword not in node.given:
                continue
            values = [node.given["const"]] if keyword == "const" else node.given["enum"]
            if not isinstance(values, (list, tuple)) or not values:
                raise self.wrong(node, keyword, "a list that is not empty")
            plain = [self._plain(node, keyword, value) for value in values]
            fitting = [value for value in plain if type_of(value) in node.types]
            if not fitting:
                node.extras.append(False)
            elif keyword == "const":
                found["const"] = fitting[0]
            else:
                found["enum"] = fitting
        return found

    def _plain(self, node: Node, keyword: str, value: Any) -> Any:
        """The value, with numbers in the spelling that llguidance writes."""
        if isinstance(value, dict):
            return {name: self._plain(node, keyword, part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(node, keyword, part) for part in value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        number = _number(value)
        if number is None:
            raise self.wrong(node, keyword, "made of finite numbers")
        if abs(number) > MAX_EXACT and int(float(number)) != number:
            self.refuse(node, keyword, f"{number} is not exact as a double; write it as a string")
        return float(number) if abs(number) >= 2**63 else number

    # --- applicators ---

    def _applied(self, node: Node, keyword: str) -> dict[str, Any]:
        """The keyword's value in the new schema. Keywords expressed by others go to the extras."""
        if keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            found = self._reference(node, keyword)
            if keyword == "$ref" and isinstance(found, dict):
                return found
            node.extras.append(found)
        elif keyword == "allOf":
            parts = [part for part in self.parts(node, "allOf") if not is_anything(part)]
            return {"allOf": parts} if parts else {}
        elif keyword == "not":
            self._read_not(node)
        elif keyword == "if":
            self._read_if(node)
        else:
            parts = self.parts(node, keyword)
            if not parts:
                raise self.wrong(node, keyword, "a list that is not empty")
            found = any_of(parts) if keyword == "anyOf" else self._one_of(node, parts)
            if isinstance(found, dict) and set(found) <= {"anyOf", "oneOf"}:
                return found
            node.extras.append(found)
        return {}

    def _one_of(self, node: Node, parts: list[Schema]) -> Schema:
        possible = [part for part in parts if part is not False]
        if self._coerce_one_of or len(possible) < 2:
            return any_of(possible)
        pairs = [(a, b) for i, a in enumerate(possible) for b in possible[i + 1 :]]
        if all(self.logic.disjoint(a, b) for a, b in pairs):
            return any_of(possible)
        opposites = [self.logic.complement(part) for part in possible[: MAX_EXCLUSIVE + 1]]
        if None in opposites or len(possible) > MAX_EXCLUSIVE:
            why = "two alternatives may both fit a value; make them exclusive, or write anyOf"
            self.refuse(node, "oneOf", why)
        others = [part for part in opposites if part is not None]
        return any_of(
            [
                all_of([part, *others[:index], *others[index + 1 :]])
                for index, part in enumerate(possible)
            ]
        )

    def _read_not(self, node: Node) -> None:
        with self.exactly():
            opposite = self.logic.complement(self.part(node, "not"))
        if opposite is None:
            self.refuse(node, "not", "the opposite of that schema cannot be written")
        else:
            node.extras.append(opposite)

    def _read_if(self, node: Node) -> None:
        then = self.part(node, "then") if "then" in node.given else True
        other = self.part(node, "else") if "else" in node.given else True
        if is_anything(then) and is_anything(other):
            return
        with self.exactly():
            condition = self.part(node, "if")
            opposite = self.logic.complement(condition)
        if opposite is None:
            self.refuse(node, "if", "the opposite of the condition cannot be written")
        else:
            ways = [all_of([condition, then]), all_of([opposite, other])]
            node.extras.append(any_of(ways))

    # --- references ---

    def _reference(self, node: Node, keyword: str) -> Schema:
        reference = node.given[keyword]
        if not isinstance(reference, str):
            raise self.wrong(node, keyword, "a string")
        if keyword == "$dynamicRef":
            unclear = not self.refs.is_dynamic_once(reference.partition("#")[2])
        else:
            unclear = keyword == "$recursiveRef" and self.refs.has_inner_ids
        if unclear:
            self.refuse(
                node, keyword, "what it means depends on where it is reached from; use $ref"
            )
            return True
        target = self.refs.find(reference, node.base)
        other = self.refs.find(reference, node.outer)
        if target and other and other.schema is not target.schema:
            self.refuse(node, keyword, "drafts differ on what it means beside an $id; move the $id")
            return True
        if target is None:
            self.refuse(
                node, keyword, f"{shown(reference)!r} is not in the schema, and nothing is fetched"
            )
            return True
        if isinstance(target.schema, dict):
            name = self._name(target)
            return {"$ref": ROOT if name == ROOT else f"#/$defs/{name}"}
        return self.schema(target.schema, target.at, target.base)

    def _name(self, target: Target) -> str:
        known = self._names.get(id(target.schema))
        if known is None:
            short = re.sub(r"[^A-Za-z0-9_]+", "_", target.at.rpartition("/")[2])[:40] or "_"
            known = short
            while known in self._targets:
                known = f"{short}_{len(self._targets)}"
            self._names[id(target.schema)] = known
            self._targets[known] = target
        return known

    def _prepare(self, name: str) -> None:
        target = self._targets[name]
        self._open.add(name)
        before = self.exact, self._narrowed
        self.exact = self._narrowed = False
        self._prepared[name] = self.schema(target.schema, target.at, target.base)
        if self._narrowed:
            self._narrow.add(name)
        self.exact, self._narrowed = before
        self._open.discard(name)

    def _resolve(self, reference: str) -> Schema | None:
        name = reference.removeprefix("#/$defs/")
        if name not in self._prepared:
            if name == ROOT or name in self._open or self._depth > MAX_DEPTH:
                return None
            self._prepare(name)
        if self.exact and name in self._narrow:
            return None
        return self._prepared[name]


def _joined(own: dict[str, Any], extras: list[Schema]) -> Schema:
    """A schema joined with what must also hold; the properties that it lists itself come first."""
    more = all_of(extras)
    if more is False or any(part is False for part in own.get("allOf", ())):
        return False
    if not own:
        return more
    if isinstance(more, dict):
        listed = more["allOf"] if set(more) == {"allOf"} else [more]
        own = {"allOf": [own, *listed]} if "allOf" in own else own | {"allOf": listed}
    if set(own) == {"allOf"}:
        return all_of(own["allOf"])
    return own


def _number(value: object) -> int | float | None:
    """A finite number, an integer as int; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if value == math.floor(value) else value


def _irregular(pattern: str) -> str | None:
    """The part of a pattern that no finite automaton can match (lookahead, backreference, ...)."""
    in_class = False
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            if not in_class and pattern[at + 1 : at + 2] in tuple("123456789k"):
                return pattern[at : at + 2]
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(" and pattern.startswith(LOOK_AROUND, at):
            return next(mark for mark in LOOK_AROUND if pattern.startswith(mark, at))
        at += 1
    return None
