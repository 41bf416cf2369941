"""Resolves the references in a schema (RFC 6901 pointers, `$anchor`, `$id`). Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from quire.structured.base import invalid

# Keywords whose values are schemas; in others (enum, const, default) dicts are plain values.
SCHEMA_KEYS = frozenset((
    "items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties",
    "unevaluatedProperties", "propertyNames", "not", "if", "then", "else",
))  # fmt: skip
SCHEMA_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
SCHEMA_MAPS = frozenset((
    "properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies",
))  # fmt: skip


MAX_SCHEMAS = 100_000
MAX_POINTER = 100_000


@dataclass(frozen=True, slots=True)
class Target:
    schema: object
    at: str
    """A JSON pointer as a fragment."""
    base: str


class References:
    """All addresses in one document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._resources: dict[str, Target] = {}
        self._anchors: dict[tuple[str, str], Target] = {}
        self._dynamic: dict[str, int] = {}
        self._bases: dict[int, str] = {}
        self.has_inner_ids = False
        self._count = 0
        self._resources[""] = Target(document, "#", "")
        self._read(document, "#", "")

    def base_of(self, schema: dict[str, Any], outer: str) -> str:
        return self._bases.get(id(schema), outer)

    def find(self, reference: str, base: str) -> Target | None:
        """The target of `reference`, which is relative to `base`."""
        try:
            address, fragment = urldefrag(urljoin(base, reference))
        except ValueError:
            return None
        if reference.startswith("#"):
            address = base
        resource = self._resources.get(address)
        if resource is None:
            return None
        if fragment and not fragment.startswith("/"):
            return self._anchors.get((address, unquote(fragment)))
        return self._walk(resource, unquote(fragment))

    def is_dynamic_once(self, name: str) -> bool:
        """Whether there is at most one `$dynamicAnchor` of this name."""
        return self._dynamic.get(name, 0) <= 1

    def _walk(self, resource: Target, pointer: str) -> Target | None:
        found, at, base = resource.schema, resource.at, resource.base
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isascii() and key.isdigit() and len(key) < 9:
                if int(key) >= len(found):
                    return None
                found = found[int(key)]
            else:
                return None
            at = f"{at}/{part}"
            if isinstance(found, dict):
                base = self.base_of(found, base)
        return Target(found, at, base)

    def _read(self, document: dict[str, Any], at: str, base: str) -> None:
        todo: list[tuple[dict[str, Any], str, str]] = [(document, at, base)]
        while todo:
            schema, at, base = todo.pop()
            self._count += 1
            if self._count > MAX_SCHEMAS or len(at) > MAX_POINTER:
                raise invalid("the schema is too large or nested too deeply; simplify it.")
            base = self._note(schema, at, base)
            todo += [
                (part, f"{at}/{where}", base)
                for where, part in parts_of(schema)
                if isinstance(part, dict)
            ]

    def _note(self, schema: dict[str, Any], at: str, base: str) -> str:
        """Note the addresses of a schema. Returns the base for the schemas inside it."""
        address = schema.get("$id")
        if isinstance(address, str) and not address.startswith("#"):
            try:
                base = urldefrag(urljoin(base, address)).url
            except ValueError:
                pass
            self.has_inner_ids |= at != "#"
            self._resources.setdefault(base, Target(schema, at, base))
        elif isinstance(address, str):  # an anchor in drafts 6 and 7
            self._anchors.setdefault((base, address[1:]), Target(schema, at, base))
        if base:
            self._bases[id(schema)] = base
        for keyword in ("$anchor", "$dynamicAnchor"):
            name = schema.get(keyword)
            if isinstance(name, str):
                self._anchors.setdefault((base, name), Target(schema, at, base))
                if keyword == "$dynamicAnchor":
                    self._dynamic[name] = self._dynamic.get(name, 0) + 1
        return base


def parts_of(schema: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The schemas directly inside one, each with its relative pointer."""
    for keyword, value in schema.items():
        if isinstance(value, dict):
            if keyword in SCHEMA_MAPS:
                yield from ((f"{keyword}/{escaped(name)}", part) for name, part in value.items())
            elif keyword in SCHEMA_KEYS:
                yield keyword, value
        elif isinstance(value, list) and keyword in SCHEMA_LISTS:
            yield from ((f"{keyword}/{index}", part) for index, part in enumerate(value))


def escaped(name: object) -> str:
    """A name as it is written in a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")
