"""From what a request asks for to one of two texts: a JSON schema, or a grammar in Lark's syntax.

Everything that can be said without a vocabulary is checked here: sizes, nesting, the shape of structural
tags. No recursion and no backtracking regex touches what the client wrote. Whether a grammar compiles
is for `checker.py` to find out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from quire.messages import GrammarSpec
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import invalid
from quire.structured.structural_tag import tag_grammar

MAX_BYTES = 64 << 10
MAX_NESTING = 64

# Where a schema's parts are schemas themselves; elsewhere (enum, const, default) dicts are plain values.
SCHEMA_KEYS = ("items", "additionalProperties", "contains", "not", "if", "then", "else")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def to_spec(
    params: StructuredOutputsParams, *, special_tokens: Mapping[str, int] | None = None
) -> GrammarSpec:
    """The grammar that `params` describe.

    special_tokens: text -> id of the special tokens that tags may be made of: where a tag's text holds
        one, the token is meant and not its spelling.

    Raises `InvalidParameterError` naming `structured_outputs`.
    """
    if params.regex is not None:
        spec = GrammarSpec("lark", f"start: /{_regex(params.regex)}/")
    elif params.choice is not None:
        choices = " | ".join(json.dumps(choice) for choice in params.choice)
        spec = GrammarSpec("lark", f"start: CHOICE\nCHOICE: {choices}")
    elif params.grammar is not None:
        spec = GrammarSpec("lark", _grammar(params.grammar))
    elif params.structural_tag is not None:
        tag = _checked(params.structural_tag, "structural_tag")
        text = tag_grammar(
            tag,
            schema_text=lambda schema: _schema_text(schema, params),
            regex_text=_regex,
            special_tokens=special_tokens or {},
        )
        spec = GrammarSpec("lark", text)
    else:
        schema = {"type": "object"} if params.json is None else _checked(params.json, "json")
        spec = GrammarSpec("json_schema", _schema_text(schema, params))
    _check_size(spec.text, "the grammar")
    return spec


def _checked(value: str | dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON object, given as one or as text, of bounded size and nesting."""
    if isinstance(value, str):
        _check_size(value, name)
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise invalid(f"{name} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object.", value)
    level: list[object] = [value]
    for _ in range(MAX_NESTING + 1):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return value
    raise invalid(f"{name} is nested deeper than {MAX_NESTING} levels; flatten it, or use $defs.")


def _parts(whole: object) -> Iterator[object]:
    if isinstance(whole, dict):
        yield from whole.values()
    elif isinstance(whole, list):
        yield from whole


def _check_size(text: str, name: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise invalid(f"{name} is not valid Unicode: it has a lone surrogate.") from None
    if num_bytes > MAX_BYTES:
        raise invalid(f"{name} has {num_bytes} bytes; at most {MAX_BYTES} are allowed.")


def _schema_text(schema: object, params: StructuredOutputsParams) -> str:
    """The schema with our options in it, as llguidance reads them."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise invalid("a JSON schema must be an object.", schema)
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, object] = {}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = _regex(params.whitespace_pattern)
    elif params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if options:
        theirs = schema.get("x-guidance")
        schema = schema | {"x-guidance": (theirs if isinstance(theirs, dict) else {}) | options}
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(f"the JSON schema cannot be written as JSON ({error}).") from None


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every schema of objects that does not say allows no other properties."""
    copy: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    todo: list[Any] = [copy]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        todo += [part.get(key) for key in SCHEMA_KEYS]
        for key in SCHEMA_LISTS:
            todo += _parts(part.get(key))
        for key in SCHEMA_MAPS:
            todo += _parts(part.get(key))
        if part.get("type") == "object" or "properties" in part:
            part.setdefault("additionalProperties", False)
    return copy


def _regex(pattern: str) -> str:
    """A regex as it may stand between Lark's slashes; `\\d` is 0 to 9."""
    if not isinstance(pattern, str) or "\0" in pattern:
        raise invalid("a regex must be text without NUL characters.", pattern)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise invalid("the regex ends in a lone backslash.", pattern)
    _check_size(pattern, "the regex")
    from llguidance import regex_to_lark

    return regex_to_lark(pattern, "d") or "()"  # two slashes would begin a comment


def _grammar(text: str) -> str:
    """Lark as it is, GBNF translated."""
    _check_size(text, "the grammar")
    if "\0" in text:
        raise invalid("a grammar must not have NUL characters.")
    if not _is_gbnf(text):
        if text.lstrip().startswith("{"):
            raise invalid("the grammar must be Lark or GBNF, not JSON.")
        return text
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise invalid("the grammar is nested too deeply.") from None
    except GbnfToLarkError as error:
        raise invalid(f"the grammar is neither Lark nor valid GBNF: {error}.") from None
    except Exception:  # the translator meets what it did not expect with whatever comes
        raise invalid("the grammar is neither Lark nor valid GBNF.") from None


def _is_gbnf(text: str) -> bool:
    """GBNF defines rules with `::=`, Lark with a single colon, beginning with `start`."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "start" and not rest.startswith(":="):
            return False
    return "::=" in text
