"""Chat templates: messages to prompt text, as transformers renders them, within limits of time and size.

A chat template is a program from the checkpoint that runs on data from a request. So it runs in
minijinja, a Rust engine that cannot reach Python and that has fuel: every instruction costs one unit. A
loop over a hundred thousand messages, or one written to waste time, ends in an error after a fraction of
a second and does not block the event loop. Templates in a dialect that minijinja does not know run in a
sandboxed jinja2 with weaker limits (see `jinja_fallback.py`).

What the limits do not cover: fuel counts instructions, and the output limit counts what is printed. A
template written as an attack (doubling a string 40 times, `"{:>9999999999}".format(x)`) can still exhaust
memory, in either engine; data alone cannot make an honest template do so. Hence templates come from the
operator. One that comes with a request is refused unless the operator trusts clients as much as the
checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import ConfigError, InvalidParameterError
from quire.text.chat_messages import Json, plain_json, read_turns
from quire.text.template_engine import (
    MAX_ERROR_CHARS,
    MiniJinjaTemplate,
    TemplateBudgetError,
    TemplateEngine,
    TemplateFailedError,
    TemplateRefusedError,
    UnknownDialectError,
)
from quire.text.template_facts import ContentFormat, ContentSupport, find_facts

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

DEFAULT_FUEL = 3_000_000  # ~0.3 s; a message costs 10 to 100
DEFAULT_MAX_OUTPUT_CHARS = 16 << 20
MAX_SOURCE_CHARS = 1 << 20
MAX_KWARGS = 64
MAX_KWARGS_CHARS = 64 << 10

RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template "
    "tokenize raise_exception strftime_now".split()
)
# Ends the final message to be continued; the trailing space shows whether the template trims.
CONTINUE_MARK = "QUIRE_CONTINUES_HERE "
# transformers' own tag around the model's text: it has no effect when a prompt is rendered.
GENERATION_TAG = re.compile(r"\{%([-+]?)\s{0,80}(end)?generation\s{0,80}([-+]?)%\}")


class ChatTemplate:
    """A compiled chat template. Safe to share; holds no request state.

    source: Jinja in transformers' dialect.
    tool_source: another template for requests with tools, as some checkpoints have.
    content_format: "string" or "openai" (parts) forces one form of message content on the
        template; "auto" finds out which one it takes by rendering small conversations
        (`template_facts.py`).
    fuel: minijinja instructions per render. max_output_chars: longest prompt text accepted.

    Raises `InvalidParameterError(param="chat_template")` for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        content_format: ContentFormat = "auto",
        fuel: int = DEFAULT_FUEL,
        max_output_chars: int = DEFAULT_MAX_OUTPUT_CHARS,
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise InvalidParameterError(
                f"The chat template has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}.",
                param="chat_template",
            )
        self._max_output_chars = max_output_chars
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self._constants: dict[str, Json] = dict(special_tokens or {})
        self._constants |= {name: token for name, token in named.items() if token is not None}
        self._source = GENERATION_TAG.sub(_inert_tag, source)
        self._fallback: TemplateEngine | None = None
        self._needs_jinja2 = False
        self._engine = self._compile(fuel)
        self.facts = find_facts(self._probe, content_format)
        if not self.facts.complete and self._needs_jinja2:
            self.facts = find_facts(self._probe_in_both, content_format)
        self._for_tools: ChatTemplate | None = None
        if tool_source is not None and tool_source != source:
            self._for_tools = ChatTemplate(
                tool_source,
                special_tokens=self._constants,  # type: ignore[arg-type]
                content_format=content_format,
                fuel=fuel,
                max_output_chars=max_output_chars,
            )
        self.source = source if tool_source is None else tool_source
        """The template's text; where there are two, the one for tools, because it shows how calls are
        written."""

    @classmethod
    def for_tokenizer(
        cls,
        source: str,
        tokenizer: Tokenizer,
        *,
        tool_source: str | None = None,
        content_format: ContentFormat = "auto",
    ) -> ChatTemplate:
        """A template that sees the tokenizer's special tokens, as transformers passes them."""
        return cls(
            source,
            tool_source=tool_source,
            special_tokens=tokenizer.special_tokens,
            content_format=content_format,
        )

    @property
    def content_support(self) -> ContentSupport:
        """Which forms of a user message's content the template takes."""
        return self.facts.support("user")

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        **kwargs: object,
    ) -> str:
        """The prompt text. Encode it with `add_special_tokens=False`: the template writes bos.

        `kwargs` are the request's `chat_template_kwargs` (`enable_thinking=False`, ...).
        `continue_final_message` leaves the last message open, so that the model continues it.

        Raises `InvalidParameterError`: with the template's own message where it rejects the conversation,
        with a fixed message where it fails or exceeds a limit.
        """
        if tools and self._for_tools is not None:
            return self._for_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                **kwargs,
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidParameterError(
                "continue_final_message needs add_generation_prompt=false: the prompt ends either "
                "in the last message or in the beginning of a new one.",
                param="continue_final_message",
            )
        extra = _checked_kwargs(kwargs, self._constants)
        turns = read_turns(messages)
        if continue_final_message and not turns[-1].texts:
            raise InvalidParameterError(
                "continue_final_message is set, but the final message has no text to continue.",
                param="continue_final_message",
            )
        written = self.facts.write(turns)
        final_text = _mark_final(written) if continue_final_message else None
        context: dict[str, Json] = {
            **self._constants,
            **extra,
            "messages": list(written),
            "tools": self.facts.write_tools(plain_json(tools or [], param="tools")),
            "documents": None if documents is None else plain_json(documents, param="documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._rendered(context)
        return text if final_text is None else _cut_at_mark(text, final_text)

    def _rendered(self, context: Mapping[str, Json]) -> str:
        try:
            text = self._run(context)
        except TemplateRefusedError as error:
            raise InvalidParameterError(str(error)[:MAX_ERROR_CHARS], param="messages") from error
        except TemplateBudgetError as error:
            raise InvalidParameterError(
                "The chat template did not finish within its budget for these messages; send "
                "fewer or shorter messages and tools.",
                param="messages",
            ) from error
        except (TemplateFailedError, UnknownDialectError) as error:
            raise InvalidParameterError(
                "The model's chat template cannot render these messages. Check that every message "
                "has the role and fields that the model's documentation asks for.",
                param="messages",
            ) from error
        if len(text) > self._max_output_chars:
            raise InvalidParameterError(
                f"The chat template made a prompt of {len(text)} characters; the limit is "
                f"{self._max_output_chars}.",
                param="messages",
            )
        return text

    def _run(self, context: Mapping[str, Json]) -> str:
        """Render in minijinja; if it fails, in jinja2.

        Filters and methods are looked up only when they are reached, and minijinja is stricter than
        jinja2 in places (`""[::-1]` even panics). So the cause of an error may be the engine, not the data.
        """
        try:
            return self._engine.render(context)
        except (UnknownDialectError, TemplateFailedError) as error:
            fallback = self._jinja2()
            if fallback is None or fallback is self._engine:
                raise
            text = fallback.render(context)
            if isinstance(error, UnknownDialectError):  # it would fail for all data: keep jinja2
                self._engine = fallback
            return text

    def _compile(self, fuel: int) -> TemplateEngine:
        try:
            return MiniJinjaTemplate(
                self._source, fuel=fuel, max_output_chars=self._max_output_chars
            )
        except UnknownDialectError as error:
            fallback = self._jinja2()
            if fallback is None:
                raise InvalidParameterError(
                    f"The chat template cannot be compiled: {error}. If it is valid Jinja that "
                    "minijinja does not know, install jinja2.",
                    param="chat_template",
                ) from error
            return fallback

    def _jinja2(self) -> TemplateEngine | None:
        """The template in jinja2, compiled once; None where that is impossible."""
        if self._fallback is None:
            try:
                from quire.text.jinja_fallback import Jinja2Template

                self._fallback = Jinja2Template(
                    self._source, max_output_chars=self._max_output_chars
                )
            except (ImportError, UnknownDialectError):
                return None
        return self._fallback

    def _probe(self, messages: list[Json], tools: Json) -> str | None:
        """Render a probe, without jinja2: most templates fail on some probes, and loading jinja2 takes
        long."""
        try:
            return self._engine.render(self._probe_context(messages, tools))
        except UnknownDialectError:
            self._needs_jinja2 = True
        except (TemplateRefusedError, TemplateBudgetError, TemplateFailedError):
            pass
        return None

    def _probe_in_both(self, messages: list[Json], tools: Json) -> str | None:
        try:
            return self._run(self._probe_context(messages, tools))
        except (
            TemplateRefusedError,
            TemplateBudgetError,
            TemplateFailedError,
            UnknownDialectError,
        ):
            return None

    def _probe_context(self, messages: list[Json], tools: Json) -> dict[str, Json]:
        return {
            **self._constants,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
        }


def _inert_tag(tag: re.Match[str]) -> str:
    """`{% generation %}` as an `if true`, which keeps the tag's whitespace control."""
    left, end, right = tag.groups()
    return f"{{%{left} {'endif' if end else 'if true'} {right}%}}"


def _checked_kwargs(kwargs: Mapping[str, object], constants: Mapping[str, Json]) -> dict[str, Json]:
    param = "chat_template_kwargs"
    if not kwargs:
        return {}
    if len(kwargs) > MAX_KWARGS:
        raise InvalidParameterError(
            f"{param} has {len(kwargs)} keys; at most {MAX_KWARGS}.", param=param
        )
    for name in kwargs:
        if name in RESERVED or name in constants or name.startswith("_"):
            raise InvalidParameterError(
                f"{param} may not set {name[:80]!r}; it has a field of its own or belongs to the model.",
                param=param,
                value=name[:80],
            )
    plain = plain_json(kwargs, param=param)
    assert isinstance(plain, dict)
    if len(json.dumps(plain)) > MAX_KWARGS_CHARS:
        raise InvalidParameterError(
            f"{param} is longer than {MAX_KWARGS_CHARS} characters of JSON.", param=param
        )
    return plain


def _mark_final(messages: list[dict[str, Json]]) -> str:
    """Append the mark to the final message's text; returns that text."""
    message = messages[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUE_MARK
        return content
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = str(part["text"])
                part["text"] = text + CONTINUE_MARK
                return text
    raise InvalidParameterError(
        "continue_final_message is set, but the final message has no text to continue.",
        param="continue_final_message",
    )


def _cut_at_mark(rendered: str, final_text: str) -> str:
    mark = CONTINUE_MARK.rstrip()
    at = rendered.rfind(mark)
    if at < 0 or final_text.strip() not in rendered:
        raise InvalidParameterError(
            "continue_final_message is set, but the chat template does not show the final "
            "message as it is, so it cannot be continued.",
            param="continue_final_message",
        )
    # A template that trims the message also trims its trailing space.
    keeps_space = rendered.startswith(CONTINUE_MARK, at)
    return rendered[:at] if keeps_space else rendered[:at].rstrip()


def read_chat_template(value: str) -> str:
    """The template source that `--chat-template VALUE` means: a file's text, or VALUE itself.

    Anything with Jinja in it is a template; anything else names a file.
    Raises `ConfigError` for a file that cannot be read.
    """
    if any(mark in value for mark in ("{{", "{%", "\n")):
        return value
    path = Path(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--chat-template {value!r} is neither a readable UTF-8 file nor a Jinja template."
        ) from error
