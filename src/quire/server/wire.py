"""The server's answers as msgspec structs: encoded once, not validated.

A field that is null in OpenAI's answers is None here; one that is absent is UNSET.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType, json

encode = json.Encoder().encode


class PrefixDetails(Struct, frozen=True, kw_only=True):
    """See `PrefixReport`."""

    device: int
    ram: int
    disk: int
    peer: int
    computed: int
    reason: str
    seconds_ago: float | UnsetType = UNSET


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int
    prefix: list[PrefixDetails] | UnsetType = UNSET
    """With `return_prefix_details`: of each prompt."""


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


StreamUsage = Usage | None | UnsetType
"""In a stream: absent unless asked for; then null until the last chunk, or set in each chunk."""

Warnings = list[str] | UnsetType
EffectiveParams = dict[str, object] | UnsetType
"""With `return_effective_params`: see `sampling.effective_params`."""
Metrics = dict[str, object] | UnsetType
"""What vLLM says of one request: `speculative_decoding`."""
KVParams = dict[str, object] | UnsetType
"""Where another instance finds the prompt's KV; in a stream, in the chunk with the finish reason."""


class VocabLogprob(Struct, frozen=True):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, VocabLogprob] | None]
"""One entry per prompt token, by token id; the first has none."""

# --- completions ----------------------------------------------------------------------------------


class CompletionLogprobs(Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """Also a stream's choice: OpenAI uses the same format for both."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionResponse(Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: StreamUsage = UNSET
    effective_params: EffectiveParams = UNSET
    warnings: Warnings = UNSET
    metrics: Metrics = UNSET
    kv_transfer_params: KVParams = UNSET


# --- chat -----------------------------------------------------------------------------------------


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[TokenLogprob]


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: str
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The same text under vLLM's older name, which most clients read."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    effective_params: EffectiveParams = UNSET
    warnings: Warnings = UNSET
    metrics: Metrics = UNSET
    kv_transfer_params: KVParams = UNSET


class FunctionDelta(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """The first delta of a call has its id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class Delta(Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: StreamUsage = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    effective_params: EffectiveParams = UNSET
    warnings: Warnings = UNSET
    metrics: Metrics = UNSET
    kv_transfer_params: KVParams = UNSET


# --- the rest -------------------------------------------------------------------------------------


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "quire"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[str] = []


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None
    warnings: Warnings = UNSET


class DetokenizeResponse(Struct, frozen=True, kw_only=True):
    prompt: str
    warnings: Warnings = UNSET
