"""What clients may send. Our own models: bounds on every list and string, strict types, and every
field either used, refused by name (`unsupported`), or reported back as unknown.

Values that have a rule (`temperature`, `n`, ...) are checked by `SamplingParams`, in one place for all
front ends; here only types and sizes are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_IDS = 1 << 20
MAX_STOPS = 256
MAX_MESSAGES = 8192
MAX_CONTENT_PARTS = 1024
MAX_TEMPLATE_KWARGS = 64

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS)]
Name = Annotated[str, Field(max_length=256)]
Prompt = Annotated[
    str
    | Annotated[list[str], Field(fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(fail_fast=True)],
    Field(description="A text, a list of texts, token ids, or a list of lists of token ids."),
]


class Strict(BaseModel):
    """Base: JSON types must match, an explicit null counts as absent (see `body`)."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Strict):
    """Fields that both generation endpoints share. Defaults are the model's, see `sampling`."""

    model: Name | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Name | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None


class CompletionRequest(SamplingFields):
    prompt: Prompt
    logprobs: int | None = None
    echo: bool | None = None


class ContentPart(Strict):
    """A part of a message. The template's own normalisation says which types it takes."""

    type: Name
    text: str | None = None
    refusal: str | None = None


class Message(Strict):
    """One turn. Other keys do not reach the template: what it reads is listed here."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: (
        str
        | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_CONTENT_PARTS)]
        | None
    ) = None
    name: Name | None = None
    tool_calls: Annotated[list[Any], Field(max_length=1024)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ChatFields(Strict):
    """How messages become a prompt; the same for answering and for `/tokenize`."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None
    ) = None
    reasoning_effort: Name | None = None
    add_special_tokens: bool | None = None


class ChatCompletionRequest(ChatFields, SamplingFields):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeCompletionRequest(Strict):
    model: Name | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatFields):
    model: Name | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: TokenIds


class AbortRequest(Strict):
    request_ids: Annotated[
        list[Annotated[Name, Field(min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=1024),
    ]
    """Ids of answers: chatcmpl-..., cmpl-..., embd-..."""
