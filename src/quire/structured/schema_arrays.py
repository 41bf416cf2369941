"""Keywords of arrays, for `schema.py`."""

from __future__ import annotations

from quire.structured.schema_logic import Schema, is_anything
from quire.structured.schema_node import Node, Reading

COVERING = ("contains", "allOf", "anyOf", "oneOf", "if", "$ref", "$dynamicRef", "$recursiveRef")
"""Keywords that may cover items that `prefixItems` and `items` beside them do not."""


def read_arrays(run: Reading, node: Node) -> None:
    given = node.given
    older = isinstance(given.get("items"), (list, tuple))
    if older and "prefixItems" in given:
        raise run.wrong(node, "items", "a schema, since there are prefixItems")
    prefix: list[Schema] = []
    rest: Schema = True
    if older:
        prefix = run.parts(node, "items")
        if "additionalItems" in given:
            rest = run.part(node, "additionalItems")
    else:
        if "prefixItems" in given:
            prefix = run.parts(node, "prefixItems")
        if "items" in given:
            rest = run.part(node, "items")
    covered = "additionalItems" in given if older else "items" in given
    if "unevaluatedItems" in given and not covered:
        rest = _unevaluated(run, node)
    if not is_anything(rest) or not all(map(is_anything, prefix)):
        if prefix:
            node.block["prefixItems"] = prefix
        if not is_anything(rest):
            node.block["items"] = rest
    sizes = {"minItems": run.size(node, "minItems"), "maxItems": run.size(node, "maxItems")}
    if "contains" in given:
        _read_contains(run, node, sizes, [*prefix, rest])
    node.block.update({keyword: size for keyword, size in sizes.items() if size is not None})
    unique = given.get("uniqueItems", False)
    if not isinstance(unique, bool):
        raise run.wrong(node, "uniqueItems", "true or false")
    if unique and (sizes["maxItems"] is None or sizes["maxItems"] > 1):
        why = "an item cannot be compared with those before it while it is written; leave it out"
        run.refuse(node, "uniqueItems", why)


def _unevaluated(run: Reading, node: Node) -> Schema:
    """The schema of the items that no other keyword covers."""
    rest = run.part(node, "unevaluatedItems")
    if is_anything(rest):
        return True
    if any(keyword in node.given for keyword in COVERING):
        why = "which items other keywords cover depends on the value; use items"
        run.refuse(node, "unevaluatedItems", why)
        return True
    return rest


def _read_contains(
    run: Reading, node: Node, sizes: dict[str, int | None], items: list[Schema]
) -> None:
    low = run.size(node, "minContains") if "minContains" in node.given else 1
    high = run.size(node, "maxContains")
    if not low and high is None:
        return
    wanted = run.part(node, "contains")
    if is_anything(wanted) or items == [wanted]:
        if low:
            sizes["minItems"] = max(sizes["minItems"] or 0, low)
        if high is not None:
            sizes["maxItems"] = high if sizes["maxItems"] is None else min(sizes["maxItems"], high)
    elif wanted is False and not low:
        return
    else:
        why = "which item shall fit is not known while the list is written; say it of all items"
        run.refuse(node, "contains", why)
