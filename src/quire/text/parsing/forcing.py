"""The opposite of parsing: a grammar under which a model can only write calls of the offered tools, in
the format that it was trained on."""

from __future__ import annotations

from collections.abc import Collection

from quire.sampling_params import StructuredOutputsParams
from quire.text.parsing.calls import ToolFormat, Tools
from quire.text.parsing.json_scanner import escaped

ANY_ARGUMENTS: dict[str, object] = {"type": "object"}


def forced_calls(form: ToolFormat, tools: Tools, *, several: bool) -> StructuredOutputsParams:
    """At least one call, or exactly one, and no other text. `form.forced` must be set."""
    before, between, after = form.listed
    calls = {
        "type": "tags_with_separator",
        "tags": _tags(form, tools, strict=tools),
        "separator": between,
        "at_least_one": True,
        "stop_after_first": not several,
    }
    elements = [_literal(before), calls, _literal(after)]
    return _structure({"type": "sequence", "elements": elements})


def guided_calls(
    form: ToolFormat, tools: Tools, strict: Collection[str]
) -> StructuredOutputsParams | None:
    """Any text, in which calls must be of `tools`; the arguments of `strict` tools must match their schemas.

    None where a grammar cannot do this: calls in a list, or without a marker, cannot be distinguished
    from text early enough.
    """
    if form.forced is None or not form.start or not form.forced[0].startswith(form.start[0]):
        return None
    tags = _tags(form, tools, strict=strict)
    return _structure({"type": "triggered_tags", "triggers": [form.start[0]], "tags": tags})


def _tags(form: ToolFormat, tools: Tools, *, strict: Collection[str]) -> list[dict[str, object]]:
    assert form.forced is not None
    before, between, after = form.forced
    return [
        {
            "begin": before + escaped(name) + between,
            "content": {
                "type": "json_schema",
                "json_schema": schema if name in strict else ANY_ARGUMENTS,
            },
            "end": after,
        }
        for name, schema in tools.items()
    ]


def _literal(text: str) -> dict[str, object]:
    return {"type": "const_string", "value": text}


def _structure(form: dict[str, object]) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag={"format": form}, disable_any_whitespace=True)
