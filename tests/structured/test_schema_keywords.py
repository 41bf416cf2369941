"""Every row of the table of keywords, proved by its examples, token by token."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from quire.errors import InvalidParameterError
from quire.sampling_params import StructuredOutputsParams
from quire.structured.schema import prepare
from quire.structured.schema_keywords import FORMATS, KEYWORDS, Keyword
from quire.structured.spec import wanted
from tests.structured.conftest import Kit

# Of the specification; what is not named here is no keyword of either draft.
DRAFT_2020_12 = """
    $id $schema $ref $anchor $dynamicRef $dynamicAnchor $vocabulary $comment $defs
    allOf anyOf oneOf not if then else dependentSchemas prefixItems items contains
    properties patternProperties additionalProperties propertyNames unevaluatedItems unevaluatedProperties
    type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern
    maxItems minItems uniqueItems maxContains minContains maxProperties minProperties required
    dependentRequired format contentEncoding contentMediaType contentSchema
    title description default deprecated readOnly writeOnly examples
"""
DRAFT_7 = "definitions dependencies additionalItems"
DRAFT_2019_09 = "$recursiveRef $recursiveAnchor"


def rows(field: str) -> list[Any]:
    return [
        pytest.param(row, example, id=f"{row.name}-{index}")
        for row in KEYWORDS
        for index, example in enumerate(getattr(row, field))
    ]


def text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_every_keyword_has_a_row_and_every_row_an_example() -> None:
    names = [row.name for row in KEYWORDS]
    assert len(names) == len(set(names))
    assert not set(f"{DRAFT_2020_12} {DRAFT_7} {DRAFT_2019_09}".split()) - set(names)
    for row in KEYWORDS:
        if row.fate in ("enforced", "in part"):
            assert row.schema is not None and row.valid and row.invalid, row.name
        if row.fate == "ignored":
            assert row.nothing and not row.refused and row.schema is None, row.name
        if row.fate == "refused":
            assert row.refused, row.name


@pytest.mark.parametrize("row", [row for row in KEYWORDS if row.schema], ids=lambda row: row.name)
def test_what_is_enforced(kit: Kit, row: Keyword) -> None:
    assert row.schema is not None
    grammar = kit.compile(json=row.schema)
    assert [v for v in row.valid if not kit.accepts(grammar.matcher(), text(v))] == []
    assert [v for v in row.invalid if kit.accepts(grammar.matcher(), text(v))] == []


def test_the_examples_are_right() -> None:
    """By another implementation, for what it knows."""
    other = {"$recursiveRef", "nullable", "x-guidance", "dependencies", "exclusiveMaximum"}
    for row in KEYWORDS:
        if row.schema is None or row.name in other or "additionalItems" in row.schema:
            continue
        validator = jsonschema_rs.Draft202012Validator(row.schema, validate_formats=True)
        assert all(map(validator.is_valid, row.valid)), row.name
        assert not any(map(validator.is_valid, row.invalid)), row.name


@pytest.mark.parametrize(("row", "schema"), rows("nothing"))
def test_what_asks_for_nothing_is_left_out(row: Keyword, schema: dict[str, Any]) -> None:
    bare = {"type": "integer"} if schema.get("type") == "integer" else {}
    assert prepare(schema).schema == bare
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    without = {"type": "object", "properties": {"a": bare}, "required": ["a"]}
    assert prepare(whole).schema == prepare(without).schema


@pytest.mark.parametrize(("row", "schema"), rows("refused"))
def test_what_is_refused_is_named(kit: Kit, row: Keyword, schema: dict[str, Any]) -> None:
    whole = {"properties": {"a/b": schema}}
    if "$defs" in schema:  # a reference means the whole document
        whole = schema
    with pytest.raises(InvalidParameterError) as caught:
        kit.compile(json=whole)
    assert caught.value.param == "structured_outputs"
    message = str(caught.value)
    assert row.name.removesuffix("ies") in message
    at = "#/properties/a~1b" if whole is not schema else "at #"
    assert at in message or row.name == "patternProperties"  # of which llguidance judges
    assert len(message) < 500


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_are_enforced(kit: Kit, name: str) -> None:
    good, bad = FORMATS[name]
    grammar = kit.compile(json={"type": "string", "format": name})
    assert kit.accepts(grammar.matcher(), text(good))
    assert not kit.accepts(grammar.matcher(), text(bad))


DATES = {
    "date": (
        ["2024-02-29", "2000-02-29", "2023-02-28", "1999-12-31"],
        ["2023-02-29", "2100-02-29", "2024-04-31", "2024-00-01", "2024-02-30", "24-02-01"],
    ),
    "date-time": (
        ["2024-02-29T23:59:59.5Z", "1998-12-31T23:59:60Z", "2023-01-01t00:00:00+14:00"],
        ["2023-02-29T00:00:00Z", "1998-12-31T22:59:60Z", "2023-01-01T24:00:00Z", "2023-01-01T00:00Z"],
    ),
    "time": (["23:59:60Z", "08:30:06.28Z", "00:00:00-05:00"], ["12:00:60Z", "23:59:60+01:00", "1:00:00Z"]),
    "hostname": (["a." * 20 + "b"], ["a." * 130 + "b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DATES)
@pytest.mark.parametrize("place", ["value", "name"])
def test_dates_that_exist(kit: Kit, name: str, place: str) -> None:
    good, bad = DATES[name]
    schema: dict[str, Any] = {"format": name}
    if place == "name":
        if name not in ("date", "date-time"):
            return
        schema = {"type": "object", "propertyNames": schema}
        good = [one for one in good if ":60" not in one]
    grammar = kit.compile(json=schema)
    spelt = text if place == "value" else lambda one: text({one: 1})
    assert [one for one in good if not kit.accepts(grammar.matcher(), spelt(one))] == []
    assert [one for one in bad if kit.accepts(grammar.matcher(), spelt(one))] == []


@pytest.mark.parametrize(
    "name", ["json", "int64", "byte", "path", "password", "binary", "ünknown\n"]
)
def test_unknown_formats_are_named_in_a_warning(kit: Kit, name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": name}}}
    found = wanted(StructuredOutputsParams(json=schema | {"required": ["a"]}))
    assert ascii(name)[1:-1] in "".join(found.warnings) and len(found.warnings) == 1
    assert "\n" not in found.warnings[0] and found.warnings[0].isascii()
    assert kit.accepts(kit.compiler.compile(found.spec).matcher(), '{"a":"x y"}')
    number = {"type": "integer", "format": name}
    assert wanted(StructuredOutputsParams(json=number)).warnings == ()
