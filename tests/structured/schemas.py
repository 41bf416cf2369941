"""Random JSON schemas of the kinds that people write, from a seed."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["id", "name", "größe", "a b", "x/y", 'q"t', "n", "items", "type", "properties"]
PATTERNS = [
    "^[a-z]{2,5}$",
    "^(red|green|blue)$",
    "^[0-9]{3}-[0-9]{2}$",
    "^\\w+@\\w+\\.com$",
    "^$|^x+$",
]


def schema(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    root = _object(rng, 3)
    if rng.random() < 0.3:
        root["$defs"] = {"part": _any(rng, 1)}
        root["properties"]["part"] = {"$ref": "#/$defs/part"}
    return root


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _fixed]
    if depth:
        kinds += [_object, _array, _any_of]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    kind = rng.randrange(4)
    if kind == 0:
        found["pattern"] = rng.choice(PATTERNS)
    elif kind == 1:
        found["minLength"] = rng.randrange(4)
        found["maxLength"] = found["minLength"] + rng.randrange(5)
    elif kind == 2:
        found["format"] = rng.choice(["date", "uuid", "ipv4"])
    return found


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    if rng.random() < 0.5:
        low = rng.randrange(-200, 200)
        found |= {"minimum": low, "maximum": low + rng.randrange(300)}
    if rng.random() < 0.2:
        found["multipleOf"] = 1
    return found


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    bounds = {"minimum": -1.5, "exclusiveMaximum": 12.25} if rng.random() < 0.5 else {}
    return {"type": "number", **bounds}


def _fixed(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": {"deep": [1, "two", None]}},
            {"enum": ["a", "ab", 3, None, "ü🙂"]},
            {"type": ["integer", "null"]},
        ]
    )


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
    }
    extra = rng.randrange(3)
    if extra:
        found["additionalProperties"] = False if extra == 1 else _any(rng, 0)
    return found


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": _any(rng, depth)}
    if rng.random() < 0.5:
        found["minItems"] = rng.randrange(3)
        found["maxItems"] = found["minItems"] + rng.randrange(3)
    if rng.random() < 0.2:
        found["prefixItems"] = [_any(rng, 0)]
    return found


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}


def conditional_schema(seed: int) -> dict[str, Any]:
    """With keywords that are enforced by others, annotations, and what asks for nothing."""
    rng = random.Random(seed)
    names = ["kind", "a", "b", "c"]
    found: dict[str, Any] = {
        "$schema": "http://json-schema.org/schema#",
        "title": "T",
        "type": "object",
        "properties": {"kind": {"enum": ["x", "y", "z"]}} | {name: _any(rng, 1) for name in "abc"},
        "required": rng.sample(names, rng.randrange(3)),
        "additionalProperties": rng.choice([True, False, {"type": "integer"}]),
    }
    is_x = {"properties": {"kind": {"const": "x"}}, "required": ["kind"]}
    more: list[dict[str, Any]] = [
        {"if": is_x, "then": {"required": ["a"]}, "else": {"properties": {"b": {"type": "null"}}}},
        {"not": {"properties": {"kind": {"const": "y"}}, "required": ["kind", "c"]}},
        {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {"c": {"required": ["kind"]}}},
        {"oneOf": [{"required": ["a"]}, {"required": ["b", "c"]}]},
        {"minProperties": rng.randrange(4)},
        {"maxProperties": rng.randrange(2, 6)},
        {"propertyNames": {"maxLength": 4}},
        {"propertyNames": {"enum": ["kind", "a", "b", "c", "d"]}},
        {"allOf": [{"properties": {"d": {"type": "string"}}}], "unevaluatedProperties": False},
    ]
    for one in rng.sample(more, rng.randrange(1, 4)):
        found |= one
    if rng.random() < 0.5:  # the order of keywords means nothing
        found = dict(rng.sample(list(found.items()), len(found)))
    return found
