"""The pass that prepares schemas: what it leaves, moves and refuses, and that it allows nothing more."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import jsonschema_rs
import pytest

from quire.errors import InvalidParameterError
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import GrammarError
from quire.structured.schema import prepare
from quire.structured.schema_logic import Logic, all_texts_but
from quire.structured.spec import Limits, to_spec, wanted
from quire.text.parsing.forcing import forced_calls
from quire.text.parsing.formats import PLAIN_JSON
from tests.structured.conftest import Kit
from tests.structured.mcp_tools import mcp_tools
from tests.structured.schemas import conditional_schema
from tests.structured.test_schema_keywords import text
from tests.structured.test_walks import as_double, walk

INTEGER = {"type": "integer"}
RECORD = {"type": "object", "additionalProperties": INTEGER}
KEYWORD_NAMES = ["$schema", "$ref", "$id", "if", "not", "uniqueItems", "propertyNames", "format", "type", "enum"]  # fmt: skip


def check(kit: Kit, schema: object, good: list[Any], bad: list[Any]) -> None:
    grammar = kit.compile(json=schema)
    assert [value for value in good if not kit.accepts(grammar.matcher(), text(value))] == []
    assert [value for value in bad if kit.accepts(grammar.matcher(), text(value))] == []


# --- the field reports ---


@pytest.mark.parametrize(
    "more",
    [
        {"propertyNames": {"type": "string"}},
        {"propertyNames": {}},
        {"uniqueItems": False},
        {"dependentRequired": {}},
        {"unevaluatedProperties": True},
        {"if": {"required": ["a"]}},
        {"contains": {"type": "integer"}, "minContains": 0},
        *({"$schema": address} for address in (
            "https://json-schema.org/draft-07/schema#",
            "http://json-schema.org/draft/2020-12/schema",
            "http://json-schema.org/schema#",
            "https://spec.openapis.org/oas/3.1/dialect/base",
        )),
    ],
)  # fmt: skip
def test_the_same_language_as_without(more: dict[str, Any]) -> None:
    for schema in (RECORD | more, more | RECORD):
        assert prepare(schema).schema == RECORD
        deep = {"type": "array", "items": {"anyOf": [schema, {"type": "null"}]}}
        plain = {"type": "array", "items": {"anyOf": [RECORD, {"type": "null"}]}}
        assert prepare(deep).schema == plain


def test_a_zod_record(kit: Kit) -> None:
    check(kit, RECORD | {"propertyNames": {"type": "string"}}, [{}, {"a": 1}], [{"a": "b"}])


@pytest.mark.parametrize(
    "keyword", ["minLength", "maxLength", "minItems", "maxProperties", "items"]
)
def test_null_is_as_if_absent(keyword: str) -> None:
    assert prepare({"type": "array", keyword: None}).schema == {"type": "array"}


def test_numbers_are_numbers() -> None:
    schema = {
        "minLength": 2.0,
        "minimum": 1e2,
        "maxItems": 3.0,
        "multipleOf": 1.0,
        "maximum": 2**70,
    }
    assert prepare(schema).schema == {
        "minimum": 100, "maximum": 9223372036854774784, "multipleOf": 1, "minLength": 2, "maxItems": 3,
    }  # fmt: skip


def test_bounds_of_64_bits(kit: Kit) -> None:
    """As the schemas of C#, Go and Rust have them."""
    signed = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    check(kit, signed, [0, -5, 2**62, -(2**62)], [2**63, -(2**63) - 1])
    check(kit, INTEGER | {"minimum": 0, "maximum": 2**64 - 1}, [0, 2**62], [-1, 2**64])
    check(
        kit, {"type": "number", "minimum": -1.797e308, "maximum": 1.797e308}, [0, -1.5, 1e9], ["a"]
    )
    check(kit, INTEGER | {"maximum": 2**53 + 3}, [2**53], [2**53 + 4])


# --- names and values are no keywords ---


def test_properties_named_like_keywords(kit: Kit) -> None:
    names = dict.fromkeys(KEYWORD_NAMES, INTEGER)
    schema = {"type": "object", "properties": names, "required": KEYWORD_NAMES}
    assert prepare(schema).schema["properties"] == names
    value = dict.fromkeys(KEYWORD_NAMES, 3)
    check(kit, schema, [value], [dict.fromkeys(KEYWORD_NAMES[:-1], 3), value | {"if": "x"}])


def test_values_are_left_alone(kit: Kit) -> None:
    value = {"uniqueItems": True, "$ref": "x", "description": "d", "minLength": 2, "nullable": None}
    schema = {"const": value, "default": {"$ref": 3}, "examples": [{"if": 1}]}
    assert prepare(schema).schema == {"const": value}
    assert prepare({"enum": [value, 1]}).schema == {"enum": [value, 1]}
    check(kit, schema, [value], [{}, {"uniqueItems": True}])


@pytest.mark.parametrize(
    "schema", [mcp_tools(3)[2]["function"]["parameters"], conditional_schema(4)]
)
def test_the_clients_schema_is_not_changed(schema: dict[str, Any]) -> None:
    before = copy.deepcopy(schema)
    prepare(schema, close=True)
    assert schema == before


# --- references ---

LIST = {
    "type": "object",
    "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
PAIR = {"type": "object", "required": ["a", "b"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (PAIR | {"properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}}}, {"a": 1, "b": 2}, {"a": 1, "b": "x"}),
        (LIST, {"v": 1, "next": {"v": 2, "next": None}}, {"v": 1, "next": {"v": "x", "next": None}}),
        ({"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": INTEGER}}, 1, "x"),
        ({"$ref": "#/components/schemas/X", "components": {"schemas": {"X": INTEGER}}}, 1, "x"),
        ({"items": [INTEGER, {"$ref": "#/items/0"}], "minItems": 2}, [1, 2], [1, "x"]),
        ({"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": INTEGER}}, 1, "x"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/y"}, "y": INTEGER}}, 1, "x"),
        (PAIR | {"properties": {"a": {"$ref": "#/properties/b/not"}, "b": {"not": INTEGER | {"type": "null"}}}},
         {"a": None, "b": 1}, {"a": None, "b": None}),
        ({"$id": "http://e.com/a", "$ref": "http://e.com/a#n", "$defs": {"x": {"$anchor": "n", **INTEGER}}}, 1, "x"),
        ({"$ref": "b.json", "$defs": {"x": {"$id": "b.json", **INTEGER}}}, 1, "x"),
        ({"$id": "urn:x:y", "$ref": "#/$defs/x", "$defs": {"x": INTEGER}}, 1, "x"),
        ({"$ref": "#n", "definitions": {"x": {"$id": "#n", **INTEGER}}}, 1, "x"),
        ({"$ref": "#/$defs/yes", "$defs": {"yes": True}}, {"any": 1}, None),
        ({"$ref": "#/examples/0", "examples": [INTEGER]}, 1, "x"),
    ],
)  # fmt: skip
def test_references(kit: Kit, schema: dict[str, Any], good: object, bad: object) -> None:
    check(kit, schema, [good], [bad] if bad is not None else [])


def test_a_part_that_nothing_refers_to_is_not_looked_at() -> None:
    assert prepare({"type": "string", "$defs": {"x": {"uniqueItems": True}}}).schema == {
        "type": "string"
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"oneOf": [{"$ref": "#"}, {"type": "null"}]},
        {"not": {"$ref": "#"}},
        {"$ref": "#/$defs"},
        {"$ref": 3},
        {"$ref": "#/type", "type": "null"},
        {"type": "array", "items": [1]},
        {"type": "object", "properties": {"a": 1}},
        {"type": "object", "properties": []},
        {"allOf": {}},
        {"minimum": float("nan")},
        {"const": float("inf")},
        {"$defs": {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"pattern": "x"}]} for i in range(500)} | {
            "d500": {"minLength": 3}}, "$ref": "#/$defs/d0"},
        {"not": {"$ref": "#/$defs/d0"}, "$defs": {
            f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(60)} | {"d60": {"minLength": 1}}},
    ],
)  # fmt: skip
def test_hostile_and_malformed_schemas_are_refused(kit: Kit, schema: dict[str, Any]) -> None:
    """Or have a grammar without a text, which the check before a request refuses."""
    try:
        matcher = kit.matcher(json=schema)
    except InvalidParameterError as error:
        refusal = error
    else:
        assert kit.allowed(matcher) == []
        return
    assert refusal.param == "structured_outputs" and len(str(refusal)) < 500


def test_deep_schemas_from_python_are_refused() -> None:
    schema: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"not": {"anyOf": [{}, schema]}}
        shared = {"anyOf": [shared, {"if": shared}]}
    with pytest.raises(InvalidParameterError, match="deep"):
        prepare(shared)
    with pytest.raises(InvalidParameterError, match="deep"):
        prepare(schema)
    with pytest.raises(InvalidParameterError, match="nested deeper"):
        to_spec(StructuredOutputsParams(json=schema))


def test_a_long_chain_of_definitions_is_no_recursion() -> None:
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(5000)}
    found = prepare({"$ref": "#/$defs/d0", "$defs": chain | {"d5000": INTEGER}}).schema
    assert len(found["$defs"]) == 5001


# --- what is said in other words ---

UNION = {
    "$defs": {
        "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "n": INTEGER}, "required": ["kind", "n"]},
        "Dog": {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
    },
    "type": "object",
    "properties": {"pet": {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}},
    }},
    "required": ["pet"],
}  # fmt: skip
A, B = {"required": ["a"]}, {"required": ["b"]}
TWO = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "additionalProperties": False}
OPTIONAL = {"type": "object", "properties": dict.fromkeys("abc", INTEGER)}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (UNION, [{"pet": {"kind": "cat", "n": 1}}, {"pet": {"kind": "dog"}}], [{"pet": {"kind": "cat"}}, {"pet": {}}]),
        (TWO | {"oneOf": [A, B]}, [{"a": 1}, {"b": 1}], [{}, {"a": 1, "b": 1}]),
        (TWO | {"anyOf": [A, B]}, [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}], [{}]),
        (TWO | {"not": A}, [{}, {"b": 1}], [{"a": 1}]),
        (TWO | {"anyOf": [A], "oneOf": [B, {"maxProperties": 0}]}, [{"a": 1, "b": 1}], [{}, {"a": 1}, {"b": 1}]),
        ({"oneOf": [{"type": "string", "minLength": 3}, {"type": "string", "maxLength": 5}]}, ["a", "abcdef"], ["abcd", 1]),
        ({"oneOf": [{"type": "integer", "maximum": 5}, {"type": "number", "minimum": 6}]}, [5, 6, 7.5], [5.5]),
        ({"not": {"enum": [1, "a", None, True]}}, [2, 0.5, "b", False, [], {}], [1, "a", None, True]),
        ({"type": "string", "not": {"anyOf": [{"const": "ü"}, {"minLength": 3}]}}, ["", "u", "üü"], ["ü", "abc"]),
        ({"type": ["string", "null"], "not": {"type": "null"}}, ["a"], [None]),
        (TWO | {"dependentRequired": {"a": ["b"], "b": ["a"]}}, [{}, {"a": 1, "b": 1}], [{"a": 1}, {"b": 1}]),
        (TWO | {"dependentSchemas": {"a": False}}, [{}, {"b": 1}], [{"a": 1}]),
        (RECORD | {"propertyNames": {"enum": ["a", "b"]}}, [{}, {"a": 1}, {"a": 1, "b": 2}], [{"c": 1}, {"a": "x"}]),
        ({"type": "object", "propertyNames": {"$ref": "#/$defs/E"}, "$defs": {"E": {"enum": ["a"]}}}, [{"a": 1}], [{"b": 1}]),
        (RECORD | {"propertyNames": {"minLength": 2, "maxLength": 3}}, [{"ab": 1}], [{"a": 1}, {"abcd": 1}]),
        (RECORD | {"propertyNames": {"format": "uuid"}}, [{"123e4567-e89b-12d3-a456-426614174000": 1}], [{"1": 1}]),
        (TWO | {"propertyNames": {"pattern": "^b"}}, [{}, {"b": 1}], [{"a": 1}]),
        ({"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
        (OPTIONAL | {"minProperties": 2}, [{"a": 1, "c": 1}, {"b": 1, "z": 1}], [{}, {"b": 1}]),
        (OPTIONAL | {"minProperties": 1, "maxProperties": 2, "required": ["a"]}, [{"a": 1}, {"a": 1, "z": 0}], [{"a": 1, "b": 1, "c": 1}]),
        (OPTIONAL | {"maxProperties": 9, "additionalProperties": False}, [{}, {"a": 1, "b": 1, "c": 1}], [{"z": 1}]),
        ({"type": "string", "nullable": True, "enum": ["a", None]}, ["a", None], ["b"]),
        ({"type": "array", "items": [INTEGER], "additionalItems": False}, [[], [1]], [["a"], [1, 1]]),
        ({"contains": INTEGER, "items": INTEGER, "type": "array", "minItems": 0}, [[1]], [[]]),
        ({"type": "object", "unevaluatedProperties": INTEGER, "properties": {"a": {}}}, [{"a": "x", "b": 1}], [{"b": "x"}]),
        ({"if": {"type": "string"}, "then": {"maxLength": 1}, "else": {"type": "null"}}, ["a", None], ["ab", 1]),
    ],
)  # fmt: skip
def test_equivalents(kit: Kit, schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    check(kit, schema, good, bad)


def test_the_properties_keep_their_order(kit: Kit) -> None:
    """What is said besides, in other words, comes after what the schema lists."""
    schema = {
        "dependentRequired": {"c": ["a"]}, "$ref": "#/$defs/base",
        "properties": {"c": INTEGER, "a": INTEGER}, "$defs": {"base": {"properties": {"z": INTEGER}}}, "type": "object",
    }  # fmt: skip
    grammar = kit.compile(json=schema)
    assert kit.accepts(grammar.matcher(), '{"z":1,"c":1,"a":1}')
    assert not kit.accepts(grammar.matcher(), '{"a":1,"c":1}')


def test_a_narrowed_bound_is_not_turned_around() -> None:
    """Its complement would allow more than is asked."""
    for schema in (
        {"not": {"maximum": 1e20}},
        {"not": {"$ref": "#/$defs/x"}, "$defs": {"x": {"maximum": 1e20}}},
        {"if": {"minimum": -1e20}, "then": {"type": "string"}},
    ):
        with pytest.raises(InvalidParameterError, match="cannot be enforced"):
            prepare(schema)


def test_all_texts_but_some(kit: Kit) -> None:
    texts = ["", "a", "ab", "x\n", "🙂b", "a-b]", "^"]
    grammar = kit.compile(json={"type": "string", "pattern": all_texts_but(texts)})
    others = ["b", "aa", "abc", "\n", "🙂", "🙂bb", "x", '"', "a-b", "^^"]
    assert [t for t in texts if kit.accepts(grammar.matcher(), text(t))] == []
    assert [t for t in others if not kit.accepts(grammar.matcher(), text(t))] == []


def test_complements_by_another_validator() -> None:
    rng = random.Random(0)
    parts = [
        {"type": "string"}, {"enum": ["a", 1]}, {"required": ["a"]}, {"minimum": 2}, {"maxLength": 1}, {"const": None},
        {"properties": {"a": {"type": "number", "maximum": 4}}}, {"type": ["array", "object"]}, {"minItems": 1}, {"maxProperties": 1},
    ]  # fmt: skip
    values = [
        "",
        "a",
        "bc",
        1,
        2,
        2.5,
        None,
        True,
        [],
        [1],
        {},
        {"a": 1},
        {"a": 7},
        {"b": 1, "a": "x"},
    ]
    for _ in range(300):
        schema = {rng.choice(["anyOf", "allOf"]): rng.sample(parts, 2)} | rng.choice(parts)
        complement = Logic(lambda ref: None).complement(schema)
        assert complement is not None
        one, other = map(jsonschema_rs.Draft202012Validator, (schema, complement))
        assert [v for v in values if one.is_valid(v) == other.is_valid(v)] == []


@pytest.mark.parametrize("seed", range(60))
def test_nothing_more_is_allowed(kit: Kit, seed: int) -> None:
    schema = conditional_schema(seed)
    try:
        matcher = kit.matcher(json=schema)
    except GrammarError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "nsatisfiable" in refusal or "min/maxProperties" in refusal
        return
    found = kit.text(walk(kit, matcher, random.Random(seed)))
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    assert validator.is_valid(json.loads(found, parse_float=as_double)), (schema, found)


# --- lenient ---


def test_lenient_ignores_what_is_refused_and_says_so(kit: Kit) -> None:
    schema = {
        "type": "array",
        "uniqueItems": True,
        "contains": INTEGER,
        "x-guidance": {"lenient": True},
    }
    found = wanted(StructuredOutputsParams(json=schema))
    assert "uniqueItems" in found.warnings[0] and "contains" in found.warnings[0]
    assert kit.accepts(kit.compiler.compile(found.spec).matcher(), "[1,1]")


EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


def test_a_pattern_with_look_around_beside_a_format(kit: Kit) -> None:
    """zod 4 writes both for an email."""
    schema = {"type": "string", "format": "email", "pattern": EMAIL}
    found = wanted(StructuredOutputsParams(json=schema))
    assert found.warnings == ("not enforced by the schema: the keywords pattern",)
    check(kit, schema, ["a@example.com"], ["a.example.com"])


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": EMAIL},
        {"pattern": EMAIL, "format": "unknown"},
        {"not": {"type": "string", "format": "email", "pattern": EMAIL}},
    ],
)
def test_other_patterns_with_look_around_are_named(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=r"pattern at .* cannot be enforced: \(\?! is"):
        prepare(schema)


@pytest.mark.parametrize("kind", ["integer", "string"])
def test_a_thousand_optional_properties(kit: Kit, kind: str) -> None:
    names = [f"some_long_property_{i}" for i in range(1000)]
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name in names},
        "additionalProperties": False,
    }
    value = 1 if kind == "integer" else "x"
    check(kit, schema, [{}, {names[0]: value, names[999]: value}], [{"other": value}])


def test_coerce_one_of(kit: Kit) -> None:
    schema = {"oneOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"}
    check(kit, schema | {"x-guidance": {"coerce_one_of": True}}, ["ab", "a"], ["c"])


# --- size ---


def test_descriptions_do_not_count() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "description": "x" * 600_000}},
    }
    assert len(to_spec(StructuredOutputsParams(json=schema)).text) < 300
    assert len(to_spec(StructuredOutputsParams(json=json.dumps(schema))).text) < 300


def test_the_limit_is_an_option() -> None:
    params = StructuredOutputsParams(json={"enum": ["x" * 2000]})
    to_spec(params, limits=Limits(max_bytes=4000))
    with pytest.raises(
        InvalidParameterError, match=r"at most 1000 are allowed .--max-grammar-bytes"
    ):
        to_spec(params, limits=Limits(max_bytes=1000))


@pytest.mark.parametrize("count", [40, 128])
def test_a_large_set_of_tools_can_be_forced(kit: Kit, count: int) -> None:
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in mcp_tools(count)}
    assert count < 128 or len(json.dumps(tools)) > 200_000
    grammar = kit.compile_params(forced_calls(PLAIN_JSON, tools, several=True))
    for name, schema in list(tools.items())[::37]:
        arguments = json.loads(kit.text(walk(kit, kit.matcher(json=schema), random.Random(3))))
        call = text([{"name": name, "parameters": arguments}])
        before, _, after = PLAIN_JSON.listed
        assert PLAIN_JSON.forced is not None
        head, between, tail = PLAIN_JSON.forced
        call = before + head + name + between + text(arguments) + tail + after
        assert kit.accepts(grammar.matcher(), call), call
        assert not kit.accepts(grammar.matcher(), call.replace(name, "tool_999"))


# --- white space ---

BLANK = set(" \n\r\t")
PLACES: dict[str, dict[str, Any]] = {
    "schema": {"json": RECORD},
    "any": {"json": {}},
    "object": {"json_object": True},
    "tag": {"structural_tag": {"format": {
        "type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": RECORD}, "end": "</a>"}}},
    "old tag": {"structural_tag": {"structures": [{"begin": "<a>", "schema": RECORD, "end": "</a>"}], "triggers": ["<a>"]}},
}  # fmt: skip


def longest_blank(kit: Kit, matcher: Any) -> int:
    """Of a model that writes blanks wherever it may, for 400 tokens; the longest first."""
    blanks = [
        token
        for token in range(kit.vocab_size)
        if token <= kit.tokenizer.max_token_id
        and (raw := kit.tokenizer.token_bytes(token))
        and set(raw.decode(errors="replace")) <= BLANK
    ]
    assert blanks
    blanks.sort(key=lambda token: (b"\n" not in kit.tokenizer.token_bytes(token), token))
    longest = run = 0
    in_string = False
    usual = [kit.tokenizer.encode(char, add_special_tokens=False)[0] for char in '":1,a}<']
    for _ in range(400):
        allowed = set(kit.allowed(matcher))
        some = [token for token in blanks if token in allowed and not in_string]
        if some:
            token = some[0]
            run += len(kit.tokenizer.token_bytes(token))
        else:
            longest, run = max(longest, run), 0
            known = [token for token in usual if token in allowed]
            token = known[0] if known else min(allowed)
            in_string ^= kit.tokenizer.token_bytes(token).count(b'"') % 2 == 1
        if token in kit.eos or not matcher.accept(token):
            break
    return max(longest, run)


def inside(kit: Kit, params: dict[str, Any], **more: object) -> Any:
    matcher = kit.matcher(**params, **more)
    start = "<a>{" if "structural_tag" in params else "{"
    for token in kit.tokenizer.encode(start, add_special_tokens=False):
        assert matcher.accept(token)
    return matcher


@pytest.mark.parametrize("place", PLACES)
def test_white_space_ends(kit: Kit, place: str) -> None:
    assert 1 <= longest_blank(kit, inside(kit, PLACES[place])) <= 44
    assert longest_blank(kit, inside(kit, PLACES[place], disable_any_whitespace=True)) == 0
    assert longest_blank(kit, inside(kit, PLACES[place], whitespace_pattern="[ \n]+")) > 44


def test_usual_layouts_are_within_bounds(kit: Kit) -> None:
    value = {"a": [1, {"b": []}], "c": {"d": {"e": [[True]]}}}
    grammar = kit.compile(json_object=True)
    for layout in ({}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}):
        assert kit.accepts(grammar.matcher(), json.dumps(value, **layout))
    assert kit.accepts(grammar.matcher(), json.dumps(value, indent=4).replace("\n", "\r\n"))


@pytest.mark.parametrize(
    ("whitespace", "good"),
    [("bounded", '{ "a": 1}'), ("any", '{      "a": 1}'), ("none", '{"a":1}')],
)
def test_what_the_server_says_of_white_space(kit: Kit, whitespace: str, good: str) -> None:
    params = StructuredOutputsParams(json_object=True)
    spec = to_spec(params, limits=Limits(whitespace=whitespace))
    assert kit.accepts(kit.compiler.compile(spec).matcher(), good)
    allows_many = kit.accepts(kit.compiler.compile(spec).matcher(), '{        "a": 1}')
    assert allows_many is (whitespace == "any")


def test_a_schema_says_more_of_white_space_than_the_server(kit: Kit) -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    assert kit.accepts(kit.matcher(json=schema), '{       "a": 1}')
    assert not kit.accepts(kit.matcher(json=schema, disable_any_whitespace=True), '{ "a": 1}')
