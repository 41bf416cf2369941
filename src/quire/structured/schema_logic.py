"""Logic of schemas: which values one allows, whether two are disjoint, the complement of one.

For schemas that `schema.py` has rewritten: booleans, or dicts of the keywords that llguidance enforces.
If an answer is not certain, it is None or False, which callers treat as unknown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

Schema = dict[str, Any] | bool
Resolve = Callable[[str], Schema | None]
"""`$ref` -> its schema; None if that is not known yet."""

TYPES = ("null", "boolean", "number", "string", "array", "object")
ALL_TYPES = frozenset((*TYPES, "integer"))
MAX_DEPTH = 24
"""Limit on the depth of recursion."""
MAX_STEPS = 20_000
"""Limit on all steps for one schema. A complement may be exponentially larger than its schema."""
MAX_COMPLEMENT_TEXT = 100
"""Limit on the length of a text to exclude: `all_texts_but` recurses once per character."""
LOWER = {"minimum": "exclusiveMaximum", "exclusiveMinimum": "maximum"}
UPPER = {"maximum": "exclusiveMinimum", "exclusiveMaximum": "minimum"}
SIZES = {"Length": "string", "Items": "array", "Properties": "object"}


def is_anything(schema: Schema) -> bool:
    return schema is True or schema == {}


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """The types in `type`; number includes integer."""
    named = schema.get("type", TYPES)
    found = {named} if isinstance(named, str) else set(named)
    return frozenset(found | {"integer"} if "number" in found else found)


def type_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == math.floor(value) else "number"
    names = {type(None): "null", str: "string", list: "array", tuple: "array", dict: "object"}
    return names.get(type(value), "")


def key_of(value: object) -> str:
    """A key that is the same for values that are equal in JSON: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        inner = sorted(f"{json.dumps(name)}:{key_of(part)}" for name, part in value.items())
        return "{" + ",".join(inner) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(key_of, value)) + "]"
    if isinstance(value, float) and value == math.floor(value):
        value = int(value)
    return json.dumps(value)


def values_of(schema: dict[str, Any]) -> list[Any] | None:
    """The values that `const` and `enum` allow, without those whose type is not allowed."""
    if "const" in schema:
        values = [schema["const"]]
    elif "enum" in schema:
        values = schema["enum"]
    else:
        return None
    return [value for value in values if type_of(value) in types_of(schema)]


class Logic:
    """Conclusions about schemas that may refer to each other."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._fuel = MAX_STEPS

    def _may_go_on(self, depth: int) -> bool:
        self._fuel -= 1
        return depth <= MAX_DEPTH and self._fuel > 0

    def meant(self, schema: Schema) -> Schema | None:
        """The schema that a schema with only a `$ref` refers to."""
        for _ in range(MAX_DEPTH):
            if isinstance(schema, bool) or set(schema) != {"$ref"}:
                return schema
            found = self._resolve(schema["$ref"])
            if found is None:
                return None
            schema = found
        return None

    def strings(self, schema: Schema, depth: int = 0) -> list[str] | None:
        """All strings that match, if there are finitely many and they can be listed."""
        found = self.meant(schema)
        if found is False:
            return []
        if found is None or found is True or not self._may_go_on(depth):
            return None
        if "string" not in types_of(found):
            return []
        values = values_of(found)
        if values is not None and set(found) <= {"type", "const", "enum"}:
            return [value for value in values if isinstance(value, str)]
        if "anyOf" in found and set(found) <= {"type", "anyOf"}:
            parts = [self.strings(part, depth + 1) for part in found["anyOf"]]
            listed = [part for part in parts if part is not None]
            if len(listed) == len(parts):
                return list(dict.fromkeys(text for part in listed for text in part))
        return None

    # --- disjointness ---

    def disjoint(self, one: Schema, two: Schema, depth: int = 0) -> bool:
        """Whether it is certain that no value matches both."""
        a, b = self.meant(one), self.meant(two)
        if a is False or b is False:
            return True
        if a is None or b is None or a is True or b is True or not self._may_go_on(depth):
            return False
        shared = types_of(a) & types_of(b)
        if not shared:
            return True
        if self._values_disjoint(a, b) or (shared <= {"integer", "number"} and _ranges_apart(a, b)):
            return True
        if shared == {"object"} and self._objects_disjoint(a, b, depth):
            return True
        for x, y in ((a, b), (b, a)):
            if "anyOf" in x and all(self.disjoint(part, y, depth + 1) for part in x["anyOf"]):
                return True
            if any(self.disjoint(part, y, depth + 1) for part in x.get("allOf", ())):
                return True
            if "$ref" in x and self.disjoint({"$ref": x["$ref"]}, y, depth + 1):
                return True
        return False

    def _values_disjoint(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        for x, y in ((a, b), (b, a)):
            mine, theirs = values_of(x), values_of(y)
            if mine is None:
                continue
            fitting = [value for value in mine if type_of(value) in types_of(y)]
            if theirs is not None:
                keys = {key_of(value) for value in theirs}
                fitting = [value for value in fitting if key_of(value) in keys]
            if not fitting:
                return True
        return False

    def _objects_disjoint(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        """Whether there is a property that one of them requires and whose values cannot match both."""
        names = dict.fromkeys((*a.get("required", ()), *b.get("required", ())))
        return any(
            self.disjoint(_property(a, name), _property(b, name), depth + 1) for name in names
        )

    # --- complements ---

    def complement(self, schema: Schema, depth: int = 0) -> Schema | None:
        """A schema of exactly the values that do not match; None if it cannot be written."""
        found = self.meant(schema)
        if found is None or not self._may_go_on(depth):
            return None
        if isinstance(found, bool):
            return not found
        parts: list[Schema] = []
        for keyword, value in found.items():
            if keyword == "type":
                part: Schema | None = _other_types(types_of(found))
            elif keyword == "$ref":
                part = self.complement({"$ref": value}, depth + 1)
            else:
                part = self._complement_of(keyword, value, depth)
            if part is None:
                return None
            parts.append(part)
        return any_of(parts)

    def _complement_of(self, keyword: str, value: Any, depth: int) -> Schema | None:
        if keyword in ("const", "enum"):
            return _other_values([value] if keyword == "const" else value)
        if keyword == "required":
            return any_of([{"type": "object", "properties": {name: False}} for name in value])
        if keyword in LOWER or keyword in UPPER:
            return {"type": "number", (LOWER | UPPER)[keyword]: value}
        if keyword[3:] in SIZES and keyword[:3] in ("min", "max"):
            size = keyword[3:]
            if keyword.startswith("max"):
                return {"type": SIZES[size], f"min{size}": value + 1}
            return {"type": SIZES[size], f"max{size}": value - 1} if value > 0 else False
        if keyword == "properties":
            complements = {name: self.complement(part, depth + 1) for name, part in value.items()}
            if None in complements.values():
                return None
            return any_of([
                {"type": "object", "properties": {name: part}, "required": [name]}
                for name, part in complements.items()
                if part is not False and part is not None
            ])  # fmt: skip
        if keyword in ("allOf", "anyOf"):
            parts = [self.complement(part, depth + 1) for part in value]
            certain = [part for part in parts if part is not None]
            if len(certain) < len(parts):
                return None
            return any_of(certain) if keyword == "allOf" else all_of(certain)
        return None


def any_of(parts: Sequence[Schema]) -> Schema:
    """The union, in the simplest form."""
    if any(is_anything(part) for part in parts):
        return True
    left = [part for part in parts if part is not False]
    if len(left) < 2:
        return left[0] if left else False
    return {"anyOf": left}


def all_of(parts: Sequence[Schema]) -> Schema:
    """The intersection, in the simplest form."""
    if any(part is False for part in parts):
        return False
    left = [part for part in parts if not is_anything(part)]
    if len(left) < 2:
        return left[0] if left else True
    return {"allOf": left}


def _property(schema: dict[str, Any], name: str) -> Schema:
    """The schema of a property; True if that is not certain."""
    found = schema.get("properties", {}).get(name)
    if found is not None:
        return found  # type: ignore[no-any-return]
    closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    return not closed


def _ranges_apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return any(_bound(x, LOWER, max) > _bound(y, UPPER, min) for x, y in ((a, b), (b, a)))


def _bound(
    schema: dict[str, Any], keywords: Collection[str], strictest: Callable[..., float]
) -> float:
    given = [schema[keyword] for keyword in keywords if keyword in schema]
    return strictest(given, default=-math.inf if strictest is max else math.inf)


def _other_types(types: frozenset[str]) -> Schema | None:
    if "integer" in types and "number" not in types:
        return None  # numbers that are not integers
    return _typed([name for name in TYPES if name not in types])


def _typed(names: list[str], **more: Any) -> Schema:
    if not names:
        return False
    return {"type": names[0] if len(names) == 1 else names, **more}


def _other_values(values: list[Any]) -> Schema | None:
    """All values except these."""
    if any(isinstance(value, (dict, list, tuple)) for value in values):
        return None
    texts = [value for value in values if isinstance(value, str)]
    if any(len(text) > MAX_COMPLEMENT_TEXT or '"' in text or "\\" in text for text in texts):
        return None  # in llguidance, a class that excludes one of the two matches both
    held = {type_of(value) for value in values}
    numeric = bool(held & {"integer", "number"})
    parts = [_typed([t for t in TYPES if t not in held and not (t == "number" and numeric)])]
    if "boolean" in held:
        parts += [{"const": flag} for flag in (True, False) if not any(v is flag for v in values)]
    if numeric:
        numbers = sorted({v for v in values if type_of(v) in ("integer", "number")})
        parts.append({"type": "number", "exclusiveMaximum": numbers[0]})
        parts += [
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
            for low, high in pairwise(numbers)
        ]
        parts.append({"type": "number", "exclusiveMinimum": numbers[-1]})
    if "string" in held:
        parts.append({"type": "string", "pattern": all_texts_but(texts)})
    return any_of(parts)


def all_texts_but(texts: list[str]) -> str:
    """A regex of all texts except these: those that leave the tree of their prefixes, or end inside it."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node["end"] = True  # not a single character

    def others(node: dict[str, Any]) -> str:
        chars = [char for char in node if char != "end"]
        listed = "".join(map(_in_class, chars))
        ways = [f"[^{listed}](?s:.)*" if chars else "(?s:.)+"]
        ways += [_escaped(char) + others(node[char]) for char in chars]
        if "end" not in node:
            ways.append("")
        return f"(?:{'|'.join(ways)})"

    return f"^{others(tree)}$"


def _escaped(char: str) -> str:
    return re.escape(char) if char.isascii() and char.isprintable() else _code(char)


def _in_class(char: str) -> str:
    return char if char.isascii() and char.isalnum() else _code(char)


def _code(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"
