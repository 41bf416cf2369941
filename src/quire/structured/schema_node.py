"""One schema while `schema.py` reads it, and what its readers need of that pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from quire.structured.schema_logic import ALL_TYPES, Logic, Schema
from quire.structured.schema_refs import References

MAX_SHOWN = 120


@dataclass(slots=True)
class Node:
    """One schema, and what it becomes."""

    given: dict[str, Any]
    """Its keywords that may mean something."""
    at: str
    base: str
    outer: str
    """The base of the schema around it."""
    types: frozenset[str] = ALL_TYPES
    block: dict[str, Any] = field(default_factory=dict)
    """What it becomes, without applicators."""
    extras: list[Schema] = field(default_factory=list)
    """What must hold besides, in schemas of their own."""


class Reading(Protocol):
    """The pass over the whole schema."""

    refs: References
    logic: Logic
    exact: bool
    """Inside a condition, of which the opposite is taken: nothing may be narrowed."""
    close: bool
    """Schemas of objects that do not say otherwise allow no other properties."""

    def schema(self, source: object, at: str, base: str) -> Schema: ...

    def part(self, node: Node, where: str) -> Schema:
        """The schema that a keyword of `node` holds."""

    def parts(self, node: Node, where: str) -> list[Schema]:
        """The schemas that a keyword of `node` lists."""

    def size(self, node: Node, keyword: str) -> int | None:
        """A length or a number of items, or None where it asks for nothing."""

    def refuse(self, node: Node, keyword: str, why: str) -> None:
        """Raise the error for what cannot be enforced; in lenient mode, note it and return."""

    def wrong(self, node: Node, keyword: str, rule: str) -> Exception:
        """The error for a keyword with a value that means nothing: `raise reading.wrong(...)`."""


def shown(pointer: str) -> str:
    """What a client wrote, as part of an error."""
    plain = ascii(pointer)[1:-1]
    return plain if len(plain) <= MAX_SHOWN else plain[:MAX_SHOWN] + "..."
