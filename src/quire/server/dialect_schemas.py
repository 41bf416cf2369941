"""Requests of /v1/responses and /v1/messages. The contents of items, blocks and tools are checked where
they are translated, and then again as a chat completion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from quire.server.neutral import Neutral
from quire.server.requests import (
    MAX_MESSAGES,
    MAX_TEMPLATE_KWARGS,
    MAX_TOOLS,
    DecodingFields,
    Name,
    Object,
    Texts,
)

Items = Annotated[list[Object], Field(fail_fast=True, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Object], Field(fail_fast=True, max_length=MAX_TOOLS)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class DialectFields(DecodingFields):
    """Fields that both have here, and that neither OpenAI nor Anthropic has."""

    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None
    ) = None
    """Variables for the template."""


class ResponsesRequest(DialectFields):
    input: str | Items
    """A text, or items: messages, reasoning, calls and their outputs (of functions, custom tools, shells,
    patches, MCP servers), item_reference to a stored item. Items about other tools are left out with a
    warning."""
    instructions: str | None = None
    """A system text for this request only, before the input."""
    previous_response_id: Name | None = None
    """A stored response whose input and output come before `input`."""
    max_output_tokens: int | None = None
    """`max_tokens`."""
    stop: str | Texts | None = None
    tools: Tools | None = None
    """Of type function: {"type": "function", "name", "description", "parameters", "strict"}; custom: served
    as a function with one text, its format is not enforced; namespace: a group of these. Others (web_search,
    image_generation, local_shell, ...) are left out with a warning."""
    tool_choice: Name | Object | None = None
    """none, auto, required, {"type": "function" | "custom", "name": ...} or {"type": "allowed_tools"}."""
    parallel_tool_calls: bool | None = None
    """false: one call at most."""
    text: Object | None = None
    """`format`: {"type": "text" | "json_object" | "json_schema"}."""
    reasoning: Object | None = None
    """`effort`, for templates that know it. Nothing summarises."""
    top_logprobs: Annotated[Annotated[int, Field(ge=0, le=20)] | None, Neutral(0)] = None
    """Logprobs of each token of the answer, with this many of the likeliest tokens'."""
    include: Annotated[list[Name], Field(fail_fast=True, max_length=64)] | None = None
    """"message.output_text.logprobs"."""
    truncation: Literal["auto", "disabled"] | None = None
    """auto: leave out the oldest turns of a conversation that is too long."""
    store: bool | None = None
    """Keep the response, to be retrieved or continued: the default. Kept in memory, within
    `--max-stored-responses` and `--max-stored-response-bytes`."""
    background: bool | None = None
    """Answer at once with a queued response, to be retrieved later."""
    metadata: Metadata | None = None
    """Returned unchanged."""
    stream_options: Object | None = None
    """Accepted without effect: nothing is obfuscated."""


class CountTokensRequest(DialectFields):
    messages: Annotated[list[Object], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    """Of roles user, assistant and system; a content is a text, or blocks of type text, thinking, tool_use,
    tool_result, search_result, and document with a text. What Anthropic's own tools did (server_tool_use,
    web_search_tool_result, ...) is left out with a warning. An assistant's text at the end is continued."""
    system: str | Items | None = None
    """A text, or blocks of type text. Claude Code's x-anthropic-billing-header, which changes at every
    request, is left out."""
    tools: Tools | None = None
    """{"name", "description", "input_schema", "strict"}. Tools of other types than custom (bash_20250124,
    web_search_20250305, ...) are left out with a warning."""
    tool_choice: Object | None = None
    """{"type": "auto" | "any" | "none"} or {"type": "tool", "name": ...}, and
    `disable_parallel_tool_use`."""
    thinking: Object | None = None
    """{"type": "enabled", "budget_tokens": n}: `thinking_token_budget`; "disabled" and "adaptive" too. The
    template gets `enable_thinking`."""
    output_config: Object | None = None
    """`effort`, for templates that know it; `format`: {"type": "json_schema", "schema": ...}."""
    output_format: Object | None = None
    """An older place of `output_config.format`."""
    cache_control: Object | None = None
    """{"type": "ephemeral", "ttl": "5m" | "1h"}: the prompt stays in the cache longer than others, until it
    has not been used for so long. In a block: the prompt up to its end. Within `--retained-cache-share`."""


class MessagesRequest(CountTokensRequest):
    max_tokens: int
    """Most tokens to generate."""
    stop_sequences: Texts | None = None
    """`stop`."""
