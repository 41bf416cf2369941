"""Neutral values of fields: those that change nothing.

Clients often send every field that they know, with its neutral value. On every endpoint such a field
counts as absent: `body.parse` drops it before any rule about the field applies. Null is always neutral.
An empty string, list or object is neutral in an optional field of that type. Other neutral values, and
fields in which an empty value has a meaning, are declared with `Neutral`: in the field's annotation if a
request model has the field, else in a table of `unsupported`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


class Neutral:
    """The neutral values of a field.

    As a part of a model's annotation it must be outermost: `Annotated[int | None, Neutral(0)]`.
    """

    def __init__(self, *values: object, empty: bool = True) -> None:
        """empty: whether an empty value is neutral, in a field of a request model."""
        self.values = values
        self.empty = empty

    def holds(self, value: object) -> bool:
        return any(_same(value, neutral) for neutral in self.values)


ONLY_NULL = Neutral()
"""For a field that no request model has: every value except null would have changed the answer."""
EMPTY_HAS_MEANING = Neutral(empty=False)


def asks_for_nothing(
    model: type[BaseModel], others: Mapping[str, Neutral], name: str, value: object
) -> bool:
    """Whether the field `name` may be dropped from a request of `model`.

    others: the neutral values of fields that the model does not have.
    """
    if name not in model.model_fields:
        return name in others and others[name].holds(value)
    declared = _declared(model)
    if name not in declared:
        return False
    neutral, kinds = declared[name]
    if neutral.holds(value):
        return True
    return neutral.empty and type(value) in kinds and value in ("", [], {})


@functools.cache
def _declared(model: type[BaseModel]) -> dict[str, tuple[Neutral, frozenset[type]]]:
    """For each optional field: its neutral values, and the JSON types that it accepts."""
    return {
        name: (
            next((m for m in info.metadata if isinstance(m, Neutral)), ONLY_NULL),
            frozenset(_kinds(info.annotation)),
        )
        for name, info in model.model_fields.items()
        if not info.is_required()
    }


def _kinds(annotation: Any) -> set[type]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(parts[0])
    if origin in (Union, UnionType):
        return set().union(*(_kinds(part) for part in parts))
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {dict}
    return {kind} & {str, list, dict}


def _same(value: object, neutral: object) -> bool:
    """Equal and of the same type: True is not 1, and 1 is not 1.0."""
    return type(value) is type(neutral) and value == neutral
