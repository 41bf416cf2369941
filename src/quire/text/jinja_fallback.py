"""jinja2, for the few templates that minijinja cannot compile or for which it lacks a filter or method.

The same dialect as transformers: `ImmutableSandboxedEnvironment`, in which a template can neither reach
Python's internals nor change the data. jinja2 does not count instructions, so we insert a counted call at
the head of every loop body and macro. A render fails at a number of such calls, a deadline, a length of
output, or an oversized `*`, `+` or `**`. This limits loops, recursion and repetition, but not every
builtin (`~` in a doubling chain, `center(10**9)`, format widths): with this engine, the template's author
must be trusted more than with minijinja.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from quire.text import template_engine
from quire.text.chat_messages import Json

MAX_STEPS = 1_000_000
MAX_SECONDS = 2.0
MAX_POWER_BITS = 4096
STEP = "quire_step"  # the counted call's name in the template's context


class Jinja2Template:
    """The template in sandboxed jinja2. Raises the errors of `template_engine.TemplateEngine`."""

    def __init__(self, source: str, *, max_output_chars: int) -> None:
        self._max_output_chars = max_output_chars
        env = _BudgetedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        env.max_chars = max_output_chars
        env.filters["tojson"] = template_engine.tojson
        env.globals["raise_exception"] = template_engine.raise_exception
        env.globals["strftime_now"] = template_engine.strftime_now
        env.globals["namespace"] = _SafeNamespace
        try:
            self._template = env.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise template_engine.UnknownDialectError(type(error).__name__) from error

    def render(self, context: Mapping[str, Json]) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate({**context, STEP: _Budget().step}):
                length += len(piece)
                if length > self._max_output_chars:
                    raise template_engine.TemplateBudgetError("output")
                pieces.append(piece)
        except (template_engine.TemplateRefusedError, template_engine.TemplateBudgetError):
            raise
        except (MemoryError, OverflowError) as error:
            raise template_engine.TemplateBudgetError(type(error).__name__) from error
        except Exception as error:  # template code can fail in any way Python can
            raise template_engine.TemplateFailedError(type(error).__name__) from error
        return "".join(pieces)


class _Budget:
    """Counts the loop turns and macro calls of one render."""

    __slots__ = ("_deadline", "_left")

    def __init__(self) -> None:
        self._left = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise template_engine.TemplateBudgetError("steps")
        if self._left & 0xFF == 0 and time.monotonic() > self._deadline:
            raise template_engine.TemplateBudgetError("time")


class _BudgetedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "+", "**"})
    max_chars = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            call = nodes.Call(nodes.Name(STEP, "load"), [], [], None, None)
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        if operator == "**":
            self._check_power(left, right)
        else:
            self._check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)  # type: ignore[arg-type]

    def _check_power(self, left: object, right: object) -> None:
        if not (isinstance(left, int) and isinstance(right, int)):
            return
        if abs(left).bit_length() * abs(right) > MAX_POWER_BITS:
            raise template_engine.TemplateBudgetError("power")

    def _check_size(self, operator: str, left: object, right: object) -> None:
        sized = (str, list, tuple)
        if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            size = len(left) + len(right)
        elif isinstance(left, sized) and isinstance(right, int):
            size = len(left) * right
        elif isinstance(right, sized) and isinstance(left, int):
            size = len(right) * left
        else:
            return
        if size > self.max_chars:
            raise template_engine.TemplateBudgetError("size")


class _SafeNamespace(Namespace):
    """Refuses underscored names, which would reach attributes of the object itself."""

    def __init__(*args: object, **kwargs: object) -> None:
        self = args[0]
        values = dict(*args[1:], **kwargs)  # type: ignore[call-overload]
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name[:40]!r} is not allowed")
