"""docs/json-schema.md, from `quire.structured.schema_keywords`."""

from __future__ import annotations

from quire.structured.schema_keywords import FORMATS, KEYWORDS

HEADER = """\
# JSON Schema

Written by `scripts/gen_docs.py` from `src/quire/structured/schema_keywords.py`; do not edit.

Every schema goes through one pass before it is compiled: of `response_format`, `structured_outputs`, tools,
structural
tags, `LLM` and batch files. (Not `%json` in a Lark grammar, which is the client's own.) The pass leaves out
annotations and
what asks for nothing. What asks for something that cannot be enforced is a 400 that names the keyword and
where it is. Every
row is proved by examples, token by token; `scripts/json_schema_suite.py` runs the JSON Schema Test Suite.

- *enforced*: no text that breaks it can be generated.
- *in part*: enforced where the note says so, else refused.
- *ignored*: it asks for nothing.
- *refused*: a 400.

Keys with the value null are as if absent. `x-guidance: {"lenient": true}` at the top of a schema ignores
what would be
refused, with a warning.

| keyword | vocabulary | what becomes of it | note |
|---|---|---|---|
"""

FOOTER = """
## Formats

Enforced: {formats}. Dates exist; the second 60 is allowed as 23:59:60 UTC only; an IPv6 address has no IPv4
part; an
e-mail address has no quotes. Punycode in host names is not checked. Any other format is accepted and named
in a
warning (`warnings` in the answer, the header `x-quire-warnings`, a log line of `LLM`).

## Which spelling of a value

Of the many ways to write a value, the grammar takes one for each of these. Properties come in the order in
which the
schema lists them, then those that only `required` names, then others. Whole numbers have no fraction (`1`,
not `1.0`).
Numbers under bounds or `multipleOf` have no exponent.
Between two parts there may be a space, or one or two line ends and up to 40 characters of indentation, so
that JSON
cannot go on in blank space for ever. `--json-whitespace any` takes that bound away, as vLLM has it by
default;
`--json-whitespace none`, or `disable_any_whitespace` in a request, makes JSON compact; `whitespace_pattern`
in a request
sets another. Forced tool calls are always compact.

## Known departures

- Numbers without bounds may be larger than a double holds.
- Names that only `additionalProperties` or `patternProperties` allow may repeat.
- `$ref` beside other keywords: all count, which in draft 7 and before only `$ref` did.
- A character class that excludes only one of `"` and `\\` still allows it (llguidance); `\\S` allows
  U+FEFF.
"""


def render() -> str:
    """The whole page."""
    rows = []
    for row in KEYWORDS:
        name = row.name if " " in row.name else f"`{row.name}`"
        note = row.note.replace("|", "\\|")
        rows.append(f"| {name} | {row.vocabulary} | {row.fate} | {note} |")
    formats = ", ".join(f"`{name}`" for name in FORMATS)
    return HEADER + "\n".join(rows) + "\n" + FOOTER.format(formats=formats)
