"""One compiled chat template: minijinja with fuel, and the functions that transformers gives every template.

An engine turns a context of plain JSON data into text, or raises one of four errors. Its callers do not
depend on the library behind it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sized
from datetime import datetime
from typing import Protocol

from quire.text.chat_messages import Json

MAX_ERROR_CHARS = 500
MAX_STRFTIME_CHARS = 100
MAX_INDENT = 1000
RAW_NEWLINE = re.compile(r"(\{%[-+]?\s{0,80}raw\s{0,80}%\})\n")
"""Jinja keeps a newline after `{% raw %}` with trim_blocks, minijinja drops one."""
NO_VALUE = re.compile(r"\b(?:undefined|none) has no method")
"""An error that jinja2 has too, unlike that of an unknown method: the value is missing."""


class TemplateRefusedError(Exception):
    """The template rejected the messages: it called `raise_exception(message)`."""


class TemplateBudgetError(Exception):
    """The template used up its fuel, time or output."""


class TemplateFailedError(Exception):
    """The template failed on these messages (a missing field, a wrong type)."""


class UnknownDialectError(Exception):
    """The template uses syntax, a filter, a test or a method that this engine does not have."""


class TemplateEngine(Protocol):
    """One compiled template. Raises the four errors above and nothing else."""

    def render(self, context: Mapping[str, Json]) -> str: ...


class MiniJinjaTemplate:
    """The template in minijinja, with transformers' globals and whitespace rules.

    Lists and dicts of the context appear as themselves: a template may call their public methods
    (`.items()`, but also `.append()`), so the context must be a copy for this render. Names that
    begin with an underscore cannot be reached. Fuel counts instructions and not bytes, so the length of
    what expressions print is counted too, and a render fails at `max_output_chars`.
    """

    def __init__(self, source: str, *, fuel: int, max_output_chars: int) -> None:
        from minijinja import Environment, TemplateError

        self._error = TemplateError
        self._env = Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=fuel,
            debug=False,  # errors without excerpts of the template
            auto_escape_callback=lambda name: False,
            finalizer=self._count_output,
        )
        self._max_output_chars = max_output_chars
        self._printed = threading.local()  # one render per thread at a time
        self._env.add_global("raise_exception", raise_exception)
        self._env.add_global("strftime_now", strftime_now)
        self._env.add_filter("tojson", tojson)
        self._env.add_filter("indent", indent)
        self._env.add_filter("trim", trim)
        self._env.add_filter("length", length)
        self._env.add_filter("count", length)
        self._env.add_test("sequence", is_sequence)
        self._env.add_test("iterable", is_sequence)
        try:
            self._env.add_template("chat", RAW_NEWLINE.sub(r"\1\n\n", source))
        except TemplateError as error:
            raise UnknownDialectError(_first_line(error)) from error

    def render(self, context: Mapping[str, Json]) -> str:
        self._printed.chars = 0
        try:
            return self._env.render_template("chat", **context)
        except self._error as error:
            kind = str(getattr(error, "kind", ""))
            if kind == "OutOfFuel":
                raise TemplateBudgetError(_first_line(error)) from error
            unknown = kind in ("UnknownFilter", "UnknownTest", "UnknownFunction", "UnknownMethod")
            if unknown and not NO_VALUE.search(str(error)):
                raise UnknownDialectError(_first_line(error)) from error
            raise TemplateFailedError(_first_line(error)) from error
        except (TemplateRefusedError, TemplateBudgetError):
            raise
        except Exception as error:  # methods of lists and dicts raise any error of Python
            raise TemplateFailedError(type(error).__name__) from error
        except BaseException as error:
            # A Rust panic is not an Exception: uncaught, one request would end the server.
            if type(error).__name__ != "PanicException":
                raise
            raise TemplateFailedError("panic") from error

    def _count_output(self, value: object) -> object:
        self._printed.chars += len(value if isinstance(value, str) else str(value))
        if self._printed.chars > self._max_output_chars:
            raise TemplateBudgetError("output")
        return NotImplemented  # printed as usual


# --- what transformers gives every template ---


def raise_exception(message: object) -> None:
    raise TemplateRefusedError(str(message))


def strftime_now(pattern: str) -> str:
    """The local time; some system prompts contain the date."""
    if len(pattern) > MAX_STRFTIME_CHARS:
        raise TemplateBudgetError("strftime_now pattern")
    return datetime.now().strftime(pattern)


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain `json.dumps`: Jinja's own `tojson` escapes `<`, `>` and `&` for HTML."""
    if separators is not None:
        separators = (separators[0], separators[1])
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's `indent`; minijinja's drops a final newline."""
    if isinstance(width, int) and width > MAX_INDENT:
        raise TemplateBudgetError("indent width")
    prefix = " " * width if isinstance(width, int) else width
    lines = (text + "\n").splitlines()
    kept = [line if not line and not blank else prefix + line for line in lines[1:]]
    head = prefix + lines[0] if first else lines[0]
    return "\n".join([head, *kept])


def trim(text: object, chars: str | None = None) -> str:
    """As in Python, where U+001C to U+001F are whitespace; in Rust they are not."""
    return ("" if text is None else str(text)).strip(chars)


def length(value: object) -> int:
    """Zero for undefined, which arrives here as None."""
    if value is None:
        return 0
    if not isinstance(value, Sized):
        raise TypeError(type(value).__name__)
    return len(value)


def is_sequence(value: object) -> bool:
    """Jinja's `sequence` and `iterable`: strings and mappings are, None is not.

    `{% if tools is iterable and tools | length > 0 %}` depends on it.
    """
    return isinstance(value, (str, list, tuple, dict))


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:MAX_ERROR_CHARS]
