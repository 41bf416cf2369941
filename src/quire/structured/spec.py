"""Turns the structured output of a request into one of two texts: a JSON schema, or a grammar in Lark's
syntax.

Everything that does not need the vocabulary is checked here: sizes, nesting, the shape of structural
tags. Schemas are rewritten by `schema.py`. No backtracking regex is used on a client's text. Whether a
grammar compiles is checked by `checker.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.decoding import GrammarSpec
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import DEFAULT_LIMITS, Limits, invalid
from quire.structured.schema import MAX_NESTING, prepare
from quire.structured.structural_tag import tag_grammar

MAX_RAW_BYTES = 8 << 20
"""Limit for a schema sent as text, descriptions included."""

MAX_PARTS = 400_000
"""Limit on the number of values in a client's JSON, annotations included."""
BOUNDED_WHITESPACE = r" |(?:\r?\n){1,2}[ \t]{0,40}"
"""Whitespace between two parts of JSON: a space, or one or two line ends and an indentation."""
WHITESPACE: dict[str, dict[str, object]] = {
    "bounded": {"whitespace_pattern": BOUNDED_WHITESPACE},
    "any": {"whitespace_flexible": True},
    "none": {"whitespace_flexible": False},
}


@dataclass(frozen=True, slots=True)
class Wanted:
    spec: GrammarSpec
    warnings: tuple[str, ...]
    """Parts of a schema that are not enforced: unknown formats of strings."""


def to_spec(
    params: StructuredOutputsParams,
    *,
    special_tokens: Mapping[str, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> GrammarSpec:
    """The grammar of `params`: see `wanted`."""
    return wanted(params, special_tokens=special_tokens, limits=limits).spec


def wanted(
    params: StructuredOutputsParams,
    *,
    special_tokens: Mapping[str, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Wanted:
    """The grammar of `params`, and the warnings for the client.

    special_tokens: text -> id of the special tokens that tags may contain: if a tag's text contains
        one, the token is meant and not its spelling.

    Raises `InvalidParameterError` naming `structured_outputs`.
    """
    schemas = _Schemas(params, limits)
    size = limits.max_bytes
    if params.regex is not None:
        spec = GrammarSpec("lark", f"start: /{_regex(params.regex, size)}/")
    elif params.choice is not None:
        choices = " | ".join(json.dumps(choice) for choice in params.choice)
        spec = GrammarSpec("lark", f"start: CHOICE\nCHOICE: {choices}")
    elif params.grammar is not None:
        spec = GrammarSpec("lark", _grammar(params.grammar, size))
    elif params.structural_tag is not None:
        tag = _checked(params.structural_tag, "structural_tag")
        text = tag_grammar(
            tag,
            schema_text=schemas.text,
            regex_text=lambda regex: _regex(regex, size),
            special_tokens=special_tokens or {},
        )
        spec = GrammarSpec("lark", text)
    else:
        schema = {"type": "object"} if params.json is None else _checked(params.json, "json")
        spec = GrammarSpec("json_schema", schemas.text(schema))
    _check_size(spec.text, "the grammar", size)
    return Wanted(spec, tuple(dict.fromkeys(schemas.warnings)))


def _checked(value: str | dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON object of limited size and nesting, sent as an object or as text."""
    if isinstance(value, str):
        _check_size(value, name, MAX_RAW_BYTES)
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise invalid(f"{name} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object.", value)
    level: list[object] = [value]
    num_parts = 0
    for _ in range(MAX_NESTING + 1):
        level = [part for whole in level for part in _parts(whole)]
        num_parts += len(level)
        if not level:
            return value
        if num_parts > MAX_PARTS:
            raise invalid(f"{name} has over {MAX_PARTS} parts; simplify it.")
    raise invalid(f"{name} is nested deeper than {MAX_NESTING} levels; flatten it, or use $defs.")


def _parts(whole: object) -> Iterator[object]:
    if isinstance(whole, dict):
        yield from whole.values()
    elif isinstance(whole, list):
        yield from whole


def _check_size(text: str, name: str, max_bytes: int) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise invalid(f"{name} is not valid Unicode: it has a lone surrogate.") from None
    if num_bytes > max_bytes:
        raise invalid(
            f"{name} has {num_bytes} bytes; at most {max_bytes} are allowed (--max-grammar-bytes)."
        )


class _Schemas:
    """The schemas of one request, written for llguidance."""

    def __init__(self, params: StructuredOutputsParams, limits: Limits) -> None:
        self.warnings: list[str] = []
        self._params = params
        self._limits = limits

    def text(self, schema: object) -> str:
        """The schema, rewritten by `schema.py`, with llguidance's options."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise invalid("a JSON schema must be an object.", schema)
        theirs = schema.get("x-guidance", {})
        if not isinstance(theirs, dict):
            raise invalid("x-guidance must be an object.", theirs)
        prepared = prepare(
            schema,
            lenient=theirs.get("lenient") is True,
            coerce_one_of=theirs.get("coerce_one_of") is True,
            close=self._params.disable_additional_properties,
        )
        self.warnings += prepared.warnings
        whole = prepared.schema | {"x-guidance": self._options(theirs)}
        try:
            return msgspec.json.encode(whole).decode()
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise invalid(f"the JSON schema cannot be written as JSON ({error}).") from None

    def _options(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """The request's setting for whitespace takes precedence over its schema's, and that over the
        server's."""
        params = self._params
        ours: dict[str, object] = {}
        if params.whitespace_pattern is not None:
            ours["whitespace_pattern"] = _regex(params.whitespace_pattern, self._limits.max_bytes)
        elif params.disable_any_whitespace:
            ours["whitespace_flexible"] = False
            theirs = {name: value for name, value in theirs.items() if name != "whitespace_pattern"}
        elif not {"whitespace_pattern", "whitespace_flexible"} & theirs.keys():
            ours = WHITESPACE[self._limits.whitespace]
        return theirs | ours


def _regex(pattern: str, max_bytes: int) -> str:
    """A regex as it is written between Lark's slashes; `\\d` is 0 to 9."""
    if not isinstance(pattern, str) or "\0" in pattern:
        raise invalid("a regex must be text without NUL characters.", pattern)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise invalid("the regex ends in a lone backslash.", pattern)
    _check_size(pattern, "the regex", max_bytes)
    from llguidance import regex_to_lark

    return (
        regex_to_lark(pattern, "d") or "()"
    )  # an empty regex would be two slashes, which begin a comment


def _grammar(text: str, max_bytes: int) -> str:
    """Lark unchanged, or GBNF translated to it."""
    _check_size(text, "the grammar", max_bytes)
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
    except Exception:  # the translator may raise anything for text that it does not expect
        raise invalid("the grammar is neither Lark nor valid GBNF.") from None


def _is_gbnf(text: str) -> bool:
    """GBNF defines rules with `::=`, Lark with a single colon, beginning with `start`."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "start" and not rest.startswith(":="):
            return False
    return "::=" in text
