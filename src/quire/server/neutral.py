"""Values that ask for nothing.

Clients send every field they know, each with the value that changes nothing. A field with such a value is as
if absent on every endpoint: `body.parse` drops it before any rule about the field applies. Null always asks
for nothing. So does an empty string, list or object, in an optional field of that type. Other values, and the
fields in which something empty has a meaning, are declared with `Neutral` beside the field: in its annotation
where a request model has the field, in a table of `unsupported` where none has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


class Neutral:
    """Which values of a field ask for nothing.

    As a part of a model's annotation it must be outermost: `Annotated[int | None, Neutral(0)]`.
    """

    def __init__(self, *values: object, empty: bool = True) -> None:
        """empty: whether an empty value asks for nothing, in a field of a request model."""
        self.values = values
        self.empty = empty

    def holds(self, value: object) -> bool:
        return any(_same(value, neutral) for neutral in self.values)


ONLY_NULL = Neutral()
"""Of a field that no request model has: every value but null would have changed the answer."""
EMPTY_HAS_MEANING = Neutral(empty=False)


def asks_for_nothing(
    model: type[BaseModel], others: Mapping[str, Neutral], name: str, value: object
) -> bool:
    """Whether the field `name` may be dropped from a request of `model`.

    others: what is known of fields that the model does not have.
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
    """Of each optional field: what is neutral, and the JSON types that it takes."""
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
    """Equal, and of the same type: True is not 1, and 1 is 1.0 only where both are declared."""
    return type(value) is type(neutral) and value == neutral
