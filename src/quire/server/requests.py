"""The models of requests: limits on every list and string, and strict types. Every field is either used,
refused by name (`unsupported`), or reported to the client as unknown.

Only types and sizes are checked here. Values that have a rule (`temperature`, `n`, ...) are checked by
`SamplingParams`, in one place for all front ends.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quire.limits import MAX_TIMEOUT
from quire.placement import LONGEST_RETENTION
from quire.server.neutral import EMPTY_HAS_MEANING, Neutral

MAX_IDS = 1 << 20
MAX_MESSAGES = 8192
MAX_CONTENT_PARTS = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_TOOLS = 1024
MAX_CALL_ID = 1 << 16
"""Long, because some gateways keep the signature of reasoning in it."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS)]
Ints = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Object = dict[str, Any]
"""Checked where its fields are known: pydantic would report each of a million bad entries."""
Name = Annotated[str, Field(max_length=256)]
Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT)]
RETENTION = r"^(in[_-]memory|[1-9]\d{0,6}[smhd])$"
PROMPT_FORMS = "A text, a list of texts, token ids, or a list of lists of token ids."
Prompt = Annotated[
    str
    | Annotated[list[str], Field(fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(fail_fast=True)],
    Field(description=PROMPT_FORMS),
]


class Strict(BaseModel):
    """Base class: JSON types must match, and a neutral value counts as absent (see `neutral`).

    docs/api.md is generated from these classes: a field's docstring is its text there. A field that
    `SamplingParams` has too is documented and checked there.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    """A last chunk with no choices and the usage."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: the usage so far in every chunk."""


class DecodingFields(Strict):
    """Sampling and scheduling, for every endpoint that generates. Defaults are the
    model's, see `sampling`."""

    model: Name | None = None
    """One of the names of the server's model; optional."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: Object | None = None
    allowed_token_ids: Annotated[Ints | None, EMPTY_HAS_MEANING] = None
    bad_words: Texts | None = None
    structured_outputs: Object | None = None
    """What the output must match, see [below](#structured-outputs)."""
    thinking_token_budget: int | None = None
    repetition_detection: Object | None = None
    """End a request that repeats itself, see [below](#repetition-detection)."""
    skip_special_tokens: bool | None = None
    """Leave them out of the text."""
    spaces_between_special_tokens: bool | None = None
    """false: no spaces around special tokens, where those are shown."""
    include_stop_str_in_output: bool | None = None
    """End the text with the stop string, or the stop token's text, that was found."""

    stream: bool | None = None
    """Server-sent events."""
    stream_interval: int | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower runs sooner, with `--scheduling-policy priority` or `fair`."""
    cache_salt: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)] | None, EMPTY_HAS_MEANING
    ] = None
    """Prompts share cached KV only with the same salt."""
    skip_reading_prefix_cache: bool | None = None
    retain_seconds: Annotated[float, Field(gt=0, le=LONGEST_RETENTION)] | None = None
    """Keep the KV of the prompt and the answer in the cache, longer than others', until it has not been used
    for so long. Within `--retained-cache-share`."""
    prompt_cache_retention: Annotated[str, Field(pattern=RETENTION)] | None = None
    """24h, or another duration: `retain_seconds`. in_memory: nothing."""
    timeout: Timeout | None = None
    """Seconds from the request's arrival, after which it ends: with finish reason `timeout` and what there
    is, or with a 408 if it has only waited. Also the header X-Request-Timeout; the smaller one counts. See
    [operations.md](operations.md#deadlines)."""
    request_id: Name | None = None
    """For logs, if the header X-Request-Id was not sent; never used as a key."""
    kv_transfer_params: Object | None = None
    """Who has or wants the prompt's KV, see [disaggregation.md](disaggregation.md). Goes with one prompt."""
    vllm_xargs: Object | None = None
    """For extensions of vLLM; it has no effect here, and a warning says so."""
    return_prefix_details: bool | None = None
    """In usage, with the number of cached tokens: `prefix`, for each prompt the tokens found on the device,
    in ram, on disk and at a peer, those computed, and the reason why no more were found."""


class SamplingFields(DecodingFields):
    """Further fields of completions and chat completions."""

    n: int | None = None
    stop: str | Texts | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    """The top logprobs of each prompt token except the first, and its own; -1 is all. Not with `stream`."""
    prompt_logprob_start: int | None = None
    logprob_token_ids: Ints | None = None
    response_format: Annotated[Object | None, Neutral({"type": "text"})] = None
    """OpenAI's form of `structured_outputs`: {"type": "text" | "json_object" | "json_schema"}."""
    best_of: int | None = None
    """Must equal n: all samples are returned. With `use_beam_search`, the beam width."""
    use_beam_search: bool | None = None
    """Search for the n likeliest continuations, instead of sampling n."""
    length_penalty: float | None = None
    """For beam search: above 1, longer continuations are preferred. Default: 1."""
    stream_options: StreamOptions | None = None
    """Needs `stream`, if it asks for anything."""
    return_token_ids: bool | None = None
    """`token_ids` on each choice, `prompt_token_ids` once."""
    return_tokens_as_token_ids: bool | None = None
    """Tokens in logprobs as "token_id:7", so that tokens with the same text can be distinguished."""
    return_effective_params: bool | None = None
    """`effective_params` in the answer, or in a stream's first chunk: every sampling parameter as it is used,
    the model's defaults included. With several prompts, max_tokens is the smallest of theirs."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Cut a longer prompt to this many tokens; -1: to the context length."""
    truncation_side: Literal["left", "right"] | None = None
    """The side that `truncate_prompt_tokens` cuts off."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens such as BOS to texts. Templates write their own."""


class CompletionRequest(SamplingFields):
    prompt: Prompt
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    logprobs: Annotated[int | None, Neutral(False)] = None
    echo: bool | None = None
    """The prompt before the answer, and with `logprobs` its tokens' too. `max_tokens` may then be 0."""


class ContentPart(Strict):
    """A part of a message. Which types are accepted depends on the model's template."""

    type: Name
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None


class Message(Strict):
    """One message. Only the keys listed here reach the template."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: (
        str
        | Annotated[list[ContentPart | str], Field(fail_fast=True, max_length=MAX_CONTENT_PARTS)]
        | None
    ) = None
    name: Name | None = None
    tool_calls: Annotated[list[Any], Field(max_length=1024)] | None = None
    function_call: Object | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_CALL_ID)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class Function(Strict):
    """A function that the model may call. Other keys reach the template too."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
    """MCP allows 128 characters, and clients put the server's name in front."""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; without it, any object."""
    strict: bool | None = None
    """Arguments must match the schema, enforced by a grammar."""


class Tool(Strict):
    model_config = ConfigDict(extra="allow")

    type: Name
    function: Function | None = None


class ChatFields(Strict):
    """How messages become a prompt; the same for chat completions and `/tokenize`."""

    messages: Messages
    """The conversation, oldest first."""
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """The functions that the model may call."""
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    """For templates that use them."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an answer: the default."""
    continue_final_message: bool | None = None
    """Continue the last message instead of beginning a new one."""
    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None
    ) = None
    """Variables for the template."""
    reasoning_effort: Name | None = None
    """For templates that use it."""
    add_special_tokens: bool | None = None


class ChatCompletionRequest(ChatFields, SamplingFields):
    max_completion_tokens: int | None = None
    """OpenAI's newer name for `max_tokens`; it takes precedence."""
    logprobs: Annotated[bool | None, Neutral(0)] = None
    """Whether each token's logprob is returned."""
    top_logprobs: Annotated[int | None, Neutral(0)] = None
    """With `logprobs`: also those of this many likeliest tokens; -1 is all."""
    tool_choice: Name | dict[str, Any] | None = None
    """none, auto, required, {"type": "function", "function": {"name": ...}} or {"type": "allowed_tools"}."""
    parallel_tool_calls: bool | None = None
    """false: at most one call."""
    include_reasoning: bool | None = None
    """false: reasoning is left out of the answer, but it is still generated."""


class ChatBatchRequest(ChatCompletionRequest):
    messages: Annotated[list[Messages], Field(fail_fast=True, min_length=1)]  # type: ignore[assignment]
    """Several conversations. The other fields apply to all of them."""


class TokenizeCompletionRequest(Strict):
    model: Name | None = None
    prompt: str
    """A text."""
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    """The tokens as the vocabulary writes them, too."""


class TokenizeChatRequest(ChatFields):
    model: Name | None = None
    return_token_strs: bool | None = None
    """The tokens as the vocabulary writes them, too."""


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: TokenIds
    """Token ids."""


class AbortRequest(Strict):
    request_ids: Annotated[
        list[Annotated[Name, Field(min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=1024),
    ]
    """Ids of answers: chatcmpl-..., cmpl-..., embd-..."""


class LoadAdapterRequest(Strict):
    lora_name: Name = ""
    """The name that requests then give as `model`."""
    lora_path: Annotated[str, Field(max_length=4096)] = ""
    """Its directory, below one of --lora-dir."""
    load_inplace: bool = False
    """Replace the adapter that has this name."""
    is_3d_lora_weight: Literal[False] = False
    """Of MoE models; only false is accepted."""


class UnloadAdapterRequest(Strict):
    lora_name: Name = ""
    """The adapter that is to go."""
    lora_int_id: int | None = None
    """Accepted for vLLM's clients; the name decides."""
