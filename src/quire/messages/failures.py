"""Exceptions that cross the boundary between front end and engine core, as data and back."""

from __future__ import annotations

from quire import errors
from quire.errors import EngineError, QuireError
from quire.messages.core import Failure


def failure_of(error: Exception, what: str) -> Failure:
    """`error` as data. Only our own errors keep their text; for others, clients see `what` and the type."""
    if isinstance(error, QuireError):
        return Failure(str(error), type(error).__name__)
    return Failure(f"{what} ({type(error).__name__}).", "EngineError")


def error_of(failure: Failure) -> QuireError:
    """The exception of `failure`; an `EngineError` if its kind cannot be constructed from a text."""
    kind = getattr(errors, failure.kind, EngineError)
    if isinstance(kind, type) and issubclass(kind, QuireError):
        try:
            return kind(failure.message)
        except TypeError:
            pass
    return EngineError(failure.message)
