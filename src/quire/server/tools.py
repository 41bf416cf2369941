"""How a request's tools affect its sampling, and how its outputs are parsed: for every endpoint with tools or
reasoning, whatever its format."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from quire.errors import InvalidParameterError
from quire.outputs import CompletionOutput
from quire.sampling_params import SamplingParams, StructuredOutputsParams
from quire.server.engine_protocol import ServedModel
from quire.server.errors import bad_request
from quire.server.requests import ChatCompletionRequest, Tool
from quire.server.state import ServerState
from quire.text.parsing import (
    Event,
    OutputFormat,
    Parser,
    ReasoningDelta,
    ThinkingTokens,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    output_format,
)
from quire.text.parsing.calls import Tools
from quire.text.parsing.forcing import ANY_ARGUMENTS, forced_calls, guided_calls
from quire.text.parsing.formats import PLAIN_JSON

CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One request's tools, checked."""

    format: OutputFormat
    """The format of its outputs. If a grammar prescribes one, it is not the model's own."""
    tools: Tools | None = None
    """The tools that may be called. None: text that looks like a call is text."""
    grammar: StructuredOutputsParams | None = None
    several: bool = True
    warnings: tuple[str, ...] = ()


def served_format(state: ServerState, model: ServedModel) -> OutputFormat:
    template = model.chat_template
    return output_format(
        state.config.tool_call_parser,
        state.config.reasoning_parser,
        template.source if template else "",
    )


def tool_use(
    request: ChatCompletionRequest, served: OutputFormat, params: SamplingParams
) -> ToolUse:
    """Raises a 400 `ApiError` naming the field that cannot be served."""
    offered = _functions(request.tools or [])
    choice, names = _choice(request.tool_choice, offered)
    plain = ToolUse(replace(served, tools=None))
    if not offered:
        if choice == "required":
            raise bad_request("tool_choice needs tools to choose from.", param="tool_choice")
        return plain
    if choice == "none":
        return plain
    several = request.parallel_tool_calls is not False
    tools = {name: schema for name, (schema, _) in offered.items() if name in names}
    if choice == "required":
        if params.structured_outputs is not None:
            raise bad_request(
                "tool_choice required, or a named one, excludes structured_outputs and "
                "response_format: both say what the whole output must be.",
                param="tool_choice",
            )
        form = served.tools if served.tools and served.tools.forced else PLAIN_JSON
        several = several and isinstance(request.tool_choice, str)
        grammar = forced_calls(form, tools, several=several)
        return ToolUse(replace(served, tools=form), tools, grammar, several)
    if served.tools is None:
        raise bad_request(
            "tool_choice auto needs to know how this model writes tool calls, and its chat template does "
            "not say. Start the server with --tool-call-parser, or use tool_choice required.",
            param="tool_choice",
        )
    strict = {name for name in tools if offered[name][1]}
    if not strict and len(tools) == len(offered):
        return ToolUse(served, tools, None, several)
    guided = None
    if params.structured_outputs is None:
        guided = guided_calls(served.tools, tools, strict)
    warnings = () if guided else ("strict tools are not enforced here with tool_choice auto",)
    return ToolUse(served, tools, guided, several, warnings)


def _functions(tools: Sequence[Tool]) -> dict[str, tuple[dict[str, object], bool]]:
    """Name -> schema, and whether it is strict."""
    found: dict[str, tuple[dict[str, object], bool]] = {}
    for index, tool in enumerate(tools):
        if tool.type != "function" or tool.function is None:
            raise bad_request(
                f"tools[{index}] must be of type function, with a function; {tool.type[:40]!r} is not "
                "supported.",
                param="tools",
            )
        function = tool.function
        schema = function.parameters or {}
        kind = schema.get("type") or "object"
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise bad_request(
                f"tools[{index}].function.parameters must be a schema of an object.", param="tools"
            )
        if function.name in found:
            raise bad_request(f"tools has {function.name} twice.", param="tools")
        found[function.name] = (schema | ANY_ARGUMENTS, function.strict is True)
    return found


def _choice(choice: object, offered: Mapping[str, object]) -> tuple[str, set[str]]:
    """One of `CHOICES`, and the names of the allowed tools."""
    if choice is None:
        return "auto", set(offered)
    if isinstance(choice, str) and choice in CHOICES:
        return choice, set(offered)
    mode, entries = _mode(choice)
    names = [_name(entry) for entry in entries]
    if mode not in ("auto", "required") or not names or None in names:
        raise bad_request(
            "tool_choice must be none, auto, required, or an object of type function or allowed_tools "
            "that names functions.",
            param="tool_choice",
        )
    for name in names:
        if name not in offered:
            raise bad_request(
                f"tool_choice names {str(name)[:64]!r}, which is not among the tools.",
                param="tool_choice",
            )
    return str(mode), {str(name) for name in names}


def _mode(choice: object) -> tuple[object, list[object]]:
    """The mode of a tool_choice that is an object, and its function references."""
    if not isinstance(choice, dict):
        return None, []
    if choice.get("type") == "function":
        return "required", [choice]
    allowed = choice.get("allowed_tools", choice)
    if choice.get("type") != "allowed_tools" or not isinstance(allowed, dict):
        return None, []
    entries = allowed.get("tools")
    return allowed.get("mode", "auto"), entries if isinstance(entries, list) else []


def _name(entry: object) -> str | None:
    """The name in a function reference: in `function`, or at the top as in the Responses API."""
    inner = entry.get("function", entry) if isinstance(entry, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


@contextmanager
def blaming_tools(use: ToolUse) -> Iterator[None]:
    """Errors of a grammar that was made from schemas in `tools` name that field."""
    try:
        yield
    except InvalidParameterError as error:
        if use.grammar is None or error.param != "structured_outputs":
            raise
        raise bad_request(
            f"The tools' schemas cannot be enforced. {error}", param="tools"
        ) from None


class AnswerReader:
    """Parses one request's outputs into events: one parser for each choice."""

    def __init__(
        self,
        use: ToolUse,
        params: SamplingParams,
        model: ServedModel,
        *,
        prompt: str,
        continued: str | None = None,
        reasoning: bool = True,
    ) -> None:
        """prompt, continued: see `OutputFormat.inside`. reasoning: whether the client wants to see it."""
        self._use = use
        self._reasoning = reasoning
        self._inside = use.format.inside(prompt, continued=continued)
        special = model.tokenizer.special_texts
        shows = params.skip_special_tokens and not special.isdisjoint(use.format.markers)
        changes: dict[str, object] = {"skip_special_tokens": False} if shows else {}
        if use.grammar is not None:
            changes["structured_outputs"] = use.grammar
        self.params = params.replace(**changes) if changes else params
        """`params`, changed so that the outputs can be parsed."""
        self._hidden = special if shows else frozenset()
        self.thinking: ThinkingTokens | None = use.format.thinking(
            lambda text: model.tokenizer.encode(text, add_special_tokens=False),
            inside=self._inside,
        )
        self._parsers: dict[int, Parser] = {}
        self._called: set[int] = set()
        self._thinking_now: dict[int, bool] = {}
        self._counts = bool(self.thinking and len(self.thinking.end) == 1)
        self.reasoning_tokens: int | None = 0 if self._counts else None
        """Of all choices so far; None if they cannot be counted."""

    def events(self, part: CompletionOutput) -> list[Event]:
        """The events that an output of one choice adds."""
        parser = self._parsers.get(part.index)
        if parser is None:
            parser = self._use.format.parser(
                self._use.tools, inside=self._inside, hidden=self._hidden
            )
            self._parsers[part.index] = parser
        self._count(part)
        events = parser.push(part.text, final=part.finished)
        if any(isinstance(event, ToolCallEnd) for event in events):
            self._called.add(part.index)
        return [event for event in events if self._is_wanted(event)]

    def finish_reason(self, part: CompletionOutput) -> str | None:
        """To be called after `events`."""
        stopped = part.finish_reason == "stop" and part.index in self._called
        return "tool_calls" if stopped else part.finish_reason

    def call_id(self) -> str:
        form = self._use.format.tools
        if form is not None and form.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._reasoning
        if isinstance(event, (ToolCallStart, ToolCallArguments, ToolCallEnd)):
            return self._use.several or event.index == 0
        return True

    def _count(self, part: CompletionOutput) -> None:
        """Count the tokens between the markers, without the markers."""
        if self.reasoning_tokens is None or self.thinking is None:
            return
        inside = self._thinking_now.get(part.index, self._inside)
        for token in part.token_ids:
            if [token] == self.thinking.end:
                inside = False
            elif [token] == self.thinking.start:
                inside = True
            elif inside:
                self.reasoning_tokens += 1
        self._thinking_now[part.index] = inside
