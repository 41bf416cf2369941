"""One schema while `schema.py` rewrites it, and the methods that handlers of keywords need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from quire.structured.schema_logic import ALL_TYPES, Logic, Schema
from quire.structured.schema_refs import References

MAX_SHOWN = 120


@dataclass(slots=True)
class Node:
    """One schema, and its rewritten form."""

    given: dict[str, Any]
    """Its keywords that may demand something."""
    at: str
    base: str
    outer: str
    """The base URI of the schema around it."""
    types: frozenset[str] = ALL_TYPES
    block: dict[str, Any] = field(default_factory=dict)
    """The rewritten keywords, without applicators."""
    extras: list[Schema] = field(default_factory=list)
    """Further schemas that must hold too."""


class Reading(Protocol):
    """The rewriting of the whole schema."""

    refs: References
    logic: Logic
    exact: bool
    """Inside a condition, whose complement is needed: no part may be made narrower."""
    close: bool
    """Schemas of objects without `additionalProperties` allow no other properties."""

    def schema(self, source: object, at: str, base: str) -> Schema: ...

    def part(self, node: Node, where: str) -> Schema:
        """The rewritten schema of one keyword of `node`."""

    def parts(self, node: Node, where: str) -> list[Schema]:
        """The rewritten schemas in the list of one keyword of `node`."""

    def size(self, node: Node, keyword: str) -> int | None:
        """A length or a number of items, or None if it demands nothing."""

    def refuse(self, node: Node, keyword: str, why: str) -> None:
        """Raise the error for what cannot be enforced; in lenient mode, note a warning and return."""

    def wrong(self, node: Node, keyword: str, rule: str) -> Exception:
        """The error for a keyword with an invalid value: `raise reading.wrong(...)`."""


def shown(pointer: str) -> str:
    """Text from a client, shortened for an error message."""
    plain = ascii(pointer)[1:-1]
    return plain if len(plain) <= MAX_SHOWN else plain[:MAX_SHOWN] + "..."
