"""The known formats, by the names of vLLM's parsers, and the choice of one by the model's chat template.

It is a table: a new family that writes JSON between its own markers is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from quire.errors import ConfigError
from quire.text.parsing import harmony
from quire.text.parsing.base import Parser, PlainParser, ThinkingTokens
from quire.text.parsing.calls import CallParser, ToolFormat, Tools
from quire.text.parsing.harmony import HarmonyParser
from quire.text.parsing.reasoning import HiddenTokens, ReasoningFormat, ThinkParser

AUTO, NONE = "auto", "none"

HARMONY = ToolFormat(start=harmony.MARKERS)
"""gpt-oss: one parser for everything, see `harmony`."""
HARMONY_REASONING = ReasoningFormat("<|channel|>analysis<|message|>", "<|end|>")

PLAIN_JSON = ToolFormat(
    bare=True, forced=('{"name": "', '", "parameters": ', "}"), listed=("[", ", ", "]")
)
"""What a grammar makes a model write if there is no grammar for its own format (as in vLLM)."""

_HERMES = ToolFormat(
    start=("<tool_call>",),
    end=("</tool_call>",),
    forced=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    listed=("", "\n", ""),
)
_TAGGED = ToolFormat(start=("<tool_call>",), end=("</tool_call>",))
_LLAMA = ToolFormat(
    start=("<|python_tag|>",),
    bare=True,
    forced=('{"name": "', '", "parameters": ', "}"),
    listed=("", "; ", ""),
)
_PYTHONIC = ToolFormat(
    start=("<|python_start|>",), end=("<|python_end|>",), bare=True, pythonic=True
)
_MISTRAL = ToolFormat(
    start=("[TOOL_CALLS]",),
    named=("[ARGS]", "[CALL_ID]"),
    forced=('{"name": "', '", "arguments": ', "}"),
    listed=("[TOOL_CALLS][", ", ", "]"),
    short_ids=True,
)
_MISTRAL_NAMED = ToolFormat(
    start=_MISTRAL.start,
    named=_MISTRAL.named,
    forced=("[TOOL_CALLS]", "[ARGS]", ""),
    short_ids=True,
)
_DEEPSEEK = ToolFormat(
    start=("<｜tool▁call▁begin｜>",),
    end=("<｜tool▁call▁end｜>",),
    around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    named=("<｜tool▁sep｜>",),
    forced=(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "\n```json\n",
        "\n```<｜tool▁call▁end｜>",
    ),
    listed=("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
)
_DEEPSEEK_31 = ToolFormat(
    start=_DEEPSEEK.start,
    end=_DEEPSEEK.end,
    around=_DEEPSEEK.around,
    named=_DEEPSEEK.named,
    forced=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    listed=("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": _HERMES,
    "qwen3_coder": _TAGGED,
    "qwen3_xml": _TAGGED,
    "llama3_json": _LLAMA,
    "llama4_json": _LLAMA,
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
    "mistral": _MISTRAL,
    "mistral_args": _MISTRAL_NAMED,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK_31,
    "openai": HARMONY,
    "granite": ToolFormat(start=("<|tool_call|>", "<tool_call>")),
    "internlm": ToolFormat(start=("<|action_start|><|plugin|>",), end=("<|action_end|>",)),
    "jamba": ToolFormat(start=("<tool_calls>",), end=("</tool_calls>",)),
    "phi4_mini_json": ToolFormat(start=("functools",)),
}

_THINK = ReasoningFormat("<think>", "</think>")
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "nemotron_v3", "olmo3", "step3"), _THINK
    ),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
    "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "openai_gptoss": HARMONY_REASONING,
}

_TOOL_SIGNS = (
    ("<|channel|>", "openai"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", None),
    ("<｜tool▁calls▁begin｜>function", "deepseek_v3"),
    ("<｜tool▁call▁begin｜>", "deepseek_v31"),
    ("[ARGS]", "mistral_args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "llama4_pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name and its value', "llama3_json"),
)
"""Text in a template -> the tool format of its models. The first entry whose text is found counts."""
_REASONING_SIGNS = (
    ("<|channel|>", "openai_gptoss"),
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed_oss"),
    ("</think>", "qwen3"),
    ("<think>", "qwen3"),
)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The formats of a served model's outputs."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    def parser(
        self, tools: Tools | None, *, inside: bool, hidden: frozenset[str] = frozenset()
    ) -> Parser:
        """A parser for one output. Without `tools`, calls are text. `inside`: the prompt ends inside the
        reasoning.
        `hidden`: special tokens that are in the text and must be dropped."""
        parser: Parser
        if self.reasoning is HARMONY_REASONING or self.tools is HARMONY:
            parser = HarmonyParser(calls=tools is not None)
        else:
            parser = PlainParser()
            if tools is not None and self.tools is not None:
                parser = CallParser(self.tools, tools)
            if self.reasoning is not None:
                parser = ThinkParser(self.reasoning, parser, inside=inside)
        hidden -= self.markers
        return HiddenTokens(hidden, parser) if hidden else parser

    @property
    def markers(self) -> frozenset[str]:
        """Texts that the parsers need, though they may be special tokens."""
        found = set(self.tools.markers + self.tools.named) if self.tools else set()
        if self.reasoning is HARMONY_REASONING:
            found |= set(harmony.MARKERS)
        elif self.reasoning:
            found |= {self.reasoning.start, self.reasoning.end}
        return frozenset(found)

    def inside(self, prompt: str, *, continued: str | None = None) -> bool:
        """Whether a prompt ends inside the reasoning. `continued`: the message that the model is to
        continue. Other text from clients cannot open reasoning."""
        if self.reasoning is None or self.reasoning is HARMONY_REASONING:
            return False
        start, end = self.reasoning.start, self.reasoning.end
        if continued is not None:
            return continued.rfind(start) > continued.rfind(end)
        return prompt.rstrip().endswith(start)

    def thinking(
        self, encode: Callable[[str], list[int]], *, inside: bool
    ) -> ThinkingTokens | None:
        """The markers as token ids, for rules that differ inside the reasoning."""
        if self.reasoning is None or self.reasoning is HARMONY_REASONING:
            return None
        return ThinkingTokens(encode(self.reasoning.start), encode(self.reasoning.end), inside)


@lru_cache(maxsize=64)
def output_format(tool_parser: str, reasoning_parser: str, template: str) -> OutputFormat:
    """The formats with these names; "auto" is found by `template`, "none" is no format.

    Raises `ConfigError` for an unknown name.
    """
    tools = _chosen("tool_call_parser", tool_parser, TOOL_FORMATS, _TOOL_SIGNS, template)
    reasoning = _chosen(
        "reasoning_parser", reasoning_parser, REASONING_FORMATS, _REASONING_SIGNS, template
    )
    return OutputFormat(
        TOOL_FORMATS[tools] if tools else None,
        REASONING_FORMATS[reasoning] if reasoning else None,
    )


def _chosen(
    option: str,
    name: str,
    known: Iterable[str],
    signs: Iterable[tuple[str, str | None]],
    template: str,
) -> str | None:
    if name == AUTO:
        return next((found for sign, found in signs if sign in template), None)
    if name == NONE:
        return None
    if name not in known:
        raise ConfigError(
            f"{option} {name!r} is not known; it must be {AUTO}, {NONE} or one of "
            f"{', '.join(sorted(known))}."
        )
    return name
