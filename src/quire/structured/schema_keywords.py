"""Every keyword of JSON Schema (2020-12 and back to draft 4) and of OpenAPI 3.0, and how it is handled.

The only such table: `schema.py` reads from it which keys it handles, docs/json-schema.md is generated
from it, and tests/structured/test_schema_keywords.py tests the examples of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["enforced", "in part", "ignored", "refused"]

UNBOUNDED = "no JSON value can be compared with all earlier ones while it is written"


@dataclass(frozen=True, slots=True)
class Keyword:
    """One keyword. An example is a schema with a value that it accepts and one that it rejects, or a
    refused schema."""

    name: str
    vocabulary: str
    fate: Fate
    note: str
    schema: dict[str, Any] | None = None
    valid: tuple[Any, ...] = ()
    invalid: tuple[Any, ...] = ()
    refused: tuple[dict[str, Any], ...] = ()
    """Schemas that demand what cannot be enforced: status 400."""
    nothing: tuple[dict[str, Any], ...] = ()
    """Forms that demand nothing: dropped."""


def _k(name: str, vocabulary: str, fate: Fate, note: str, **examples: Any) -> Keyword:
    return Keyword(name, vocabulary, fate, note, **examples)


_OBJECT = {"type": "object"}
_AB = {"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False}
_ITEMS = {"type": "array", "items": {"type": "integer"}}
_DEFS = {"x": {"$anchor": "here", "type": "integer"}}

KEYWORDS: tuple[Keyword, ...] = (
    # --- core ---
    _k(
        "$ref", "core", "enforced",
        "Inside the schema: a JSON pointer into any part of it, an `$anchor`, or an `$id`. Keywords beside it count in every draft. Nothing is fetched.",
        schema={"$ref": "#/$defs/x", "maximum": 5, "$defs": {"x": {"type": "integer"}}},
        valid=(1,), invalid=("a", 6), refused=({"$ref": "http://example.com/other.json"}, {"$ref": "#/nowhere"}),
    ),
    _k(
        "$dynamicRef", "core", "in part", "As `$ref`, where one place only has that name.",
        schema={"$dynamicRef": "#n", "$defs": {"x": {"$dynamicAnchor": "n", "type": "integer"}}},
        valid=(1,), invalid=("a",),
        refused=({
            "$dynamicRef": "#n",
            "$defs": {
                "x": {"$id": "http://x/1", "$dynamicAnchor": "n"},
                "y": {"$id": "http://x/2", "$dynamicAnchor": "n", "type": "integer"},
            },
        },),
    ),
    _k(
        "$recursiveRef", "core", "in part", "As `$ref` to the whole, in a schema without an inner `$id`.",
        schema={"type": "array", "items": {"$recursiveRef": "#"}}, valid=([], [[[]]]), invalid=([1],),
        refused=({"$recursiveRef": "#", "$defs": {"x": {"$id": "http://x/1"}}},),
    ),
    _k(
        "$anchor", "core", "enforced", "Names the target of a `$ref`.",
        schema={"$ref": "#here", "$defs": _DEFS}, valid=(1,), invalid=("a",),
    ),
    _k(
        "$dynamicAnchor", "core", "enforced", "Names the target of a `$ref` or `$dynamicRef`.",
        schema={"$ref": "#n", "$defs": {"x": {"$dynamicAnchor": "n", "type": "integer"}}},
        valid=(1,), invalid=("a",),
    ),
    _k(
        "$id", "core", "enforced", "The address that references are relative to.",
        schema={
            "$id": "http://x/root",
            "$ref": "part",
            "$defs": {"p": {"$id": "part", "type": "integer"}},
        },
        valid=(1,), invalid=("a",),
    ),
    _k(
        "$defs", "core", "enforced", "Where references lead. A part that nothing refers to is not looked at.",
        schema={"$ref": "#/$defs/x", "$defs": _DEFS}, valid=(1,), invalid=("a",),
        nothing=({"$defs": {}}, {"$defs": {"x": {"uniqueItems": True}}}),
    ),
    _k(
        "definitions", "core (draft 7)", "enforced", "As `$defs`.",
        schema={"$ref": "#/definitions/x", "definitions": _DEFS}, valid=(1,), invalid=("a",),
        nothing=({"definitions": {}},),
    ),
    _k("$schema", "core", "ignored", "At any depth and with any value: every schema is read as 2020-12, and the older forms in this table too.",
       nothing=({"$schema": "https://json-schema.org/draft-07/schema#"}, {"$schema": "nonsense"}, {"$schema": 4})),
    _k("$vocabulary", "core", "ignored", "For authors of vocabularies.", nothing=({"$vocabulary": {"x": True}},)),
    _k("$comment", "core", "ignored", "Annotation.", nothing=({"$comment": "x"},)),
    _k("$recursiveAnchor", "core", "ignored", "See `$recursiveRef`.", nothing=({"$recursiveAnchor": True},)),
    _k("id", "core (draft 4)", "ignored", "References inside the schema do not need it.", nothing=({"id": "http://x/y"},)),
    # --- applicators ---
    _k("allOf", "applicator", "enforced", "",
       schema={"type": "integer", "allOf": [{"minimum": 2}, {"maximum": 3}]}, valid=(2, 3), invalid=(1, 4),
       nothing=({"allOf": []}, {"allOf": [True, {}]})),
    _k("anyOf", "applicator", "enforced", "",
       schema={"anyOf": [{"type": "integer"}, {"const": "x"}]}, valid=(1, "x"), invalid=("y", None),
       nothing=({"anyOf": [{}, {"type": "null"}]},), refused=({"anyOf": []},)),
    _k("oneOf", "applicator", "in part",
       "Where the alternatives provably exclude each other (other types, constants, required properties), or where each of at most 8 can be negated, see `not`. Else a value that fits two of them could not be kept out.",
       schema={"oneOf": [
           {"type": "object", "properties": {"t": {"const": "a"}, "n": {"type": "integer"}}, "required": ["t", "n"]},
           {"type": "object", "properties": {"t": {"const": "b"}}, "required": ["t"]},
       ]},
       valid=({"t": "a", "n": 1}, {"t": "b"}), invalid=({"t": "a"}, {"t": "c"}, {}),
       nothing=({"oneOf": [{}, False]},),
       refused=({"oneOf": [{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}]}, {"oneOf": []})),
    _k("not", "applicator", "in part",
       "Where the opposite can be said: of `type` (but not of integer alone), `const` and `enum` of plain values, `required`, `properties`, bounds and lengths, and of `allOf`, `anyOf` and `not` of these.",
       schema={"type": "string", "not": {"enum": ["a", "ab"]}}, valid=("", "b", "abc"), invalid=("a", "ab"),
       nothing=({"not": False}, {"not": {"not": {}}}),
       refused=({"not": {"pattern": "a"}}, {"not": {"type": "integer"}})),
    _k("if", "applicator", "in part",
       "With `then` or `else`, where the opposite of the condition can be said, see `not`. Alone it asks for nothing.",
       schema={
           "type": "object", "properties": {"k": {"enum": ["a", "b"]}, "n": {"type": "integer"}}, "required": ["k"],
           "if": {"properties": {"k": {"const": "a"}}, "required": ["k"]}, "then": {"required": ["n"]},
           "else": {"properties": {"n": False}},
       },
       valid=({"k": "a", "n": 1}, {"k": "b"}), invalid=({"k": "a"}, {"k": "b", "n": 1}),
       nothing=({"if": {"type": "integer"}}, {"if": False, "then": {"type": "integer"}}, {"if": {"uniqueItems": True}, "then": {}}),
       refused=({"if": {"pattern": "a"}, "then": {"minLength": 3}},)),
    _k("then", "applicator", "in part", "See `if`; alone it asks for nothing.",
       schema={"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 7}}, valid=(4, 7), invalid=(8,),
       nothing=({"then": {"type": "integer"}},)),
    _k("else", "applicator", "in part", "See `if`; alone it asks for nothing.",
       schema={"type": "integer", "if": {"minimum": 5}, "else": {"maximum": 2}}, valid=(2, 7), invalid=(3, 4),
       nothing=({"else": {"type": "integer"}},)),
    _k("dependentSchemas", "applicator", "enforced", "",
       schema=_AB | {"dependentSchemas": {"a": {"required": ["b"]}}},
       valid=({}, {"b": 1}, {"a": 1, "b": 1}), invalid=({"a": 1},),
       nothing=({"dependentSchemas": {}}, {"dependentSchemas": {"a": {}}})),
    _k("prefixItems", "applicator", "enforced", "",
       schema={"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
       valid=([], [1], [1, "a"]), invalid=(["a"], [1, "a", 1]), nothing=({"prefixItems": []},)),
    _k("items", "applicator", "enforced", "A schema, or draft 7's list of them (with `additionalItems`).",
       schema=_ITEMS, valid=([], [1, 2]), invalid=(["a"],), nothing=({"items": {}}, {"items": True})),
    _k("additionalItems", "applicator (draft 7)", "enforced", "Beside a list of `items`; else it asks for nothing.",
       schema={"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "string"}},
       valid=([1], [1, "a"]), invalid=([1, 1],),
       nothing=({"additionalItems": True}, {"additionalItems": False}, {"items": {}, "additionalItems": False})),
    _k("contains", "applicator", "in part",
       "Where every item fits (then it is `minItems` and `maxItems`), or with `minContains` 0. Else which item shall fit is not known while the list is written.",
       schema={"type": "array", "contains": {}, "minContains": 2, "maxContains": 3},
       valid=([1, 1], [1, 1, 1]), invalid=([1], [1, 1, 1, 1]),
       nothing=({"contains": {"const": 1}, "minContains": 0},),
       refused=({"contains": {"const": 1}}, {"contains": {"const": 1}, "minContains": 0, "maxContains": 2})),
    _k("properties", "applicator", "enforced",
       "In the order in which the schema lists them, then those that only `required` names, then others.",
       schema=_AB, valid=({}, {"a": 1, "b": 2}), invalid=({"c": 1},), nothing=({"properties": {}},)),
    _k("patternProperties", "applicator", "enforced", "Patterns must not overlap. A name may be written twice.",
       schema={"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
       valid=({}, {"x1": 1}), invalid=({"x1": "a"}, {"y": 1}), nothing=({"patternProperties": {}},),
       refused=({"type": "object", "patternProperties": {"a": {"type": "integer"}, "b": {"type": "string"}}},)),
    _k("additionalProperties", "applicator", "enforced", "A name may be written twice.",
       schema={"type": "object", "additionalProperties": {"type": "integer"}}, valid=({}, {"z": 1}), invalid=({"z": "a"},),
       nothing=({"additionalProperties": True}, {"additionalProperties": {}})),
    _k("propertyNames", "applicator", "in part",
       "Constants, an `enum` (also by `$ref` or `anyOf`), one `pattern`, one of `format` uuid, date, date-time, or lengths alone.",
       schema={"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
       valid=({}, {"ab": 1}), invalid=({"A": 1}, {"ab": "x"}),
       nothing=({"propertyNames": {}}, {"propertyNames": True}, {"propertyNames": {"type": "string"}},
                {"propertyNames": {"type": "string", "minLength": 0, "title": "t"}}),
       refused=({"propertyNames": {"pattern": "a", "minLength": 3}},)),
    _k("unevaluatedItems", "unevaluated", "in part",
       "Where the items that other keywords cover are known beforehand: not beside `anyOf`, `oneOf`, `if`, `allOf`, `$ref` or `contains`.",
       schema={"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
       valid=([], [1]), invalid=([1, 2],),
       nothing=({"unevaluatedItems": True}, {"unevaluatedItems": {}}, {"items": {}, "unevaluatedItems": False}),
       refused=({"anyOf": [_ITEMS, {"minItems": 1}], "unevaluatedItems": False},)),
    _k("unevaluatedProperties", "unevaluated", "in part",
       "Where the properties that other keywords cover are known beforehand: beside `allOf` and `$ref`, but not `anyOf`, `oneOf`, `if` or `dependentSchemas`.",
       schema={
           "$defs": {"base": {"properties": {"a": {"type": "integer"}}}},
           "type": "object", "allOf": [{"$ref": "#/$defs/base"}], "properties": {"b": {}}, "unevaluatedProperties": False,
       },
       valid=({"a": 1, "b": 1}, {}), invalid=({"c": 1},),
       nothing=({"unevaluatedProperties": True}, {"unevaluatedProperties": {}}, {"additionalProperties": {}, "unevaluatedProperties": False}),
       refused=({"anyOf": [{"properties": {"a": {"type": "integer"}}}, {"type": "object"}], "unevaluatedProperties": False},)),
    _k("dependencies", "applicator (draft 7)", "enforced", "As `dependentRequired` and `dependentSchemas`.",
       schema=_AB | {"dependencies": {"a": ["b"]}}, valid=({}, {"b": 1}, {"a": 1, "b": 1}), invalid=({"a": 1},),
       nothing=({"dependencies": {}}, {"dependencies": {"a": [], "b": {}}})),
    # --- validation ---
    _k("type", "validation", "enforced", "Whole numbers are written without a fraction.",
       schema={"type": ["integer", "null"]}, valid=(1, None), invalid=("a", 1.5), refused=({"type": "any"}, {"type": []}, {"type": 3})),
    _k("enum", "validation", "enforced", "Whole numbers beyond 2^53 must be exact as a double.",
       schema={"enum": ["a", 1, None, {"x": [1]}]}, valid=("a", 1, None, {"x": [1]}), invalid=("b", 2, {"x": [2]}),
       refused=({"enum": []}, {"enum": [9007199254740993]}, {"enum": "a"})),
    _k("const", "validation", "enforced", "As an `enum` of one.",
       schema={"const": None}, valid=(None,), invalid=(0, "null"), refused=({"const": 9007199254740993},)),
    _k("multipleOf", "validation", "enforced", "",
       schema={"type": "number", "multipleOf": 0.5}, valid=(1, 1.5), invalid=(1.25,), refused=({"multipleOf": 0}, {"multipleOf": True}), ),
    _k("maximum", "validation", "enforced", "Bounds farther out than 9223372036854774784 are drawn in to it; whole bounds beyond 2^53 to the next double inside.",
       schema={"type": "number", "maximum": 1e1}, valid=(10, -3.5), invalid=(10.5,), refused=({"maximum": "1"}, {"maximum": True})),
    _k("minimum", "validation", "enforced", "See `maximum`.",
       schema={"type": "integer", "minimum": 3.0}, valid=(3,), invalid=(2,), refused=({"minimum": 1e300},)),
    _k("exclusiveMaximum", "validation", "enforced", "A number, or draft 4's true beside `maximum`.",
       schema={"type": "integer", "maximum": 3, "exclusiveMaximum": True}, valid=(2,), invalid=(3,),
       nothing=({"exclusiveMaximum": False}, {"exclusiveMaximum": True})),
    _k("exclusiveMinimum", "validation", "enforced", "A number, or draft 4's true beside `minimum`.",
       schema={"type": "integer", "exclusiveMinimum": 3}, valid=(4,), invalid=(3,),
       nothing=({"exclusiveMinimum": False}, {"exclusiveMinimum": True})),
    _k("maxLength", "validation", "enforced", "In characters.",
       schema={"type": "string", "maxLength": 2.0}, valid=("", "üx"), invalid=("abc",),
       nothing=({"maxLength": 9007199254740991},), refused=({"maxLength": -1}, {"maxLength": 1.5}, {"maxLength": True})),
    _k("minLength", "validation", "enforced", "In characters.",
       schema={"type": "string", "minLength": 2.0}, valid=("ab",), invalid=("a",),
       nothing=({"minLength": 0},), refused=({"minLength": "2"}, {"minLength": 1e12})),
    _k("pattern", "validation", "enforced", "A regex without look-around and back-references, found anywhere in the text; `\\d` is 0 to 9. One with them is left out, with a warning, beside a `format` that is enforced (zod 4's email has both). A class that excludes one of `\"` and `\\\\`, as `[^\"]` does, still allows it (llguidance); `\\S` allows U+FEFF.",
       schema={"type": "string", "pattern": "b"}, valid=("abc",), invalid=("xyz",), refused=({"pattern": "(?=a)b"}, {"pattern": 3})),
    _k("maxItems", "validation", "enforced", "",
       schema=_ITEMS | {"maxItems": 2.0}, valid=([1, 1],), invalid=([1, 1, 1],), nothing=({"maxItems": 4294967296},)),
    _k("minItems", "validation", "enforced", "",
       schema=_ITEMS | {"minItems": 1}, valid=([1],), invalid=([],), nothing=({"minItems": 0},)),
    _k("uniqueItems", "validation", "refused", f"True cannot be enforced: {UNBOUNDED}. False asks for nothing, as does true where `maxItems` is 0 or 1.",
       nothing=({"uniqueItems": False}, ), refused=({"uniqueItems": True}, {"type": "array", "uniqueItems": True, "maxItems": 2})),
    _k("maxContains", "validation", "in part", "See `contains`, without which it asks for nothing.",
       schema={"type": "array", "contains": True, "maxContains": 1}, valid=([1],), invalid=([], [1, 1]),
       nothing=({"maxContains": 1},)),
    _k("minContains", "validation", "in part", "See `contains`, without which it asks for nothing.",
       schema={"type": "array", "contains": True, "minContains": 2}, valid=([1, 1],), invalid=([1],),
       nothing=({"minContains": 2}, {"minContains": 0})),
    _k("maxProperties", "validation", "in part", "Beside at most 5 properties that are not required, or where only 1 of them is counted.",
       schema={"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1},
       valid=({}, {"b": 1}, {"z": 1}), invalid=({"a": 1, "b": 1}, {"a": 1, "z": 1}),
       nothing=({"maxProperties": 4294967296},),
       refused=({"type": "object", "properties": {name: {} for name in "abcdef"}, "maxProperties": 3},)),
    _k("minProperties", "validation", "in part", "As `maxProperties`; 1 always.",
       schema={"type": "object", "properties": {name: {} for name in "abcdef"}, "minProperties": 1},
       valid=({"b": 1}, {"a": 1, "f": 2}, {"z": 1}), invalid=({},),
       nothing=({"minProperties": 0},),
       refused=({"type": "object", "properties": {name: {} for name in "abcdef"}, "minProperties": 3},)),
    _k("required", "validation", "enforced", "",
       schema=_OBJECT | {"required": ["a"]}, valid=({"a": 1},), invalid=({}, {"b": 1}),
       nothing=({"required": []}, {"required": False}), refused=({"required": True}, {"required": "a"}, {"required": [1]})),
    _k("dependentRequired", "validation", "enforced", "",
       schema=_AB | {"dependentRequired": {"a": ["b"]}}, valid=({}, {"b": 1}, {"a": 1, "b": 1}), invalid=({"a": 1},),
       nothing=({"dependentRequired": {}}, {"dependentRequired": {"a": []}})),
    # --- format, content, annotations ---
    _k("format", "format", "in part", "Of strings; see below. One that is not listed is accepted and named in a warning; beside a `type` without string it asks for nothing.",
       schema={"type": "string", "format": "date"}, valid=("2024-02-29",), invalid=("2024-13-01", "x"),
       nothing=({"type": "integer", "format": "int64"}, {"format": "password"})),
    *(
        _k(name, "content" if name.startswith("content") else "meta-data", "ignored", "Annotation.", nothing=({name: value},))
        for name, value in (
            ("contentEncoding", "base64"), ("contentMediaType", "application/json"), ("contentSchema", {"type": "object"}),
            ("title", "x"), ("description", "x"), ("default", {"uniqueItems": True}), ("deprecated", True), ("readOnly", True),
            ("writeOnly", True), ("examples", [1]),
        )
    ),
    # --- OpenAPI 3.0, and others ---
    _k("nullable", "OpenAPI 3.0", "enforced", "True beside a `type` allows null too.",
       schema={"type": "string", "nullable": True}, valid=("a", None), invalid=(1,), nothing=({"nullable": False}, {"nullable": True})),
    *(
        _k(name, "OpenAPI 3.0", "ignored", "Annotation.", nothing=({name: value},))
        for name, value in (
            ("discriminator", {"propertyName": "kind"}), ("example", 1), ("xml", {"name": "x"}), ("externalDocs", {"url": "x"}),
        )
    ),
    _k("x-guidance", "llguidance", "in part", "At the top: options of the grammar engine, among them `lenient`, which ignores what would be refused.",
       schema={"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, valid=([1, 1],), invalid=({},),
       nothing=({"x-guidance": {}},)),
    _k("any other key", "", "ignored", "Such as `x-order` or a misspelling.", nothing=({"x-order": 1, "requierd": ["a"]},)),
)  # fmt: skip

BY_NAME = {keyword.name: keyword for keyword in KEYWORDS}
READ = frozenset(
    keyword.name
    for keyword in KEYWORDS
    if keyword.fate != "ignored" and keyword.name not in ("x-guidance", "$id", "$defs", "definitions")
    and not keyword.name.endswith(("$anchor", "Anchor"))
)  # fmt: skip
"""The keywords for which `schema.py` has a rule; others are left out."""

FORMATS: dict[str, tuple[str, str]] = {
    "date": ("2024-02-29", "2024-02-30"),
    "time": ("12:00:00Z", "24:00:00Z"),
    "date-time": ("2024-02-29T12:00:00Z", "2024-02-29"),
    "duration": ("P1DT2H", "1 day"),
    "email": ("a@example.com", "a.example.com"),
    "hostname": ("example.com", "-x"),
    "ipv4": ("127.0.0.1", "256.0.0.1"),
    "ipv6": ("::1", "12345::"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    "uri": ("http://example.com/a?b#c", "a b"),
}
"""Formats that are enforced, each with a text that matches it and one that does not."""

_YEARS_OF_366_DAYS = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAY = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_YEARS_OF_366_DAYS}-02-29)"
)
_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"(?:{_MINUTE}:[0-5]|23:59:60(?:[.][0-9]+)?(?:[zZ]|[+-]00:00)$)"
FORMAT_RULES: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{_DAY}"},
    "time": {"pattern": f"^{_TIME}"},
    "date-time": {"pattern": f"^{_DAY}[tT]{_TIME}"},
    "hostname": {"maxLength": 253},
}
"""What llguidance's own regex for the format does not check: 29 February, leap seconds (only those written as
23:59:60 UTC), the whole length."""
NAME_FORMATS = {
    "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "date": f"^{_DAY}$",
    "date-time": f"^{_DAY}[tT]{_MINUTE}:[0-5][0-9]([.][0-9]+)?([zZ]|[+-]{_MINUTE})$",
}
"""Formats that `propertyNames` may demand, as patterns of names."""
