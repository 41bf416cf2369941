"""Keywords of objects, for `schema.py`."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from quire.structured.schema_keywords import FORMAT_RULES, NAME_FORMATS
from quire.structured.schema_logic import (
    Schema,
    any_of,
    is_anything,
    types_of,
)
from quire.structured.schema_node import Node, Reading
from quire.structured.schema_refs import escaped

MAX_COUNTED = 5
"""Most optional properties that are counted, which is done by listing every subset of them."""
CONDITIONAL = (
    "anyOf", "oneOf", "if", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""With these keywords, the set of covered properties depends on the value."""


def read_objects(run: Reading, node: Node) -> None:
    block = node.block
    if required := _required(run, node, "required", node.given.get("required", False)):
        block["required"] = required
    properties = _schemas(run, node, "properties")
    patterns = _schemas(run, node, "patternProperties")
    if "additionalProperties" in node.given:
        rest: Schema = run.part(node, "additionalProperties")
    else:
        says = properties or "properties" in node.given or node.block.get("type") == "object"
        open_ = not run.close or run.exact or "unevaluatedProperties" in node.given
        rest = open_ or not says
    if patterns and not all(map(is_anything, (rest, *patterns.values()))):
        block["patternProperties"] = patterns
    if properties:
        block["properties"] = properties
    if not is_anything(rest):
        block["additionalProperties"] = rest
    _read_unevaluated(run, node)
    _read_names(run, node)
    _read_dependencies(run, node)
    _read_counts(run, node)


def _schemas(run: Reading, node: Node, keyword: str) -> dict[str, Schema]:
    value = node.given.get(keyword, {})
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise run.wrong(node, keyword, "an object of schemas")
    return {
        name: run.schema(part, f"{node.at}/{keyword}/{escaped(name)}", node.base)
        for name, part in value.items()
    }


def _required(run: Reading, node: Node, keyword: str, names: object) -> list[str]:
    if names is False:  # draft 3
        return []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise run.wrong(node, keyword, "a list of names")
    return list(dict.fromkeys(names))


def _read_dependencies(run: Reading, node: Node) -> None:
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        value = node.given.get(keyword, {})
        if not isinstance(value, dict):
            raise run.wrong(node, keyword, "an object")
        for name, wanted in value.items():
            if not isinstance(name, str):
                raise run.wrong(node, keyword, "an object with strings as names")
            lists = keyword == "dependentRequired" or (
                keyword == "dependencies" and isinstance(wanted, (list, tuple))
            )
            if lists:
                names = _required(run, node, keyword, wanted)
                then: Schema = {"required": names} if names else True
            else:
                then = run.schema(wanted, f"{node.at}/{keyword}/{escaped(name)}", node.base)
            node.extras.append(any_of([{"properties": {name: False}}, then]))


def _read_names(run: Reading, node: Node) -> None:
    if "propertyNames" not in node.given:
        return
    names = run.part(node, "propertyNames")
    found = run.logic.meant(names)
    closed: dict[str, Any] = {"additionalProperties": False}
    if found is None:
        run.refuse(node, "propertyNames", "it refers to itself")
        return
    if found is True:
        return
    if found is not False and "string" in types_of(found):
        asked = {keyword: value for keyword, value in found.items() if keyword != "type"}
        if not asked:
            return
        texts, pattern = run.logic.strings(found), _name_pattern(asked)
        if texts is not None:
            closed["properties"] = dict.fromkeys(texts, True)
        elif pattern is not None:
            closed["patternProperties"] = {pattern: True}
        else:
            run.refuse(node, "propertyNames", "that rule for names has no equivalent pattern")
            return
    node.extras.append(closed)


def _name_pattern(asked: dict[str, Any]) -> str | None:
    """A regex of the names, if one keyword determines them."""
    if set(asked) == {"pattern"}:
        return str(asked["pattern"])
    if "format" in asked and asked.keys() <= {"format", "allOf"}:
        ours = asked.get("allOf", [FORMAT_RULES.get(asked["format"])])
        return NAME_FORMATS.get(asked["format"]) if len(ours) == 1 else None
    if set(asked) <= {"minLength", "maxLength"}:
        return f"^(?s:.{{{asked.get('minLength', 0)},{asked.get('maxLength', '')}}})$"
    return None


# --- unevaluatedProperties ---


def _read_unevaluated(run: Reading, node: Node) -> None:
    if "unevaluatedProperties" not in node.given:
        return
    rest = run.part(node, "unevaluatedProperties")
    if is_anything(rest) or "additionalProperties" in node.given:
        return
    covered = _Covered()
    if not covered.add(run, node.given, node.base):
        why = "which properties other keywords cover depends on the value; use additionalProperties"
        run.refuse(node, "unevaluatedProperties", why)
    elif not covered.everything:
        node.extras.append(
            {
                "properties": dict.fromkeys(covered.names, True),
                "patternProperties": dict.fromkeys(covered.patterns, True),
                "additionalProperties": rest,
            }
        )


class _Covered:
    """The properties that are covered by a schema and by all schemas that must hold with it."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.patterns: dict[str, None] = {}
        self.everything = False
        self._seen: set[int] = set()

    def add(self, run: Reading, schema: object, base: str, *, inner: bool = False) -> bool:
        """Returns False if the covered properties depend on the value."""
        todo: list[tuple[object, str, bool]] = [(schema, base, inner)]
        while todo:
            schema, base, inner = todo.pop()
            if not isinstance(schema, dict) or id(schema) in self._seen:
                continue
            self._seen.add(id(schema))
            base = run.refs.base_of(schema, base)
            if any(keyword in schema for keyword in CONDITIONAL):
                return False
            rest = ("additionalProperties", *(("unevaluatedProperties",) if inner else ()))
            self.everything |= any(schema.get(keyword) is not None for keyword in rest)
            self.names |= dict.fromkeys(schema.get("properties") or ())
            self.patterns |= dict.fromkeys(schema.get("patternProperties") or ())
            if isinstance(schema.get("$ref"), str):
                target = run.refs.find(schema["$ref"], base)
                if target is not None:
                    todo.append((target.schema, target.base, True))
            todo += [(part, base, True) for part in schema.get("allOf") or ()]
        return True


# --- minProperties, maxProperties ---


def _read_counts(run: Reading, node: Node) -> None:
    """llguidance counts only required properties and those that `properties` does not list. So every
    subset of the optional properties becomes a schema in which its members are required and the others
    forbidden."""
    low, high = run.size(node, "minProperties"), run.size(node, "maxProperties")
    block = node.block
    required = block.get("required", [])
    listed = {n: part for n, part in block.get("properties", {}).items() if part is not False}
    optional = [name for name in listed if name not in required]
    closed = block.get("additionalProperties") is False and "patternProperties" not in block
    if low is not None and low <= len(required):
        low = None
    if high is not None and closed and high >= len(required) + len(optional):
        high = None
    counts = {
        keyword: count
        for keyword, count in (("minProperties", low), ("maxProperties", high))
        if count is not None
    }
    if not counts:
        return
    if not optional:
        block.update(counts)
    elif len(optional) <= MAX_COUNTED:
        chosen = [
            set(some) for size in range(len(optional) + 1) for some in combinations(optional, size)
        ]
        ways: list[Schema] = [
            {
                "properties": {name: name in some for name in optional},
                "required": [name for name in optional if name in some],
                **counts,
            }
            for some in chosen
            if (high is None or len(required) + len(some) <= high)
            and not (closed and low is not None and len(required) + len(some) < low)
        ]
        node.extras.append(any_of(ways))
    elif low is not None and low - len(required) == 1 and high is None:
        ways = [{"required": [name]} for name in optional]
        if not closed:
            ways.append({"properties": dict.fromkeys(optional, False), **counts})
        node.extras.append(any_of(ways))
    else:
        why = f"more than {MAX_COUNTED} optional properties are not counted; name those you need in required"
        run.refuse(node, " and ".join(counts), why)
