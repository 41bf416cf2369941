from __future__ import annotations

import json
import sys
from subprocess import run
from typing import Any

import pytest

from quire.errors import InvalidParameterError
from quire.sampling_params import StructuredOutputsParams
from quire.structured import response_format
from quire.structured.base import DEFAULT_LIMITS
from quire.structured.spec import to_spec
from tests.structured.conftest import Kit

CLOSED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"items": found}
    return found


def test_importing_is_light() -> None:
    code = (
        "import quire.structured.spec, quire.structured.store, quire.structured.checker, sys;"
        "assert not {'llguidance', 'torch', 'tokenizers'} & set(sys.modules)"
    )
    assert run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("params", "text", "fits"),
    [
        ({"json": CLOSED}, '{ "a": 1 }', True),
        ({"json": CLOSED}, '{"a":1,"b":2}', True),
        ({"json": json.dumps(CLOSED)}, '{"a":1}', True),
        ({"json": CLOSED, "disable_any_whitespace": True}, '{"a": 1}', False),
        ({"json": CLOSED, "disable_any_whitespace": True}, '{"a":1}', True),
        ({"json": CLOSED, "disable_additional_properties": True}, '{"a":1,"b":2}', False),
        ({"json": CLOSED, "whitespace_pattern": " "}, '{ "a": 1 }', True),
        ({"json": CLOSED, "whitespace_pattern": " "}, '{\n"a": 1 }', False),
        ({"json_object": True}, '{"x": [1, {}]}', True),
        ({"json_object": True}, "[]", False),
        ({"regex": "a/b\n\\d"}, "a/b\n7", True),
        ({"regex": r"\d"}, "٣", False),
        ({"regex": "()"}, "", True),
    ],
)
def test_options(kit: Kit, params: dict[str, Any], text: str, fits: bool) -> None:
    assert kit.accepts(kit.matcher(**params), text) is fits


def test_closing_a_schema_leaves_names_and_values_alone() -> None:
    inner = {"type": "object", "properties": {}}
    schema = {
        "properties": {"properties": {"enum": [inner]}, "deep": {"items": inner}},
        "additionalProperties": True,
    }
    params = StructuredOutputsParams(json=schema, disable_additional_properties=True)
    closed = json.loads(to_spec(params).text)
    assert closed["properties"]["properties"] == {"enum": [inner]}
    assert closed["properties"]["deep"]["items"] == {
        "type": "object",
        "additionalProperties": False,
    }
    assert "additionalProperties" not in closed
    assert "additionalProperties" not in inner


@pytest.mark.parametrize(
    "params",
    [
        {"json": "{"},
        {"json": "[1]"},
        {"json": nested(65)},
        {"json": "[" * 50_000},
        {"json": {"enum": ["x" * DEFAULT_LIMITS.max_bytes]}},
        {"json": {"const": "\ud800"}},
        {"json": {"type": "strin"}},
        {"json": {"$ref": "http://127.0.0.1/schema"}},
        {"json": {"x-guidance": 3}},
        {"regex": "a\0"},
        {"regex": "a\\"},
        {"regex": "a" * (DEFAULT_LIMITS.max_bytes + 1)},
        {"choice": ["a" * 400_000, "b" * 400_000]},
        {"grammar": '{"grammars": []}'},
        {"grammar": 'root ::= "a'},
        {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
        {"grammar": "root ::= [\n" + "\n" * 50_000},
        {"grammar": "\0"},
        {"structural_tag": "nonsense"},
        {"structural_tag": {"structures": [], "triggers": ["<"]}},
        {"structural_tag": {"structures": [{"begin": "<a>", "end": "x"}], "triggers": ["["]}},
        {"structural_tag": {"format": {"type": "nope"}}},
        {"structural_tag": {"format": {"type": "regex", "pattern": 3}}},
        {"structural_tag": {"format": {"type": "any_text", "excludes": ["x"]}}},
        {"structural_tag": {"format": {"type": "tag", "begin": "a", "content": {}, "end": "b"}}},
        {"structural_tag": {"format": {"type": "sequence", "elements": [
            {"type": "any_text"}, {"type": "json_schema", "json_schema": {}}]}}},
    ],
)  # fmt: skip
def test_what_is_refused_names_the_field(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match="structured_outputs") as caught:
        to_spec(StructuredOutputsParams(**params))
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 500


def test_64_levels_are_allowed() -> None:
    to_spec(StructuredOutputsParams(json=nested(64)))


# --- structural tags ---

WEATHER = {"begin": "<f=weather>", "schema": CLOSED, "end": "</f>"}
TIME = {"begin": "<f=time>", "schema": {"type": "integer"}, "end": "</f>"}
OLD = {"type": "structural_tag", "structures": [WEATHER, TIME], "triggers": ["<f="]}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
JSON_TAG = {"begin": "<f=t>", "content": INTEGER, "end": "</f>"}
WORD = {"type": "regex", "pattern": "\\w+"}
TEXT_TAG = {"type": "tag", "begin": "<b>", "content": {"type": "any_text"}, "end": "</b>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f="], "tags": [JSON_TAG]}
LIST = {"type": "tags_with_separator", "separator": ", ", "tags": [JSON_TAG, TEXT_TAG]}


@pytest.mark.parametrize(
    ("tag", "good", "bad"),
    [
        (
            OLD,
            ["", "no tag", 'a <f=weather>{"a": 3}</f> b <f=time>4</f>', "<f", "<f=time>1</f><f=time>2</f>"],
            ["<f=", "<f=other>", "<f=time>x</f>", "<f=time>1</f"],
        ),
        (
            TRIGGERED | {"at_least_one": True},
            ["<f=t>1</f>", "<f=t>1</f> and <f=t>2</f>!"],
            ["", "text", "text <f=t>1</f>"],
        ),
        (TRIGGERED | {"stop_after_first": True}, ["hi", "hi <f=t>1</f>"], ["<f=t>1</f> more"]),
        (
            TRIGGERED | {"stop_after_first": True, "at_least_one": True},
            ["<f=t>1</f>"],
            ["hi", "<f=t>1</f>x"],
        ),
        (TEXT_TAG, ["<b>any\n<thing></b>", "<b></b>"], ["<b>", "x<b></b>", "<b></b>."]),
        (LIST, ["", "<f=t>1</f>", "<f=t>1</f>, <b>x</b>, <f=t>2</f>"], ["<f=t>1</f>,", "x"]),
        (LIST | {"at_least_one": True, "stop_after_first": True}, ["<b>x</b>"], ["", "<b></b>, <b></b>"]),
        (
            {"type": "sequence", "elements": [
                {"type": "const_string", "value": "A: "},
                {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]+"}, TEXT_TAG]},
                {"type": "const_string", "value": "."},
                {"type": "any_text"},
            ]},
            ["A: 12.", "A: 1.rest", "A: <b>x</b>. rest"],
            ["A: .", "A: 12", "B"],
        ),
        ({"begin": "<r>", "content": WORD, "end": "END"}, ["<r>aENDbEND"], ["<r>END"]),
    ],
)  # fmt: skip
def test_structural_tags(kit: Kit, tag: dict[str, Any], good: list[str], bad: list[str]) -> None:
    whole = tag if "structures" in tag else {"type": "structural_tag", "format": tag}
    grammar = kit.compile(structural_tag=whole)
    assert [text for text in good if not kit.accepts(grammar.matcher(), text)] == []
    assert [text for text in bad if kit.accepts(grammar.matcher(), text)] == []


def test_special_tokens_in_tags_are_tokens(kit: Kit) -> None:
    name, token = "<|im_start|>", kit.tokenizer.token_id("<|im_start|>")
    assert token is not None
    structure = {"begin": f"{name}x", "schema": {"type": "integer"}, "end": ""}
    params = StructuredOutputsParams(structural_tag={"structures": [structure], "triggers": [name]})
    grammar = kit.compiler.compile(to_spec(params, special_tokens={name: token}))
    assert token in kit.allowed(grammar.matcher())
    assert kit.accepts(grammar.matcher(), f"hello {name}x12")
    assert not kit.accepts(grammar.matcher(), f"hello {name}12")
    assert token not in kit.allowed(kit.compiler.compile(to_spec(params)).matcher())


# --- response_format ---


def test_response_formats() -> None:
    schema = {"name": "x", "schema": CLOSED, "strict": True, "description": "d"}
    tag = {"type": "structural_tag", "format": TRIGGERED}
    parse = response_format.parse
    assert parse({"type": "text"}) is None
    assert parse({"type": "json_object"}) == StructuredOutputsParams(json_object=True)
    found = parse({"type": "json_schema", "json_schema": schema})
    assert found == StructuredOutputsParams(json=CLOSED)
    for asked in (tag, OLD, {"type": "structural_tag", "structural_tag": json.dumps(tag)}):
        found = parse(asked)
        assert found is not None and to_spec(found).kind == "lark"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "type"),
        ({"type": ["text"]}, "type"),
        ({"type": "json"}, "type"),
        ({"type": "text", "schema": {}}, "schema"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": []}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": 1}}, "json_schema.strict"),
        ({"type": "json_schema", "json_schema": {"name": "x", "scheme": {}}}, "json_schema.scheme"),
        ({"type": "structural_tag", "structural_tag": 3}, "structural_tag"),
    ],
)  # fmt: skip
def test_wrong_response_formats(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        response_format.parse(asked)
    assert caught.value.param == f"response_format.{param}"
